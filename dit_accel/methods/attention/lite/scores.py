"""What share of the softmax mass tiles hold at some rows, and the threshold that leaves a target density.

Votes can't find it: they tell what lies under one threshold, and what they drop does not come back.
"""

import torch
from torch import Tensor

from ....plan.call import Call
from ....plan.plan import AttentionPlan
from ....plan.probes import probe_gaps

RECORDED_ROWS = 16
"""Rows of a block row at which scores are recorded; of 128 rows, an eighth of one Q K^T."""

BINS_A_UNIT, LOWEST = 256, -64
"""Bins of a log2 unit in which a `DensityCalibrator` counts scores, and the score of the lowest bin."""

_BINS = -LOWEST * BINS_A_UNIT


def recorded_scores(plan: AttentionPlan, call: Call) -> Tensor:
    """Return the largest share of its softmax mass that a recorded row has in each tile, log2, [B, H, NQ, NK].

    Gaps would tell little at low densities: a tile in ten or more holds the largest logit of some row.
    """
    assert plan.tiles is not None
    tokens, order = call.q.shape[2], plan.token_order
    rows = torch.arange(0, tokens, max(1, plan.tiles.block_q // RECORDED_ROWS), device=call.q.device)
    return probe_gaps(plan, call, rows if order is None else order[rows])[1].log2()


class DensityCalibrator:
    """How many tiles each layer of a transformer and branch keeps so that all layers together keep a target share.

    During one step every layer counts its scores in bins, each batch row by itself. At the next step the threshold that
    all layers have in common is read off, and with it each layer's quota. One threshold for all, since layers differ:
    on `wan-plain`, keeping 70 % of the tiles of every layer costs three times the error of keeping 70 % of all.
    """

    def __init__(self, step_index: int) -> None:
        self.step_index = step_index
        self._counts: Tensor | int = 0
        self._fixed: Tensor | int = 0
        self._tiles = 0
        self._cut: Tensor | None = None

    def count(self, scores: Tensor, free: Tensor, fixed: Tensor) -> Tensor:
        """Count one layer's tiles, and return its counts for `keeps`, int32 [B, bins].

        Args:
            scores: log2 [B, H, NQ, NK].
            free: bool like scores, the tiles that may be dropped or kept.
            fixed: bool like scores, the tiles that are kept anyway.
        """
        bins = ((scores - LOWEST) * BINS_A_UNIT).floor().clamp(0, _BINS - 1).long()
        bins = torch.where(free, bins, _BINS).flatten(1)
        counts = torch.zeros(len(scores), _BINS + 1, dtype=torch.int32, device=scores.device)
        counts.scatter_add_(1, bins, torch.ones_like(bins, dtype=torch.int32))
        counts = counts[:, :_BINS]
        self._counts = self._counts + counts
        self._fixed = self._fixed + fixed.flatten(1).sum(1)
        self._tiles += scores[0].numel()
        return counts

    def keeps(self, scores: Tensor, free: Tensor, counts: Tensor, target: float) -> Tensor:
        """Return the free tiles of one layer that stay, bool like scores; of equal scores the first.

        A layer keeps as many as its ``counts`` had at or above the common threshold at which a share ``target`` of all
        layers' tiles stays; and the best free tile of every block row.
        """
        if self._cut is None:
            above = torch.as_tensor(self._counts).flip(1).cumsum(1).flip(1) + torch.as_tensor(self._fixed)[:, None]
            self._cut = (above > target * self._tiles).sum(1, keepdim=True)
        bins = torch.arange(_BINS, device=counts.device) >= self._cut
        quota = (counts * bins).sum(1, keepdim=True)
        ranked = scores.masked_fill(~free, -torch.inf)
        places = ranked.flatten(1).argsort(dim=1, descending=True, stable=True)
        first = torch.arange(places.shape[1], device=places.device) < quota
        chosen = torch.zeros_like(first).scatter_(1, places, first).unflatten(1, scores.shape[1:])
        return chosen.scatter(-1, ranked.argmax(-1, keepdim=True), True) & free
