"""DeltaAttention: exact attention for every stride-th query row; what the plan lost there is added to its neighbours.

Source: Delta Attention (arXiv 2505.11254); what a sparse call loses is o - o_K = eps (o_S - o_K), so the correction is
exact where that is the same for a whole group of neighbouring queries. Where we depart from it: groups are raster runs
inside a frame, never across a frame's border or into text, and nothing is recomputed densely at the end. Beyond it:
corrections are scaled by how far they hold for a row's neighbours, representatives move from step to step, the exact
rows measure the error, and since they see every key tile they can take back tiles that a method dropped for good.

What it gains in whole clips is not measured.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from ...errors import ConfigError, MissingOption
from ...plan.call import Call
from ...plan.context import CallContext, Key, StepContext
from ...plan.exact_rows import dense_rows
from ...plan.layout import TokenLayout
from ...plan.plan import AttentionPlan, KernelResult
from ...plan.probes import probe_gaps
from ...report.sections import Section
from ..base import AttentionHandler, Handler, Model, Phase
from ..config import MethodConfig
from ..options import Count, ge
from ..saving import Saving

GOLDEN = (5**0.5 - 1) / 2


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
    """

    name: ClassVar[str] = "delta"

    stride: Annotated[int, ge(1), "it computes 1.6 % of the rows exactly"] = 64
    reuse: Count = 1
    shrink: bool = True
    rotate: bool = True
    reactivate: bool = True
    margin: Annotated[float, ge(0)] = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Groups:
    """Neighbouring queries that share one correction."""

    rows: Tensor  # int64 [G], token index of each group's representative, ascending
    of: Tensor  # int64 [n], group of every visual token, in the sequence's order


@lru_cache(maxsize=16)
def groups_of(layout: TokenLayout, stride: int, device: str, turn: int = 0) -> Groups:
    """Cut each frame's tokens into raster runs of ``stride``, of which the last may have fewer; text is in no group.

    The representative is the centre; each ``turn`` moves it by a golden section of the group.
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


@dataclass(frozen=True, slots=True)
class GroupCorrection:
    """How one call is corrected."""

    groups: Groups  # its groups
    layout: TokenLayout  # its tokens
    shrink: bool  # scale each head's corrections, as `DeltaAttention` has it
    delta: Tensor | None  # what is added to each group, [B, H, G, D]; None: what the call's own probe rows show

    def probed(self, plan: AttentionPlan, call: Call, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a call's probe rows as computed exactly, what follows from them for each group, and their error."""
        dense = dense_rows(plan, call, self.groups.rows)
        wide = torch.promote_types(out.dtype, torch.float32)
        exact = dense.to(wide)
        delta = difference = exact - out.index_select(2, self.groups.rows).to(wide)
        if self.shrink:
            delta = difference * neighbour_correlation(difference, self.layout.frames)[..., None, None]
        return dense, delta.to(out.dtype), _norm(difference) / _norm(exact)

    def added(self, out: Tensor, delta: Tensor, dense: Tensor | None) -> Tensor:
        """Add to an output [B, H, S, D] what its groups get, its probe rows being exact where they were computed."""
        out.narrow(2, self.layout.text_before, len(self.groups.of)).add_(delta.index_select(2, self.groups.of))
        return out if dense is None else out.index_copy_(2, self.groups.rows, dense)

    def after(self, plan: AttentionPlan, call: Call, context: CallContext, result: KernelResult) -> KernelResult:
        """Return the result of a call that runs as the corrected one did."""
        if self.delta is not None:
            return result._replace(out=self.added(result.out, self.delta, None))
        dense, delta, _ = self.probed(plan, call, result.out)
        return result._replace(out=self.added(result.out, delta, dense))

    def of_rows(self, rows: Sequence[int]) -> "GroupCorrection":
        """Return the correction of some rows of the batch."""
        return self if self.delta is None else replace(self, delta=self.delta[list(rows)])


@runtime_checkable
class RestoresTiles(Protocol):
    """A method that drops tiles for good and can take them back where Delta's probe rows find that they matter."""

    def restore_tiles(
        self, plan: AttentionPlan, context: CallContext, probe: Callable[[], tuple[Tensor, Tensor]], margin: float
    ) -> None:
        """Take back tiles that probe rows find to matter, after a call's votes are learned.

        Args:
            probe: gives gaps and shares as `probe_gaps` does; it costs a pass over the keys.
            margin: log2 units by which a gap or share must exceed the threshold at which tiles are dropped.
        """
        ...


class DeltaHandler(AttentionHandler):
    """DeltaAttention on one model: corrects what the other methods' plans computed."""

    config_type = DeltaAttention
    phase = Phase.CORRECTIONS
    settings: DeltaAttention

    def __init__(self, config: DeltaAttention, model: Model) -> None:
        super().__init__(config, model)
        self.restorers: tuple[RestoresTiles, ...] = ()
        self.held: dict[Key, tuple[Tensor, int]] = {}
        self._measured: list[tuple[CallContext, Tensor]] = []

    def require_given(self) -> None:
        self.check_with(())

    def check_with(self, others: Sequence[Handler]) -> None:
        """Refuse to correct nothing."""
        if not any(other.phase in (Phase.LISTS, Phase.PATTERNS, Phase.SELECTIONS) for other in others):
            raise MissingOption(
                "delta corrects what a sparse method leaves out, but none is attached; add one, such as "
                "RadialAttention() or --radial",
                needs="a sparse method beside it",
            )
        self.restorers = tuple(other for other in others if isinstance(other, RestoresTiles))

    def check_layout(self, layout: TokenLayout) -> str | None:
        if self.settings.stride <= layout.tokens_per_frame:
            return None
        return (
            f"delta.stride = {self.settings.stride} exceeds the {layout.tokens_per_frame} tokens of a frame: "
            "one row per frame is computed exactly"
        )

    def is_active(self, step: StepContext, depth: int) -> bool:
        """Never by itself: it corrects the calls that other methods plan."""
        return False

    def after(self, plan: AttentionPlan, call: Call, context: CallContext, result: KernelResult) -> KernelResult:
        """Add each group's correction, measure the error in probed calls; refuse calls that a backward may follow."""
        if plan.is_dense or plan.skips_logits:
            return result
        if context.differentiate:
            raise ConfigError(
                "delta has no gradient, and this attention call is recorded for a backward; generate under "
                "torch.no_grad(), or train without DeltaAttention"
            )
        settings, out = self.settings, result.out
        turn = context.step_index if settings.rotate else 0
        groups = groups_of(context.layout, settings.stride, str(out.device), turn)
        delta, calls = self.held.get(context.key, (None, 0))
        due = calls % settings.reuse == 0
        how = GroupCorrection(groups, context.layout, settings.shrink, None if due else delta)
        dense = None
        if delta is None or due:
            dense, delta, error = how.probed(plan, call, out)
            self._measured.append((context, error))
            for other in self.restorers if settings.reactivate else ():
                other.restore_tiles(plan, context, lambda: probe_gaps(plan, call, groups.rows), settings.margin)
        if settings.reuse > 1:  # else it would hold memory that no call reads
            self.held[context.key] = (delta, calls + 1)
        out = how.added(out, delta, dense)
        return result._replace(out=out, corrections=(*result.corrections, how))

    def probe_share(self, layout: TokenLayout) -> float:
        """Return the share of a call's query rows that are computed densely: one row in each group."""
        return layout.frames * math.ceil(layout.tokens_per_frame / self.settings.stride) / layout.tokens

    def needs_step(self, step: StepContext) -> bool:
        """Tell whether a correction that served its ``reuse`` calls is due; with 1 every call is as good as any."""
        held = [calls for key, (_, calls) in self.held.items() if (key[0], key[2]) == (step.transformer, step.branch)]
        return any(calls % self.settings.reuse == 0 for calls in held)

    def reset(self) -> None:
        self.held.clear()

    def begin_run(self) -> None:
        self._measured.clear()

    def report(self) -> Section | None:
        """Return the errors at probe rows, before correction, and the work that they cost.

        An entry of ``measured`` is one probed call: ``rows`` is the share of its query rows that were computed densely
        besides, ``by_head`` the norm of (planned - dense) over that of dense, over probe rows and batch, from
        ``first_head`` on: several processes may share a layer's heads.
        """
        measured: list[dict[str, Any]] = [
            {
                **{name: getattr(context, name) for name in ("transformer", "step_index", "branch", "layer")},
                "rows": self.probe_share(context.layout),
                "by_head": tuple(error.tolist()),
                "first_head": 0 if context.heads is None else context.heads.start,
            }
            for context, error in self._measured
        ]
        if not measured:
            return None
        errors = [(x, call, head) for call in measured for head, x in enumerate(call["by_head"], call["first_head"])]
        worst, call, head = max(errors, key=lambda entry: entry[0])
        mean = sum(error for error, *_ in errors) / len(errors)
        probed = {tuple(entry.values())[:4]: entry["rows"] for entry in measured}
        where = f"step {call['step_index']}, layer {call['layer']}, head {head}"
        lines = (
            f"error at probe rows, before correction: {mean:.3f} mean, {worst:.3f} worst ({where})",
            f"{len(measured)} calls probed; their rows are dense, besides the tiles: {call['rows']:.3f} of a call",
        )
        data = {"mean": mean, "worst": worst, "measured": measured, "probed_rows": sum(probed.values())}
        return Section(method=self.name, title="delta", lines=lines, data=data)

    def estimate(self, layout: TokenLayout, steps: int) -> Saving:
        note = f"delta computes {self.probe_share(layout):.3f} of the query rows densely, besides the tiles"
        return Saving(exact_rows=self.probe_share(layout) / self.settings.reuse, notes=(note,))


def _norm(x: Tensor) -> Tensor:
    """Norm over batch, rows and channels of each head, [H] of [B, H, G, D]; never 0."""
    return x.square().sum((0, 2, 3)).sqrt().clamp(min=torch.finfo(x.dtype).tiny)


def neighbour_correlation(corrections: Tensor, frames: int) -> Tensor:
    """Return in [0, 1] how alike a row's own correction and its representative's are expected to be, [B, H].

    It is the root of the correlation of neighbouring groups' corrections: groups lie a stride apart, rows and their
    representative half of that at most, and a correlation that falls off exponentially has its root at half the way.
    Scaled by it, a correction is not expected to raise the error.

    ``frames``: F; neighbours are of one frame or, where a frame is one group, of one frame and the next.
    """
    x = corrections.unflatten(2, (frames, -1))
    group, next_ = (x[:, :, :, :-1], x[:, :, :, 1:]) if x.shape[3] > 1 else (x[:, :, :-1], x[:, :, 1:])
    if group.numel() == 0:
        return torch.ones_like(x[:, :, 0, 0, 0])
    together, first, second = ((a * b).sum((2, 3, 4)) for a, b in ((group, next_), (group, group), (next_, next_)))
    return (together / (first * second).sqrt().clamp(min=torch.finfo(x.dtype).tiny)).clamp(0, 1).sqrt()
