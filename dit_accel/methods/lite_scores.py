"""What LiteAttention's criteria see in every tile at some rows of each block row, and a threshold common to all layers.

For a target density: votes find out only what lies under one threshold, not how many tiles would.
"""

import torch
from torch import Tensor

from ..plan import AttentionPlan, Call
from .delta import probe_gaps

RECORDED_ROWS = 16
"""Rows of a block row at which scores are recorded; of 128 rows, an eighth of one Q K^T."""


def recorded_scores(plan: AttentionPlan, call: Call, criterion: str) -> Tensor:
    """Return the tiles' gaps (``maxgap``) or shares of the mass in log2 units, [B, H, NQ, NK], <= 0.

    Args:
        plan: the call's plan, with its tiles.
        call: its queries and keys.
        criterion: ``maxgap`` or ``mass``.
    """
    assert plan.tiles is not None
    tokens, order = call.heads_first(call.q).shape[2], plan.token_order
    rows = torch.arange(0, tokens, max(1, plan.tiles.block_q // RECORDED_ROWS), device=call.q.device)
    gaps, shares = probe_gaps(plan, call, rows if order is None else order[rows])
    return gaps if criterion == "maxgap" else shares.log2()
