"""DeltaAttention: exact attention for every stride-th query row, and what it differs by added to the row's neighbours.

Source: Delta Attention (arXiv 2505.11254); what a sparse call loses is o - o_K = eps (o_S - o_K), so the correction is
exact where that is the same for a whole group of neighbouring queries. Where we depart from it: groups are raster runs
inside a frame, never across a frame's border or into text, and nothing is recomputed densely at the end. Beyond it:
corrections are scaled by how far they hold for a row's neighbours, representatives move from step to step, the exact
rows measure the error, and since they see every key tile they can take back tiles that a method dropped for good.

What it gains depends on the method (docs/quality.md): on the embedded model it lifts LiteAttention and SparseD,
and not Radial, whose calls it corrects as well. Probably what it leaves there differs between neighbours and between
branches, where Radial's own loss is smooth and much the same in both, so that guidance, which amplifies the branches'
difference, cancels it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import ConfigError
from ...plan.exact_rows import dense_rows
from ...plan.layout import TokenLayout
from ...plan.plan import AttentionPlan, Call, CallContext
from ..base import Handler, Model, handles
from ..config import MethodConfig
from .lite.state import Key, key_of
from .sparse import SparseConfig

LOG2_E = 1.4426950408889634
GOLDEN = (5**0.5 - 1) / 2
PROBE_SCORES = 2**26
"""Logits that the probes of one head hold at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaAttention(MethodConfig):
    """Corrects a sparse method by exact probe rows and measures its error (arXiv 2505.11254); costs 1 / stride.

    Attributes:
        stride: query rows of a group, of which one is computed exactly; the last group of a frame may be smaller.
        reuse: calls of a layer and branch that one correction serves; the first of them is probed. With 1 every call
            is; with more the representative rows are exact in the probed calls only.
        shrink: scale each head's corrections by how alike those of neighbouring groups are, so that rows which have
            little to do with their representative stay nearly as they were. False is the paper's.
        rotate: let the representative move through its group from step to step, by the golden ratio, so that what the
            corrections get wrong does not add up over the run. False: it is the centre at every step.
        reactivate: let the probes take back tiles that another method dropped, where it can (LiteAttention).
        margin: log2 units by which a dropped tile must exceed the threshold to be taken back.

    Raises:
        ConfigError: for an option out of range.
    """

    name: ClassVar[str] = "delta"

    stride: int = 64
    reuse: int = 1
    shrink: bool = True
    rotate: bool = True
    reactivate: bool = True
    margin: float = 1.0

    def __post_init__(self) -> None:
        MethodConfig.__post_init__(self)
        if self.stride < 1:
            raise ConfigError(f"delta.stride must be >= 1, got {self.stride}; 64 computes 1.6 % of the rows exactly")
        if self.reuse < 1:
            raise ConfigError(f"delta.reuse must be >= 1, got {self.reuse}; 1 probes every call")
        if not 0 <= self.margin < float("inf"):
            raise ConfigError(f"delta.margin must be a finite number >= 0, got {self.margin}; 1 is usual")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Groups:
    """Neighbouring queries that share one correction.

    Attributes:
        rows: int64 [G], token index of each group's representative, ascending.
        of: int64 [n], group of every visual token, in the sequence's order.
    """

    rows: Tensor
    of: Tensor


@lru_cache(maxsize=16)
def groups_of(layout: TokenLayout, stride: int, device: str, turn: int = 0) -> Groups:
    """Cut each frame's tokens into raster runs of ``stride``; text is in no group.

    Args:
        layout: the sequence.
        stride: tokens of a group; the last of a frame may have fewer.
        device: where the groups are wanted.
        turn: 0 makes the centre the representative; each further turn moves it by a golden section of the group.
    """
    s = layout.tokens_per_frame
    starts = torch.arange(0, s, stride)
    place = (0.5 + turn * GOLDEN) % 1
    representatives = starts + ((s - starts).clamp(max=stride) * place).floor().long()
    frames = torch.arange(layout.frames)[:, None]
    rows = layout.text_before + frames * s + representatives
    of = frames * len(starts) + torch.arange(s) // stride
    with torch.inference_mode(False):
        return Groups(rows=rows.flatten().to(device).clone(), of=of.flatten().to(device).clone())


@handles(DeltaAttention)
class DeltaHandler(Handler):
    """DeltaAttention on one model: corrects what the other methods' plans computed."""

    config: DeltaAttention
    rank = 2

    def __init__(self, config: DeltaAttention, model: Model) -> None:
        super().__init__(config, model)
        self.others: tuple[Handler, ...] = ()
        self.held: dict[Key, tuple[Tensor, int]] = {}

    def check_with(self, others: Sequence[Handler]) -> None:
        """Refuse to correct nothing."""
        if not any(isinstance(other.config, SparseConfig) for other in others):
            raise ConfigError(
                "delta corrects what a sparse method leaves out, and none is attached; add one, such as "
                "RadialAttention() or --radial"
            )
        self.others = tuple(others)

    def check_layout(self, layout: TokenLayout) -> str | None:
        """Remark on groups that are smaller than asked for."""
        if self.config.stride <= layout.tokens_per_frame:
            return None
        return (
            f"delta.stride = {self.config.stride} exceeds the {layout.tokens_per_frame} tokens of a frame: "
            "one row a frame is computed exactly"
        )

    def is_active(
        self, depth: int, step_index: int, num_inference_steps: int | None, sigma: float | None = None
    ) -> bool:
        """Never by itself: it corrects the calls that other methods plan."""
        return False

    def correct(
        self, plan: AttentionPlan, context: CallContext, call: Call, v: Tensor, out: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Add each group's correction; on probed calls return the measured error and let tiles be taken back.

        Raises:
            ConfigError: if a backward may follow, of which the correction would be no part.
        """
        if _is_dense(plan):
            return out, None
        if context.differentiate:
            raise ConfigError(
                "delta has no gradient, and this attention call is recorded for a backward; generate under "
                "torch.no_grad(), or train without DeltaAttention"
            )
        axis = 2 if call.layout == "bhsd" else 1
        turn = context.step_index if self.config.rotate else 0
        groups = groups_of(context.layout, self.config.stride, str(out.device), turn)
        key = key_of(context)
        delta, calls = self.held.get(key, (None, 0))
        dense = error = None
        if delta is None or calls % self.config.reuse == 0:
            dense = dense_rows(plan, call, v, groups.rows)
            wide = torch.promote_types(out.dtype, torch.float32)
            exact = dense.to(wide)
            difference = exact - out.index_select(axis, groups.rows).to(wide)
            error = _norm(call.heads_first(difference)) / _norm(call.heads_first(exact))
            delta = difference
            if self.config.shrink:
                likeness = likeness_of(call.heads_first(difference), context.layout.frames)
                delta = call.heads_first(call.heads_first(difference) * likeness[..., None, None])
            delta = delta.to(out.dtype)
            self._reactivate(plan, context, call, groups.rows)
        if self.config.reuse > 1:
            self.held[key] = (delta, calls + 1)
        out.narrow(axis, context.layout.text_before, len(groups.of)).add_(delta.index_select(axis, groups.of))
        if dense is not None:
            out.index_copy_(axis, groups.rows, dense)
        return out, error

    def probe_share(self, layout: TokenLayout) -> float:
        """Return the share of one row in each group."""
        return layout.frames * math.ceil(layout.tokens_per_frame / self.config.stride) / layout.tokens

    def reset(self) -> None:
        """Forget the corrections of earlier calls."""
        self.held.clear()

    def _reactivate(self, plan: AttentionPlan, context: CallContext, call: Call, rows: Tensor) -> None:
        takers = [other for other in self.others if self.config.reactivate and other.wants_gaps(plan, context)]
        if takers:
            gaps, shares = probe_gaps(plan, call, rows)
            for other in takers:
                other.reactivate(plan, context, gaps, shares, self.config.margin)


def _is_dense(plan: AttentionPlan) -> bool:
    """Tell whether a plan leaves nothing out; asks no device."""
    full = plan.tiles is None or plan.tiles.tiles_exact == plan.tiles.tiles_total
    return full and (plan.selection is None or (plan.selection.keep is None and plan.selection.routing is None))


def _norm(x: Tensor) -> Tensor:
    """Norm over batch, rows and channels of each head, [H] of [B, H, G, D]; never 0."""
    return x.square().sum((0, 2, 3)).sqrt().clamp(min=torch.finfo(x.dtype).tiny)


def likeness_of(corrections: Tensor, frames: int) -> Tensor:
    """Return in [0, 1] how alike a row's own correction and its representative's are expected to be, [B, H].

    It is the root of the correlation of neighbouring groups' corrections: groups lie a stride apart, rows and their
    representative half of that at most, and a correlation that falls off exponentially has its root at half the way.
    Scaled by it, a correction is not expected to raise the error.

    Args:
        corrections: [B, H, G, D], in the order of `groups_of`.
        frames: F; neighbours are of one frame or, where a frame is one group, of one frame and the next.
    """
    x = corrections.unflatten(2, (frames, -1))
    one, next_ = (x[:, :, :, :-1], x[:, :, :, 1:]) if x.shape[3] > 1 else (x[:, :, :-1], x[:, :, 1:])
    if one.numel() == 0:
        return torch.ones_like(x[:, :, 0, 0, 0])
    together, first, second = ((a * b).sum((2, 3, 4)) for a, b in ((one, next_), (one, one), (next_, next_)))
    return (together / (first * second).sqrt().clamp(min=torch.finfo(x.dtype).tiny)).clamp(0, 1).sqrt()


def probe_gaps(plan: AttentionPlan, call: Call, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return what some query rows see in every key tile of a plan, the most of each block row's.

    Args:
        plan: the call's plan; its tile lists give the tiles.
        call: its queries and keys.
        rows: int64 [G], token indices of the probes.

    Returns:
        Gaps and shares, float32 (float64 for float64) [B, H, NQ, NK], as `Handler.reactivate` has them.
    """
    tiles, order = plan.tiles, plan.token_order
    assert tiles is not None
    q, k = call.heads_first(call.q).index_select(2, rows), call.heads_first(call.k)
    (batch, heads), keys = q.shape[:2], k.shape[2]
    place = rows
    if order is not None:
        k = k.index_select(2, order)
        place = torch.empty_like(order).index_copy_(0, order, torch.arange(keys, device=order.device))[rows]
    wide = torch.promote_types(q.dtype, torch.float32)
    shape = (batch, heads, tiles.query_tiles, tiles.key_tiles)
    gaps = torch.full(shape, -torch.inf, dtype=wide, device=q.device)
    shares = torch.zeros(shape, dtype=wide, device=q.device)
    for b, h, part, x in _probe_logits(plan, call, q, k, rows):
        x = torch.nn.functional.pad(x, (0, -keys % tiles.block_k), value=-torch.inf).unflatten(-1, (-1, tiles.block_k))
        top = x.amax(-1)
        peak = top.amax(-1, keepdim=True).clamp(min=torch.finfo(wide).min)  # a row without a valid key
        mass = (x - peak[..., None]).exp2().sum(-1)
        block_row = place[part] // tiles.block_q
        block_row = block_row[:, None].expand_as(top)
        gaps[b, h].scatter_reduce_(0, block_row, top - peak, "amax")
        share = mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
        shares[b, h].scatter_reduce_(0, block_row, share, "amax")
    return gaps, shares


def _probe_logits(
    plan: AttentionPlan, call: Call, q: Tensor, k: Tensor, rows: Tensor
) -> Iterator[tuple[int, int, slice, Tensor]]:
    """Give (batch, head, part of the rows, log2 logits [part, S]) of the probes; ``k`` is in the plan's tiled order."""
    order, decay, mask = plan.token_order, plan.frame_decay, call.key_mask()
    wide = torch.promote_types(q.dtype, torch.float32)
    invalid = None if mask is None else ~(mask if order is None else mask.index_select(1, order))
    scale = (q.shape[-1] ** -0.5 if call.scale is None else call.scale) * LOG2_E
    repeat, step = q.shape[1] // k.shape[1], max(1, PROBE_SCORES // k.shape[2])
    factor = None if plan.head_scale is None else plan.head_scale.to(wide).reshape(-1, q.shape[1])
    k_frames = None if decay is None else decay.k_frames if order is None else decay.k_frames[order]
    for start in range(0, len(rows), step):
        part, t = slice(start, start + step), None
        if decay is not None and k_frames is not None:
            q_frames = decay.q_frames[rows[part]]
            distance = (q_frames[:, None] - k_frames).abs().clamp(max=decay.table.numel() - 1)
            outside = (q_frames < 0)[:, None] | (k_frames < 0)
            t = decay.table[distance.long()].to(wide).masked_fill(outside, 1.0)
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                x = (q[b, h, part] @ k[b, h // repeat].mT).to(wide) * scale
                if factor is not None:
                    x = x * factor[b if len(factor) > 1 else 0, h]
                x = x if t is None else torch.minimum(x, t * x)
                yield b, h, part, x if invalid is None else x.masked_fill(invalid[b], -torch.inf)
