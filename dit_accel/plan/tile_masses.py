"""How the softmax mass of dense attention spreads over tiles: what patterns that are measured once choose by.

Every logit is computed once more, some query tiles at a time: memory is linear in S, on any device, no gradients.
"""

from collections.abc import Iterator

import torch
from dit_accel_kernels.features import product_dtype, split_tiles, wide_dtype
from torch import Tensor

CHUNK = 1 << 22  # logits at a time


@torch.no_grad()
def tile_masses(
    q: Tensor,
    k: Tensor,
    *,
    block_q: int,
    block_k: int,
    scale: float | None = None,
    token_order: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Softmax mass of each key tile under dense attention, mean over the queries of a query tile, [B, H, NQ, NK].

    A query tile's masses sum to 1; queries without a valid key count as 0. Source: SparseD (arXiv 2509.24014), which
    averages over the cells of the last tiles whether or not they are full.

    Args:
        q: [B, H, S_q, D], after positions.
        k: like q with S_k tokens and any number of heads that divides H.
        token_order: int64 [S], position in the tiled order -> token index (S_q = S_k).
        key_mask: bool [B, S_k], True where a key is valid, in the caller's order.

    Returns:
        float32 [B, H, NQ, NK] (float64 for float64).
    """
    if token_order is not None:
        q, k = q.index_select(2, token_order), k.index_select(2, token_order)
        key_mask = None if key_mask is None else key_mask.index_select(1, token_order)
    parts = []
    for x in _logits(q, k, scale, block_q, key_mask):
        peak = x.amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).min)  # a row without a key
        of_rows = split_tiles(x.sub_(peak).exp_(), 3, block_k, 0.0).sum(-1)
        of_rows /= of_rows.sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        rows = split_tiles(torch.ones(x.shape[2], device=x.device, dtype=x.dtype), 0, block_q, 0.0).sum(-1)
        parts.append(split_tiles(of_rows, 2, block_q, 0.0).sum(3) / rows[:, None])
    return torch.cat(parts, 2)


def _logits(q: Tensor, k: Tensor, scale: float | None, block_q: int, key_mask: Tensor | None) -> Iterator[Tensor]:
    """Natural logits of some whole query tiles at a time, [B, H, rows, S_k] in float32."""
    wide, multiplied = wide_dtype(q.dtype), product_dtype(q.dtype, q.device.type)
    k = k.to(multiplied).repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    size = q.shape[0] * q.shape[1] * k.shape[3] * block_q
    step = block_q * -(-CHUNK // size)
    for start in range(0, q.shape[2], step):
        rows = q[:, :, start : start + step].to(multiplied)
        x = (rows @ k).to(wide).mul_(q.shape[3] ** -0.5 if scale is None else scale)
        if key_mask is not None:
            x.masked_fill_(~key_mask[:, None, None], -torch.inf)
        yield x
