"""Queries and keys in eight bits on Triton: keys and mean keys before the forward, queries inside it.

The formulas and what they are for are those of precision.py. Eight bits lie where the keys themselves would, in the
caller's order; their scales follow the tiled one.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...precision import centre_of
from ...problem import Problem
from .launch import eight_bit_number
from .loads import _load, _tokens, _valid

BLOCK_N = 64  # tokens read at once
Means = tuple[Tensor, Tensor, Tensor]
Scales = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of keys and of mean keys, float32 [B, HK, NK] each, and what was subtracted from both, [B, HK, 1, D]; or None."""


@triton.jit
def _scale_of(top, NUMBER: tl.constexpr):
    """The scale of numbers whose largest magnitude this is."""
    return tl.maximum(top, 1e-30) / (127.0 if NUMBER.is_int() else (448.0 if NUMBER.is_fp8e4nv() else 240.0))


@triton.jit
def _small(x, scale, NUMBER: tl.constexpr):
    """Float32 numbers over their scale, in eight bits; zeros where that is no number."""
    x /= scale
    x = tl.where(x == x, x, 0.0)
    return (tl.floor(x + 0.5) if NUMBER.is_int() else x).to(NUMBER)


@triton.jit
def _scaled_queries(
    ptr, rows, live, stride, scale, DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, k_ptr, k_scale_ptr
):  # fmt: skip
    """Query rows in two column parts with the sign of the scale, for max(|s| x) = |s| max(x), and |s|.

    Where keys have a scale, rows are in the keys' eight bits, and |s| has the scale of each row, [BLOCK_Q], NaN where
    the row is not finite: a maximum leaves NaN out, and no integer is one, so a sum of zeros is there for it.
    """
    q1, q2 = _load(ptr, rows, live, stride, True, DIM, D1, D2)
    sign = tl.where(scale < 0, -1.0, 1.0)
    scale *= sign
    q1 = (q1.to(tl.float32) * sign).to(q1.dtype)
    if D2 > 0:
        q2 = (q2.to(tl.float32) * sign).to(q2.dtype)
    if k_scale_ptr is not None:
        NUMBER: tl.constexpr = k_ptr.dtype.element_ty
        q1 = q1.to(tl.float32)
        top, bad = tl.max(tl.abs(q1), 1), tl.sum(q1 * 0.0, 1)
        if D2 > 0:
            q2 = q2.to(tl.float32)
            top, bad = tl.maximum(top, tl.max(tl.abs(q2), 1)), bad + tl.sum(q2 * 0.0, 1)
        of_row = _scale_of(top, NUMBER)
        q1, q2 = _small(q1, of_row[:, None], NUMBER), _small(q2, of_row[:, None], NUMBER) if D2 > 0 else q2
        scale *= of_row + bad
    return q1, q2, scale


@triton.jit
def _with_keys(scale, scale_ptr, tile):
    """The logits' scale, one for each row, with that of a key tile of a key head; as it is without eight bits."""
    if scale_ptr is not None:
        scale *= tl.load(scale_ptr + tile)
    return scale


@triton.jit
def _with_means(scale, scale_ptr, bhk, k_tile, k_tiles):
    """What logits of mean keys are multiplied by: the scale, and with eight bits that of each key tile."""
    scale = _beside(scale)
    if scale_ptr is not None:
        scale *= tl.load(scale_ptr + bhk * k_tiles + k_tile, mask=k_tile < k_tiles, other=0.0)[None, :]
    return scale


@triton.jit
def _beside(scale):
    """A scale as logits [BLOCK_Q, *] are multiplied by it, be it one for all of them or one for each row."""
    return scale[:, None] if len(scale.shape) == 1 else scale


@triton.jit
def _with_centre(
    x, q_ptr, centre_ptr, bhk, rows, live, stride, scale, DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr
):  # fmt: skip
    """Logits of query rows, which are read anew, with the product of what was subtracted from the keys, if anything."""
    if centre_ptr is not None:
        q1, q2 = _load(q_ptr, rows, live, stride, True, DIM, D1, D2)
        c1, c2 = _load(centre_ptr + bhk * DIM, rows, live, 0, True, DIM, D1, D2)
        product = tl.sum(q1.to(tl.float32) * c1, 1)
        x += (product + tl.sum(q2.to(tl.float32) * c2, 1) if D2 > 0 else product) * scale
    return x


@triton.jit
def _quantise_kernel(
    k_ptr, token_order_ptr, valid_ptr, centre_ptr, out_ptr, scale_ptr,
    stride_kb, stride_kh, stride_ks, stride_ob, stride_oh, stride_os, num_k, key_heads, k_tiles,
    TILE_K: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The eight bits of one tile of one key head, where its tokens lie, and its scale; invalid keys are zeros."""
    NUMBER: tl.constexpr = out_ptr.dtype.element_ty
    program = tl.program_id(0)
    k_tile, bh = program % k_tiles, program // k_tiles
    b, h = (bh // key_heads).to(tl.int64), (bh % key_heads).to(tl.int64)
    k_ptr += b * stride_kb + h * stride_kh
    out_ptr += b * stride_ob + h * stride_oh
    columns = tl.arange(0, BLOCK_D)
    centre = tl.zeros([BLOCK_D], tl.float32)
    if centre_ptr is not None:
        centre += tl.load(centre_ptr + bh.to(tl.int64) * DIM + columns, mask=columns < DIM, other=0.0)
    top, bad, scale = 0.0, 0.0, 1.0
    for turn in tl.static_range(2):  # first the scale, then what it gives
        for first in range(0, TILE_K, BLOCK_N):
            offset = first + tl.arange(0, BLOCK_N)
            token, here, row = _tokens(k_tile, offset, TILE_K, num_k, token_order_ptr)
            live, row = _valid(valid_ptr, b, num_k, token, here), row.to(tl.int64)[:, None]
            inside = (columns < DIM)[None, :]
            x = tl.load(k_ptr + row * stride_ks + columns[None, :], mask=live[:, None] & inside, other=0.0)
            x = tl.where(live[:, None], x.to(tl.float32) - centre[None, :], 0.0)
            if turn == 0:
                top, bad = tl.maximum(top, tl.max(tl.abs(x))), bad + tl.sum(x * 0.0)
            else:
                ptrs = out_ptr + row * stride_os + columns[None, :]
                tl.store(ptrs, _small(x, scale, NUMBER), mask=here[:, None] & inside)
        scale = _scale_of(top, NUMBER)
    tl.store(scale_ptr + program, scale + bad)


def eight_bits(
    problem: Problem, means: Means | None, valid: Tensor | None, arch: str
) -> tuple[Problem, Means | None, Scales]:
    """A call and its pooled tiles, if any, with keys and mean keys in eight bits, and their scales.

    The problem is in the caller's token order, the means are `pool`'s, `valid` are the keys that count, uint8 [B, S_k]
    in tiled order. Nothing waits for the device.
    """
    number = eight_bit_number(arch, problem.precision or "")
    assert means is not None
    assert number is not None
    centre = None if problem.decay is not None else centre_of(means[0], means[2]).contiguous()
    k, k_scale = _quantise(problem.k, problem.block_k, problem.token_order, valid, centre, number)
    problem = replace(problem, k=k)
    if not problem.may_pool:
        return problem, None, (k_scale, None, centre)
    k_mean, mean_scale = _quantise(means[0], 1, None, None, centre, number)
    return problem, (k_mean, *means[1:]), (k_scale, mean_scale, centre)


def _quantise(
    k: Tensor, tile: int, order: Tensor | None, valid: Tensor | None, centre: Tensor | None, number: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys [B, HK, S, D] less the centre in eight bits, laid out like them, and their tiles' scales [B, HK, tiles]."""
    batch, heads, tokens, dim = k.shape
    tiles = -(-tokens // tile)
    out, scale = torch.empty_like(k, dtype=number), k.new_empty(batch, heads, tiles, dtype=torch.float32)
    _quantise_kernel[(batch * heads * tiles,)](
        k, order, valid, centre, out, scale, *k.stride()[:3], *out.stride()[:3], tokens, heads, tiles,
        TILE_K=tile, BLOCK_N=min(BLOCK_N, triton.next_power_of_2(tile)), DIM=dim, BLOCK_D=triton.next_power_of_2(dim),
    )  # fmt: skip
    return out, scale
