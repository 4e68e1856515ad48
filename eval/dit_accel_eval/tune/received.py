"""How much attention each token receives: the column means of the softmax, streamed, never held as a matrix."""

import torch
from torch import Tensor

SCORES = 2**24
"""Logits that are held at a time."""


def attention_received(
    q: Tensor, k: Tensor, *, scale: float | None = None, key_mask: Tensor | None = None, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what each key receives of the queries' attention, mean over queries, heads and batch, and its error.

    Source: ProfilingDiT (arXiv 2504.03140), a_i = mean_j A_ji of the row softmax A.

    Args:
        q: queries [B, H, S, D].
        k: keys [B, H or fewer, S, D].
        scale: factor on the logits; None: 1 / sqrt(D).
        key_mask: bool [B, S], True for a valid key; None: all.
        rows: int64, the queries that are looked at; None: all, which is exact.

    Returns:
        float32 [S] each: the means, which sum to 1, and their standard errors, 0 without ``rows``.
    """
    (batch, heads, queries, size), keys = q.shape, k.shape[2]
    looked = torch.arange(queries, device=q.device) if rows is None else rows
    factor = size**-0.5 if scale is None else scale
    chunk = max(1, SCORES // (heads * keys))
    total = torch.zeros(keys, dtype=torch.float64, device=q.device)
    squares = torch.zeros_like(total)
    for b in range(batch):
        wide = k[b].repeat_interleave(heads // k.shape[1], 0).float()
        for start in range(0, len(looked), chunk):
            logits = (q[b, :, looked[start : start + chunk]].float() @ wide.mT) * factor
            if key_mask is not None:
                logits = logits.masked_fill(~key_mask[b], -torch.inf)
            shares = logits.softmax(-1).mean(0).double()
            total += shares.sum(0)
            squares += shares.square().sum(0)
    count = batch * len(looked)
    mean = total / count
    if rows is None or count < 2:
        return mean.float(), torch.zeros(keys, device=q.device)
    spread = (squares / count - mean.square()).clamp(min=0) * count / (count - 1)
    left = 1 - len(looked) / queries
    return mean.float(), (spread * left / count).sqrt().float()
