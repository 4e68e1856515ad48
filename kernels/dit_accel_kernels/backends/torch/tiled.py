"""Cuts a problem into tiles for the torch backend: queries, keys and values by lane, pooled means, masks and decay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel_kernels.backends.torch.schedule import (
    Csr,
    GroupSize,
    Portion,
    Shape,
    Unit,
    build,
    build_portions,
    schedule,
    schedule_portions,
)
from dit_accel_kernels.features import decay_by_frame, tile_means, wide_dtype
from dit_accel_kernels.problem import Problem


@dataclass(slots=True)
class Tiled:
    """The problem cut into tiles for batched products: N lanes of R block rows that all read the same lists.

    Shared lists: N = B*H lanes, R = NQ. Per-head lists: one lane, R = B*H*NQ, tile numbers shifted by head. Queries
    hold the per-head scale, `scale` is still to be applied. `bias` is float32 [N, tiles, block_k], 0 or -inf, or None;
    `log_length` float32 [N or 1, tiles]; `t` [F + 2, NK, block_k].
    """

    q: Tensor  # [N, R, block_q, D]
    k: Tensor  # [N, tiles, block_k, D]
    v: Tensor
    bias: Tensor | None
    k_mean: Tensor | None  # [N, tiles, D]
    v_mean: Tensor | None
    log_length: Tensor | None
    length: Tensor | None  # [NK], where every lane has the same
    t: Tensor | None
    t_mean: Tensor | None  # [F + 2, NK]
    t_rows: Tensor | None  # int64 [NQ, block_q]
    scale: float
    key_tiles: int
    tail: int  # padded tokens in the last key tile


def cut(problem: Problem) -> Tiled:
    """Pad to whole tiles, apply the head scale, lay lanes out as the lists are shared, pool if a list asks for it."""
    q, k, v, valid = problem.q, problem.k, problem.v, problem.key_valid
    if problem.head_scale is not None:
        q = (q * problem.head_scale[:, :, None, None]).to(q.dtype)
    if valid is not None:
        k, v = (x.masked_fill(~valid[:, None, :, None], 0) for x in (k, v))
    weight = None if valid is None else valid[:, None].expand(-1, k.shape[1], -1)
    shared = problem.exact_offsets.shape[0] == 1
    repeat = q.shape[1] // k.shape[1]

    def lanes(x: Tensor) -> Tensor:
        x = x.repeat_interleave(repeat, 1) if shared and repeat > 1 else x
        return x.flatten(0, 1) if shared else x.flatten(0, 2)[None]

    k_mean = v_mean = log_length = same_length = None
    if problem.pooled_indices is not None:
        k_mean, length = tile_means(k, problem.block_k, weight)
        v_mean, _ = tile_means(v, problem.block_k, weight)
        same_length = length if weight is None else None
        log_length = lanes(length.expand(k_mean.shape[:-1]).log().to(wide_dtype(q.dtype)))
        k_mean, v_mean = lanes(k_mean), lanes(v_mean)
    bias = None
    if weight is not None:
        bias = torch.zeros(weight.shape, device=q.device).masked_fill(~weight, -torch.inf)
        bias = lanes(_tiles(bias[..., None], problem.block_k)[..., 0])
    t = t_mean = t_rows = None
    if problem.decay is not None:
        flat, rows = decay_by_frame(*problem.decay)
        t_mean = tile_means(flat[..., None], problem.block_k, None)[0][..., 0]
        t = _tiles(flat[..., None], problem.block_k)[..., 0]
        t_rows = _tiles(rows[:, None], problem.block_q)[..., 0]
    tiled_q, tiled_k, tiled_v = _tiles(q, problem.block_q), _tiles(k, problem.block_k), _tiles(v, problem.block_k)
    return Tiled(
        q=tiled_q.flatten(0, 1) if shared else tiled_q.flatten(0, 2)[None],
        k=lanes(tiled_k),
        v=lanes(tiled_v),
        bias=bias,
        k_mean=k_mean,
        v_mean=v_mean,
        log_length=log_length,
        length=same_length,
        t=t,
        t_mean=t_mean,
        t_rows=t_rows,
        scale=problem.logit_scale,
        key_tiles=problem.key_tiles,
        tail=problem.key_tiles * problem.block_k - k.shape[2],
    )


def _tiles(x: Tensor, block: int) -> Tensor:
    """[..., S, D] as contiguous [..., tiles, block, D], zero-padded in the last tile."""
    pad = -x.shape[-2] % block
    if pad:
        x = torch.nn.functional.pad(x, (0, 0, 0, pad))
    return x.contiguous().unflatten(-2, (-1, block))


def units_of(problem: Problem, *, remember: bool = True) -> list[Unit]:
    """Units of this problem's lists, from the cache; lists of one call only are not worth to `remember`."""
    heads = (0,) if problem.exact_offsets.shape[0] == 1 else key_heads(problem)
    return (schedule if remember else build)(*_lists(problem, heads))


def portions_of(problem: Problem, size: GroupSize, *, remember: bool = True) -> list[Portion]:
    """Portions of this problem's lists in all lanes, the lanes' rows and tiles one after the other, likewise."""
    shared = problem.exact_offsets.shape[0] == 1
    heads = tuple(range(problem.q.shape[0] * problem.q.shape[1])) if shared else key_heads(problem)
    return (schedule_portions if remember else build_portions)(*_lists(problem, heads), size)


def _lists(problem: Problem, heads: tuple[int, ...]) -> tuple[Csr, Csr, Shape]:
    tail = problem.key_tiles * problem.block_k - problem.k.shape[2]
    return (
        (problem.exact_offsets, problem.exact_indices),
        (problem.pooled_offsets, problem.pooled_indices),
        Shape(key_tiles=problem.key_tiles, block=problem.block_k, tail=tail, heads=heads),
    )


def key_heads(problem: Problem) -> tuple[int, ...]:
    """The key head of every batch and head, counted through all batches."""
    batch, heads, key_heads = problem.q.shape[0], problem.q.shape[1], problem.k.shape[1]
    return tuple(b * key_heads + h * key_heads // heads for b in range(batch) for h in range(heads))
