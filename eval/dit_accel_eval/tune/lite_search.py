"""Searches LiteAttention's threshold at every attention call, on its own queries, keys and values.

Source: the calibration of LiteAttention (arXiv 2511.11062): a threshold's votes, used on the same inputs, may change
the output by a target error. Where we depart from it: the highest threshold found within the target is taken,
and if there is none between the limits, nothing is dropped.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from dit_accel_kernels import Selection, block_sparse_attention_eager, count_bits
from torch import Tensor
from torch.nn import functional as F

from dit_accel import LiteAttention
from dit_accel.methods.attention.lite.handler import LiteHandler
from dit_accel.methods.base import Model
from dit_accel.plan.call import Call
from dit_accel.plan.context import CallContext, Key
from dit_accel.plan.exact_rows import dense_rows
from dit_accel.plan.plan import AttentionPlan

LOWEST, HIGHEST = -20.0, -(2.0**-6)
"""Log2 levels between which thresholds are searched."""

START = -10.0
"""Where a search begins without a hint: the published threshold."""

FIRST_STRIDE = 0.5
NEAR = 0.9
"""Share of the target error at which a search is over."""

CLOSE = 0.03125
"""Log2 units at which a search is over: tiles are whole, so not every error can be met."""

FAINTEST = -40.0
"""Log2 of a share of the mass that drops next to nothing."""

Metric = Callable[[Tensor, Tensor], float]


METRICS: dict[str, Metric] = {
    "l1": lambda out, reference: float((out - reference).abs().sum() / reference.abs().sum().clamp(min=1e-30)),
    "l2": lambda out, reference: float((out - reference).norm() / reference.norm().clamp(min=1e-30)),
    "cosine": lambda out, reference: 1 - float(F.cosine_similarity(out.flatten(), reference.flatten(), dim=0)),
}
"""Error of a call's output against another, over the whole tensor and relative to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What was found for one attention call.

    Attributes:
        transformer: component name.
        branch: name of the denoising call.
        layer: the attention module's index in its transformer.
        step: 0-based.
        threshold: for `LiteAttention`; -inf drops nothing.
        kept: share of the tiles that the next call keeps.
        added: error that the votes would add to this call.
        dense: error of this call to dense attention on the same inputs.
    """

    transformer: str
    branch: str
    layer: int
    step: int
    threshold: float
    kept: float
    added: float
    dense: float


class Rerun:
    """One attention call, run again with other votes and other bits."""

    def __init__(self, plan: AttentionPlan, call: Call, out: Tensor, metric: Metric) -> None:
        assert plan.selection is not None
        assert plan.selection.vote is not None
        self.plan, self.call, self.out, self.metric = plan, call, out, metric
        self.selection = plan.selection
        self.vote = plan.selection.vote

    def votes(self, level: float) -> Tensor:
        """Return the bits that votes at a log2 level keep."""
        vote = dataclasses.replace(self.vote, threshold=threshold_of(self.vote.criterion, level))
        return self._attend(dataclasses.replace(self.selection, vote=vote))[2]

    def after(self, kept: Tensor | None) -> tuple[float, float]:
        """Return the error that bits add to this call, and the share of the tiles that they leave exact."""
        selection = dataclasses.replace(self.selection, keep=kept, vote=None, reverse=not self.selection.reverse)
        out, exact = self._attend(selection)
        tiles = self.plan.tiles
        assert tiles is not None
        share = float(count_bits(exact).sum()) / (exact[..., 0].numel() * tiles.key_tiles)
        return self.metric(out.float(), self.out.float()), share

    def to_dense(self) -> float:
        """Return the error of the call as it ran to dense attention on its inputs."""
        every = torch.arange(self.call.q.shape[2], device=self.out.device)
        return self.metric(self.out.float(), dense_rows(self.plan, self.call, every).float())

    def _attend(self, selection: Selection) -> tuple[Tensor, ...]:
        plan, call = self.plan, self.call
        assert plan.tiles is not None
        q, k, v = call.as_held(call.q, call.k, call.v)
        result = block_sparse_attention_eager(
            q, k, v, plan.tiles, **call.kernel_layout, scale=call.scale, head_scale=plan.head_scale,
            key_mask=call.key_mask(), frame_decay=plan.frame_decay, token_order=plan.token_order,
            identity_mix=plan.identity_mix, identity_rows=plan.identity_rows, selection=selection, return_tiles=True,
            backend=call.backend,
        )  # fmt: skip
        assert isinstance(result, tuple)
        return call.heads_first(result[0]), *result[1:]


def threshold_of(criterion: str, level: float) -> float:
    """Return the threshold of a log2 level; -inf gives one that drops nothing."""
    if criterion == "maxgap":
        return level
    return 2.0 ** max(level, FAINTEST)


def search_level(error_at: Callable[[float], float], target: float, start: float = START) -> float:
    """Return the highest log2 level found whose error is within the target; -inf where even `LOWEST` exceeds it.

    Args:
        error_at: error of a level, which rises with it.
        target: the error to stay within; a search ends at `NEAR` of it or within `CLOSE`.
        start: a level near the one sought, such as the step before's.
    """
    low, high, stride = -math.inf, math.inf, FIRST_STRIDE
    level = min(max(start, LOWEST), HIGHEST)
    while high - low >= CLOSE:
        error = error_at(level)
        if error <= target:
            low = level
            if error >= NEAR * target or level == HIGHEST:
                break
        else:
            high = level
            if level == LOWEST:
                break
        if math.isinf(high - low):  # not between two levels yet: go on in longer and longer strides
            level = min(low + stride, HIGHEST) if low > -math.inf else max(high - stride, LOWEST)
            stride *= 2
        else:
            level = (low + high) / 2
    return low


class Tuner(LiteHandler):
    """LiteAttention that searches the threshold of every vote on the tensors at hand and follows it."""

    def __init__(self, config: LiteAttention, model: Model, target_error: float, metric: Metric) -> None:
        super().__init__(config, model)
        self.target_error = target_error
        self.metric = metric
        self.found: list[Found] = []
        self._levels: dict[Key, float] = {}

    def learn(self, context: CallContext, kept: Tensor) -> None:
        """Leave the plan's own votes aside: they were cast before the threshold was known."""

    def correct(self, plan: AttentionPlan, call: Call, context: CallContext, out: Tensor) -> Tensor:
        """Search the threshold on this call's tensors and learn its votes; the output stays."""
        if plan.selection is None or plan.selection.vote is None:
            return out
        again = Rerun(plan, call, out, self.metric)
        level = search_level(
            lambda level: again.after(again.votes(level))[0], self.target_error, self._levels.get(context.key, START)
        )
        self._levels[context.key] = level
        kept = plan.selection.keep
        if level > -math.inf:
            kept = again.votes(level)
            super().learn(context, kept)
        added, share = again.after(kept)
        self.found.append(
            Found(
                transformer=context.transformer, branch=context.branch, layer=context.layer, step=context.step_index,
                threshold=threshold_of(again.vote.criterion, level), kept=share, added=added, dense=again.to_dense(),
            )
        )  # fmt: skip
        return out
