"""Queries and keys in eight bits, as torch computes them: what the reference simulates and kernels are tested against.

A query row has a scale of its own, a key tile one for its tokens, a pooled tile's mean key likewise: the largest
magnitude becomes the largest number of the format. Before that the mean of a head's valid keys is subtracted from them
(`centre_of`), which makes the scales finer and changes a row's logits by one constant, which the LSE gets back. With
frame decay keys stay where they are, since it compares logits with 0. Routing reads q and k as they are.
Source: SageAttention, arXiv 2410.02367, 4.2; there a scale is for a block of queries.
"""

from typing import Literal

import torch
from torch import Tensor

from .features import split_tiles

Precision = Literal["int8", "fp8"]
PRECISIONS: tuple[Precision, ...] = ("int8", "fp8")
LARGEST = {"int8": 127.0, "fp8": 448.0}
LEAST = 1e-30  # magnitude below which a row or tile counts as so large, that zeros have a scale


def centre_of(k_mean: Tensor, length: Tensor) -> Tensor:
    """Mean of a head's valid keys, [B, HK, 1, D] in float32 or wider, from those of its tiles.

    `k_mean` is [B, HK, NK, D], `length` float [NK], [B, NK] or [B, 1, NK], the tokens that each was taken over.
    """
    length = length.to(torch.promote_types(k_mean.dtype, torch.float32)).reshape(-1, 1, k_mean.shape[2], 1)
    return (k_mean * length).sum(2, keepdim=True) / length.sum(2, keepdim=True).clamp(min=1)


def rounded(x: Tensor, precision: str, block: int = 1) -> Tensor:
    """x [B, H, S, D] as its eight bits and the scales of its blocks of rows give it, float32 or wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = split_tiles(x, 2, block).abs().amax((-2, -1)).clamp(min=LEAST) / LARGEST[precision]
    scale = scale.repeat_interleave(block, 2)[:, :, : x.shape[2], None]
    small = x / scale
    return scale * ((small + 0.5).floor() if precision == "int8" else small.to(torch.float8_e4m3fn).to(x.dtype))
