"""Cuts a problem into tiles for the torch backend: queries, keys and values, pooled means, masks and decay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...cache import readable
from ...features import decay_by_frame, product_dtype, split_tiles, tile_means, wide_dtype
from ...problem import Problem
from .memory import cast


@dataclass(slots=True)
class Tiled:
    """The problem cut into tiles, those of all batches and heads one after the other.

    NQ query tiles for each of B * H batches and heads, NK key tiles for each of B * HK. Queries hold the per-head
    scale, `scale` is still to be applied.
    """

    q: Tensor  # [B * H * NQ, block_q, D]
    k: Tensor  # [B * HK * NK, block_k, D]
    v: Tensor  # its head dim, like that of v_mean, is its own
    absent: Tensor | None  # bool [B * HK * NK, block_k], the keys that a mask leaves out
    bits: Tensor | None  # int32 [M, block_q, ceil(block_k / 32)], the masks inside tiles
    finite: bool  # whether keys and values are known to be numbers; looked at on a CPU, for masks inside tiles
    k_mean: Tensor | None  # [B * HK * NK, D]
    v_mean: Tensor | None
    log_length: Tensor | None  # [B * HK * NK], natural log of a pooled tile's length
    t: Tensor | None  # [(F + 2) * NK, block_k], decay by frame of the queries
    t_mean: Tensor | None  # [(F + 2) * NK]
    frames: Tensor | None  # int64 [NQ, block_q], each query's frame in `t`
    one_frame: Tensor | None  # bool [NQ], whether it is that of all queries of the tile
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
    rest = (*pools(problem, k, v), *decays(problem, dtype), problem.scale, problem.key_tiles)
    return Tiled(*tiles, absent, problem.mask_bits, finite, *rest)


def pools(problem: Problem, k: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`k_mean`, `v_mean` and `log_length` of `Tiled`, in k's dtype; None where no list pools."""
    if problem.pooled_indices is None:
        return None, None, None
    valid = problem.key_valid
    weight = None if valid is None else valid[:, None].expand(-1, k.shape[1], -1)
    k_mean, length = tile_means(k, problem.block_k, weight)
    v_mean, _ = tile_means(v, problem.block_k, weight)
    log_length = length.log().to(wide_dtype(k.dtype)).expand(k_mean.shape[:-1]).flatten()
    return k_mean.flatten(0, 2), v_mean.flatten(0, 2), log_length


def decays(problem: Problem, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`t`, `t_mean`, `frames` and `one_frame` of `Tiled`; None in calls without decay."""
    if problem.decay is None:
        return None, None, None, None
    by_frame, frames = decay_by_frame(*problem.decay)
    t_mean = tile_means(by_frame[..., None].to(wide_dtype(dtype)), problem.block_k, None)[0].flatten()
    t = tiles_in_order(by_frame[..., None], problem.block_k)[..., 0]
    frames = torch.cat([frames, frames[-1:].expand(-len(frames) % problem.block_q)]).view(-1, problem.block_q)
    return t, t_mean, frames, (frames == frames[:, :1]).all(1)


def tiles_in_order(x: Tensor, block: int) -> Tensor:
    """[..., S, D] as contiguous tiles one after the other, [N, block, D], zero-padded in the last of each S."""
    return split_tiles(x, x.dim() - 2, block).contiguous().view(-1, block, x.shape[-1])
