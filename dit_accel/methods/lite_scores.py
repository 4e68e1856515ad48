"""What share of the softmax mass tiles hold at some rows, and the threshold that leaves a target density.

Votes can't find it: they tell what lies under one threshold, and what they drop does not come back.
"""

import torch
from torch import Tensor

from ..plan import AttentionPlan, Call
from .delta import probe_gaps

RECORDED_ROWS = 16
"""Rows of a block row at which scores are recorded; of 128 rows, an eighth of one Q K^T."""

BINS_A_UNIT, LOWEST = 64, -64
"""Bins of a log2 unit in which a `Dial` counts scores, and the score of the lowest bin."""

_BINS = -LOWEST * BINS_A_UNIT


def recorded_scores(plan: AttentionPlan, call: Call) -> Tensor:
    """Return the largest share of its softmax mass that a recorded row has in each tile, log2, [B, H, NQ, NK].

    Gaps would tell little at low densities: a tile in ten or more holds the largest logit of some row.

    Args:
        plan: the call's plan, with its tiles.
        call: its queries and keys.
    """
    assert plan.tiles is not None
    tokens, order = call.heads_first(call.q).shape[2], plan.token_order
    rows = torch.arange(0, tokens, max(1, plan.tiles.block_q // RECORDED_ROWS), device=call.q.device)
    return probe_gaps(plan, call, rows if order is None else order[rows])[1].log2()


class Dial:
    """The common threshold of all layers of a transformer and branch at which a target share of their tiles is kept.

    Layers count their scores in bins during one step, each batch row by itself; at the next step the threshold is read
    off. One threshold for all layers, since they differ: on the embedded model, keeping 70 % of the tiles of every
    layer costs three times the error of keeping 70 % of all tiles.
    """

    def __init__(self, step_index: int) -> None:
        self.step_index = step_index
        self._counts: Tensor | None = None
        self._fixed: Tensor | int = 0
        self._tiles = 0
        self._cut: Tensor | None = None

    def count(self, scores: Tensor, free: Tensor, fixed: Tensor) -> None:
        """Count one layer's tiles.

        Args:
            scores: log2 [B, H, NQ, NK].
            free: bool like scores, the tiles that may be dropped or kept.
            fixed: bool, broadcastable to it, the tiles that are kept anyway.
        """
        bins = torch.where(free, _bins(scores), -1).flatten(1) + 1
        counts = torch.zeros(len(scores), _BINS + 1, dtype=torch.int64, device=scores.device)
        counts.scatter_add_(1, bins, torch.ones_like(bins))
        self._counts = counts if self._counts is None else self._counts + counts
        self._fixed = fixed.expand_as(scores).flatten(1).sum(1) + self._fixed
        self._tiles += scores[0].numel()

    def keeps(self, scores: Tensor, target: float) -> Tensor:
        """Return which tiles of one layer stay if the share ``target`` of all layers' tiles does, bool like scores."""
        if self._cut is None:
            assert self._counts is not None
            above = self._counts[:, 1:].flip(1).cumsum(1).flip(1) + torch.as_tensor(self._fixed)[:, None]
            self._cut = (above > target * self._tiles).sum(1)
        return _bins(scores) >= self._cut[:, None, None, None]


def _bins(scores: Tensor) -> Tensor:
    return ((scores - LOWEST) * BINS_A_UNIT).floor().clamp(0, _BINS - 1).long()
