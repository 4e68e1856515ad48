"""What some query rows see in every key tile of a plan: logit gaps and shares of the softmax mass."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .call import Call
from .plan import AttentionPlan

LOG2_E = 1.4426950408889634
PROBE_SCORES = 2**26
"""Logits that the probes of one head hold at a time."""


def probe_gaps(plan: AttentionPlan, call: Call, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return what some query rows see in every key tile of a plan, the largest of each block row.

    ``rows``: int64 [G], token indices of the probes.

    Returns:
        Gaps, float32 (float64 for float64) [B, H, NQ, NK]: a tile's largest logit minus its row's over all keys, in
        log2 units, the largest over the block row's probe rows; -inf where the block row has none, or the tile no valid
        key. And the same for a tile's share of the row's softmax mass; 0 instead of -inf.
    """
    tiles, order = plan.tiles, plan.token_order
    assert tiles is not None
    q, k = call.q.index_select(2, rows), call.k
    (batch, heads), keys = q.shape[:2], k.shape[2]
    position = rows
    if order is not None:
        k = k.index_select(2, order)
        position = torch.empty_like(order).index_copy_(0, order, torch.arange(keys, device=order.device))[rows]
    wide = torch.promote_types(q.dtype, torch.float32)
    shape = (batch, heads, tiles.query_tiles, tiles.key_tiles)
    gaps = torch.full(shape, -torch.inf, dtype=wide, device=q.device)
    shares = torch.zeros(shape, dtype=wide, device=q.device)
    for b, h, part, x in _probe_logits(plan, call, q, k, rows):
        x = torch.nn.functional.pad(x, (0, -keys % tiles.block_k), value=-torch.inf).unflatten(-1, (-1, tiles.block_k))
        top = x.amax(-1)
        peak = top.amax(-1, keepdim=True).clamp(min=torch.finfo(wide).min)  # a row without a valid key
        mass = (x - peak[..., None]).exp2().sum(-1)
        block_row = position[part] // tiles.block_q
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
    # heads share keys, and few rows at a time keep the logits small
    repeat, step = q.shape[1] // k.shape[1], -(-PROBE_SCORES // k.shape[2])
    factor = None if plan.head_scale is None else plan.head_scale.to(wide).reshape(-1, q.shape[1])
    k_frames = None if decay is None else decay.k_frames if order is None else decay.k_frames[order]
    for start in range(0, len(rows), step):
        part, t = slice(start, start + step), None
        if decay is not None and k_frames is not None:
            q_frames = decay.q_frames[rows[part]]
            distance = (q_frames[:, None] - k_frames).abs().clamp(max=decay.table.numel() - 1)
            outside = (q_frames < 0)[:, None] | (k_frames < 0)  # text is in no frame
            t = decay.table[distance.long()].to(wide).masked_fill(outside, 1.0)
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                x = (q[b, h, part] @ k[b, h // repeat].mT).to(wide) * scale
                if factor is not None:
                    x = x * factor[b if len(factor) > 1 else 0, h]
                x = x if t is None else torch.minimum(x, t * x)  # a decay would raise what is below 0
                yield b, h, part, x if invalid is None else x.masked_fill(invalid[b], -torch.inf)
