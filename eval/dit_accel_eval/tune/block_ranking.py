"""Which blocks a profile lets be cached: how they attend to the foreground, and how scores split them."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SCORES = 2**24
"""Logits that are held at a time."""


def attention_received(
    q: Tensor, k: Tensor, *, scale: float | None = None, key_mask: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    """Return what each key receives of the queries' attention, float32 [S], which sum to 1; no matrix is held.

    Source: ProfilingDiT (arXiv 2504.03140), a_i = mean_j A_ji of the row softmax A; mean over heads and batch too.
    """
    batch, heads, queries, size = q.shape
    looked = torch.arange(queries, device=q.device) if rows is None else rows
    factor = size**-0.5 if scale is None else scale
    chunk = max(1, SCORES // (heads * k.shape[2]))
    total = torch.zeros(k.shape[2], dtype=torch.float64, device=q.device)
    for b in range(batch):
        wide = k[b].repeat_interleave(heads // k.shape[1], 0).float()
        for part in looked.split(chunk):
            logits = (q[b, :, part].float() @ wide.mT) * factor
            if key_mask is not None:
                logits = logits.masked_fill(~key_mask[b], -torch.inf)
            total += logits.softmax(-1).mean(0).double().sum(0)
    return (total / (batch * len(looked))).float()


def foreground_ratio(received: np.ndarray, foreground: np.ndarray) -> float:
    """Return the share of the foreground's tokens that receive more attention than the mean token, mean over frames.

    Source: ProfilingDiT (arXiv 2504.03140), whose threshold is not published: here it is the mean.

    Returns:
        Not a number where there is no foreground.
    """
    high, own = received > received.mean(), foreground.reshape(len(foreground), -1)
    counts = own.sum(1)
    both = (high.reshape(own.shape) & own).sum(1)
    return float((both[counts > 0] / counts[counts > 0]).mean()) if counts.any() else float("nan")


def cached_blocks(scores: Sequence[float], count: int | None = None) -> tuple[list[int], float]:
    """Return the blocks of lowest scores, ``count`` or all below the largest gap, and the threshold above them."""
    known = sorted((score, block) for block, score in enumerate(scores) if score == score)
    if count is None:
        gaps = [two[0] - one[0] for one, two in itertools.pairwise(known)]
        count = 1 + int(np.argmax(gaps)) if gaps else 0
    edges = [one[0] for one in known[max(count - 1, 0) : count + 1]] or [0.0]
    return sorted(block for _, block in known[:count]), float(np.mean(edges))


def mean_of_known(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean of arrays, of what is a number; NaN where none is. They are cut to the shortest's steps."""
    steps = min(array.shape[-1] for array in arrays)
    stacked = np.stack([array[..., :steps] for array in arrays])
    known = ~np.isnan(stacked)
    return np.where(known.any(0), np.nansum(stacked, 0) / np.maximum(known.sum(0), 1), np.nan)


def mean_by_row(values: np.ndarray) -> np.ndarray:
    """Return the mean of each row, NaN where there is none."""
    return mean_of_known(list(values.T)) if values.size else np.full(len(values), np.nan)
