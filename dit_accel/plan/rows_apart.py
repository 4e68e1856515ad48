"""Rows of a batch that follow a plan of their own, such as those of a negative prompt that alone is perturbed."""

from dataclasses import dataclass, replace

import torch
from dit_accel_kernels import EXACT, Selection, TileLists
from torch import Tensor

from ..errors import ConfigError
from .call import Call
from .normalized_guidance import LastChange
from .plan import AttentionPlan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChangedRows:
    """A change of an attention call's output that touches some rows of the batch alone."""

    change: LastChange  # what changes them
    rows: Tensor  # which rows, bool [B]

    def applied(self, out: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the output with these rows of the batch changed; ``rows`` are the tokens that it holds."""
        return torch.where(self.rows[:, None, None, None], self.change.applied(out, rows), out)


def with_rows_apart(plan: AttentionPlan, other: AttentionPlan, rows: Tensor, call: Call) -> AttentionPlan:
    """Return the plan by which some rows of a call follow ``other``, which was made of ``plan``, and the rest ``plan``.

    ``rows``: which rows of the batch, bool [B].
    """
    if other is plan or not bool(rows.any()):
        return plan
    if bool(rows.all()):
        return other
    for part in ("key_mean", "frame_decay", "row_override", "reused", "precision"):
        if getattr(plan, part) is not getattr(other, part):
            raise _shared(part.replace("_", " "))
    size = call.q.shape[:2]
    ones = torch.ones(size, device=call.q.device)
    guidance = other.guidance
    if guidance is not None and guidance is not plan.guidance:
        guidance = ChangedRows(change=guidance, rows=rows)
    return replace(
        other,
        tiles=_tiles(plan, other, rows, size),
        selection=_selection(plan.selection or Selection(), other.selection, rows, size),
        head_scale=_apart(plan.head_scale, other.head_scale, rows, ones),
        identity_mix=_apart(plan.identity_mix, other.identity_mix, rows, 0 * ones),
        only_values=plan.only_values and other.only_values,
        queries=_apart(plan.queries, other.queries, rows, call.q),
        guidance=guidance,
    )


def _apart(ours: Tensor | None, theirs: Tensor | None, rows: Tensor, usual: Tensor) -> Tensor | None:
    """Return a part of a plan by row, [B, H, ...]; ``usual`` is what it is where a plan has none."""
    if ours is theirs:
        return ours
    parts = (usual if part is None else part.expand(usual.shape) for part in (theirs, ours))
    return torch.where(rows.reshape(-1, *[1] * (usual.ndim - 1)), *parts)


def _tiles(plan: AttentionPlan, other: AttentionPlan, rows: Tensor, size: torch.Size) -> TileLists | None:
    """Return the tile lists of each row and head; where the plan has none, every tile is exact."""
    ours, theirs = plan.tiles, other.tiles
    if ours is theirs or theirs is None:
        return theirs
    if theirs.mask_ids is not None or (ours is not None and ours.mask_ids is not None):
        raise _shared("masks within tiles")
    states = theirs.states()
    base = torch.full_like(states, EXACT) if ours is None else ours.states()
    base, states = (x.unflatten(0, (-1, min(len(x), size[1]))).expand(*size, -1, -1) for x in (base, states))
    merged = torch.where(rows[:, None, None, None], states, base).flatten(0, 1)
    return TileLists.from_states(merged, **theirs.sizes)


def _selection(ours: Selection, theirs: Selection | None, rows: Tensor, size: torch.Size) -> Selection | None:
    """Return the choice among tiles of each row."""
    if theirs is None or theirs is ours:
        return theirs
    whole = ours == Selection()
    for part in ("routing", "vote", "routed", *(() if whole else ("pinned", "rest"))):
        if getattr(ours, part) is not getattr(theirs, part):
            raise _shared(part)
    if theirs.keep is None:
        return theirs
    every = torch.full_like(theirs.keep, -1).expand(*size, -1, -1)
    return replace(theirs, keep=_apart(ours.keep, theirs.keep, rows, every))


def _shared(part: str) -> ConfigError:
    return ConfigError(
        f"one attention call holds rows that are perturbed and others that are not, and takes one {part} for all of "
        "them; perturb by scale, mix, with_tiles, narrow or query, or use mode = 'branch'"
    )
