"""The pre-pass of pooled tiles: mean K and mean V of every key tile and the true length they were taken over.

Means rather than sums of V, with log2 of the length added to the logit: e^s sum(V) = e^(s + ln len) mean(V), and a mean
cannot overflow fp16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import Problem
from .loads import _keys

BLOCK_N = 64  # tokens read at once


@triton.jit
def _pool_kernel(
    k_ptr, v_ptr, token_order_ptr, valid_ptr, k_mean_ptr, v_mean_ptr, length_ptr,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, num_k, key_heads, k_tiles,
    TILE_K: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Means of one tile of one key head; [B, HK, NK, D] and [.., Dv], and length float32 [B, NK]."""
    program = tl.program_id(0)
    k_tile, bh = program % k_tiles, program // k_tiles
    b, h = (bh // key_heads).to(tl.int64), (bh % key_heads).to(tl.int64)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    columns, columns_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    k_sum = tl.zeros([BLOCK_D], tl.float32)
    v_sum = tl.zeros([BLOCK_DV], tl.float32)
    length = 0.0
    for first in range(0, TILE_K, BLOCK_N):
        offset = first + tl.arange(0, BLOCK_N)
        _, live, row = _keys(k_tile, offset, TILE_K, num_k, b, valid_ptr, token_order_ptr)
        row = row.to(tl.int64)[:, None]
        mask, mask_v = live[:, None] & (columns < DIM)[None, :], live[:, None] & (columns_v < DIM_V)[None, :]
        k_sum += tl.sum(tl.load(k_ptr + row * stride_ks + columns[None, :], mask=mask, other=0.0).to(tl.float32), 0)
        v_sum += tl.sum(tl.load(v_ptr + row * stride_vs + columns_v[None, :], mask=mask_v, other=0.0).to(tl.float32), 0)
        length += tl.sum(live.to(tl.float32), 0)
    counted = tl.maximum(length, 1.0)
    k_mean_ptr += program.to(tl.int64) * DIM
    v_mean_ptr += program.to(tl.int64) * DIM_V
    tl.store(k_mean_ptr + columns, (k_sum / counted).to(k_mean_ptr.dtype.element_ty), mask=columns < DIM)
    tl.store(v_mean_ptr + columns_v, (v_sum / counted).to(v_mean_ptr.dtype.element_ty), mask=columns_v < DIM_V)
    if h == 0:
        tl.store(length_ptr + b * k_tiles + k_tile, length)


def pool(problem: Problem, valid: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Mean K in `dtype`, [B, HK, NK, D], mean V in its own, [B, HK, NK, Dv], and true lengths, float32 [B, NK].

    K and V have contiguous rows; `valid` uint8 [B, S_k], in tiled order, are the keys that count (None: all).
    """
    k, v, tiles = problem.k, problem.v, problem.key_tiles
    batch, heads, tokens, dim = k.shape
    k_mean = k.new_empty(batch, heads, tiles, dim, dtype=dtype)
    v_mean = v.new_empty(batch, heads, tiles, v.shape[3])
    length = k.new_empty(batch, tiles, dtype=torch.float32)
    _pool_kernel[(batch * heads * tiles,)](
        k, v, problem.token_order, valid, k_mean, v_mean, length, *k.stride()[:3], *v.stride()[:3], tokens, heads,
        tiles, TILE_K=problem.block_k, BLOCK_N=BLOCK_N, DIM=dim, BLOCK_D=triton.next_power_of_2(dim), DIM_V=v.shape[3],
        BLOCK_DV=triton.next_power_of_2(v.shape[3]),
    )  # fmt: skip
    return k_mean, v_mean, length
