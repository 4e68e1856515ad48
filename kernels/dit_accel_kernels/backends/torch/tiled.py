"""Cuts a problem into tiles for the torch backend: queries, keys and values, pooled means, masks and decay."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...cache import readable
from ...features import decay_by_frame, product_dtype, split_tiles, tile_means, wide_dtype
from ...problem import Problem
from .memory import cast


class Means(NamedTuple):
    """Means of all key tiles of B * HK batches and key heads, and what goes with them."""

    k: Tensor  # [B * HK * NK, D]
    v: Tensor
    log_length: Tensor  # [B * HK * NK], natural log of a pooled tile's length


class Decay(NamedTuple):
    """Decay by frame of the queries."""

    by_token: Tensor  # [(F + 2) * NK, block_k]
    by_tile: Tensor  # [(F + 2) * NK], the mean
    frames: Tensor  # int64 [NQ, block_q], each query's frame in both


@dataclass(slots=True)
class Tiled:
    """The problem cut into tiles, those of all batches and heads one after the other.

    NQ query tiles for each of B * H batches and heads, NK key tiles for each of B * HK. Queries hold the per-head
    scale, `scale` is still to be applied.
    """

    q: Tensor  # [B * H * NQ, block_q, D]
    k: Tensor  # [B * HK * NK, block_k, D]
    v: Tensor  # its head dim is its own
    absent: Tensor | None  # bool [B * HK * NK, block_k], the keys that a mask leaves out
    bits: Tensor | None  # int32 [M, block_q, ceil(block_k / 32)], the masks inside tiles
    finite: bool  # whether keys and values are known to be numbers; looked at on a CPU, for masks inside tiles
    means: Means | None
    decay: Decay | None
    scale: float
    key_tiles: int


def in_tiles(problem: Problem) -> Tiled:
    """Pad to whole tiles, apply the head scale, pool if a list asks for it; in the dtype that multiplies fastest."""
    dtype, valid = product_dtype(problem.q.dtype, problem.q.device.type), problem.key_valid
    q, k, v = (cast(x, dtype) for x in (problem.q, problem.k, problem.v))
    if problem.head_scale is not None:
        q = (q * problem.head_scale[:, :, None, None]).to(dtype)
    absent = None
    if valid is not None:
        k, v = (x.masked_fill(~valid[:, None, :, None], 0) for x in (k, v))
        absent = tiles_in_order(~valid[:, None, :, None].expand(-1, k.shape[1], -1, -1), problem.block_k)[..., 0]
    finite = problem.mask_bits is not None and readable(v.device) and all(bool(x.isfinite().all()) for x in (k, v))
    tiles = tiles_in_order(q, problem.block_q), tiles_in_order(k, problem.block_k), tiles_in_order(v, problem.block_k)
    means = None if problem.pooled_indices is None else pools(problem, k, v)
    decay = None if problem.decay is None else decays(problem, dtype)
    return Tiled(*tiles, absent, problem.mask_bits, finite, means, decay, problem.scale, problem.key_tiles)


def pools(problem: Problem, k: Tensor, v: Tensor) -> Means:
    """The means of a call, in k's dtype."""
    valid = problem.key_valid
    weight = None if valid is None else valid[:, None].expand(-1, k.shape[1], -1)
    k_mean, length = tile_means(k, problem.block_k, weight)
    v_mean, _ = tile_means(v, problem.block_k, weight)
    log_length = length.log().to(wide_dtype(k.dtype)).expand(k_mean.shape[:-1]).flatten()
    return Means(k_mean.flatten(0, 2), v_mean.flatten(0, 2), log_length)


def decays(problem: Problem, dtype: torch.dtype) -> Decay:
    """The decay of a call that has some; means in the wide dtype of this one."""
    assert problem.decay is not None
    by_frame, frames = decay_by_frame(*problem.decay)
    by_tile = tile_means(by_frame[..., None].to(wide_dtype(dtype)), problem.block_k, None)[0].flatten()
    by_token = tiles_in_order(by_frame[..., None], problem.block_k)[..., 0]
    frames = torch.cat([frames, frames[-1:].expand(-len(frames) % problem.block_q)]).view(-1, problem.block_q)
    return Decay(by_token, by_tile, frames)


def tiles_in_order(x: Tensor, block: int) -> Tensor:
    """[..., S, D] as contiguous tiles one after the other, [N, block, D], zero-padded in the last of each S."""
    return split_tiles(x, x.dim() - 2, block).contiguous().view(-1, block, x.shape[-1])
