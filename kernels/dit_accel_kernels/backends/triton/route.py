"""Routing on Triton: query tiles' thresholds on pooled logits, as bits of the tiles above them (Sol-Attn, 2607.24027).

The released kernels route inside the attention loop, by column means of all query rows' products with pooled keys.
That mean over a tile's rows is mean(Q) . mean(K), so this pre-pass needs 1 / block_q of those products; the attention
loops stay free of branches and of an order, block_q may be anything, and keep bits, masks and decay compose. Three
kernels: mean queries, statistics of the mean keys' channels, and scores, which never leave the program. The
specification is `routing_scores` in states.py; sums are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...bits import unpack_bits, word_count
from ...problem import Problem
from ...selection import LOG2_E, Routing
from .launch import column_block
from .loads import _load_part, _tokens
from .plan import scale_stride

BLOCK_N = 64  # tokens or tiles that are averaged at once
BLOCK_ROWS = 16  # query tiles that one program routes
NUM_STAGES = 2


@triton.jit(do_not_specialize=("num_q", "heads", "q_tiles"))
def _query_mean_kernel(
    q_ptr, token_order_ptr, mean_ptr,  # [B, H, S_q, D] by strides, [S] or None, fp32 [B, H, NQ, D]
    stride_qb, stride_qh, stride_qs, num_q, heads, q_tiles,
    TILE_Q: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean query of one query tile of one head."""
    program = tl.program_id(0)
    bh, q_tile = program // q_tiles, program % q_tiles
    q_ptr += (bh // heads).to(tl.int64) * stride_qb + (bh % heads).to(tl.int64) * stride_qh
    columns = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, TILE_Q, BLOCK_N):
        offset = first + tl.arange(0, BLOCK_N)
        _, live, q_row = _tokens(q_tile, offset, TILE_Q, num_q, token_order_ptr)
        q = _load_part(q_ptr, q_row, live, stride_qs, True, 0, BLOCK_D, DIM)
        total += tl.sum(q.to(tl.float32), 0)
    length = tl.minimum(num_q - q_tile * TILE_Q, TILE_Q).to(tl.float32)
    tl.store(mean_ptr + program.to(tl.int64) * DIM + columns, total / length, mask=columns < DIM)


@triton.jit
def _weights(length_ptr, pinned_ptr, k_tile, inside):
    """1 for the tiles that count in a row's mean and variance: those that have a valid key, pinned ones aside."""
    counts = tl.load(length_ptr + k_tile, mask=inside, other=0.0) > 0
    if pinned_ptr is not None:
        counts &= tl.load(pinned_ptr + k_tile, mask=inside, other=1) == 0
    return counts.to(tl.float32)


@triton.jit
def _mean_keys(k_mean_ptr, k_tile, inside, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Some mean keys in float32, zero beyond the last."""
    columns = tl.arange(0, BLOCK_D)
    ptrs = k_mean_ptr + k_tile[:, None] * DIM + columns[None, :]
    return tl.load(ptrs, mask=inside[:, None] & (columns < DIM)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=("key_heads", "k_tiles"))
def _key_statistics_kernel(
    k_mean_ptr, length_ptr, pinned_ptr,  # [B, HK, NK, D], [B, NK], uint8 [NK] or None
    centre_ptr, variance_ptr,  # fp32 [B, HK, D]
    key_heads, k_tiles, BLOCK_N: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean and variance of every channel of one key head's mean keys."""
    bh = tl.program_id(0).to(tl.int64)
    length_ptr += bh // key_heads * k_tiles
    k_mean_ptr += bh * k_tiles * DIM
    columns = tl.arange(0, BLOCK_D)
    number = 0.0
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, k_tiles, BLOCK_N):
        k_tile = first + tl.arange(0, BLOCK_N)
        weight = _weights(length_ptr, pinned_ptr, k_tile, k_tile < k_tiles)
        number += tl.sum(weight, 0)
        total += tl.sum(_mean_keys(k_mean_ptr, k_tile, k_tile < k_tiles, DIM, BLOCK_D) * weight[:, None], 0)
    number = tl.maximum(number, 1.0)
    centre = total / number
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, k_tiles, BLOCK_N):
        k_tile = first + tl.arange(0, BLOCK_N)
        weight = _weights(length_ptr, pinned_ptr, k_tile, k_tile < k_tiles)
        gap = _mean_keys(k_mean_ptr, k_tile, k_tile < k_tiles, DIM, BLOCK_D) - centre[None, :]
        total += tl.sum(gap * gap * weight[:, None], 0)
    tl.store(centre_ptr + bh * DIM + columns, centre, mask=columns < DIM)
    tl.store(variance_ptr + bh * DIM + columns, total / number, mask=columns < DIM)


@triton.jit(do_not_specialize=("stride_hb", "heads", "key_heads", "q_tiles", "k_tiles"))
def _route_kernel(
    q_mean_ptr, k_mean_ptr, length_ptr, pinned_ptr, centre_ptr, variance_ptr, head_scale_ptr, bits_ptr,
    stride_hb, heads, key_heads, q_tiles, k_tiles, scale, beta,
    BLOCK_R: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Bits int32 [B, H, NQ, W] of the tiles above their query tile's threshold, for BLOCK_R query tiles of one head.

    EXACT takes the variance from the scores themselves, in a pass of its own, instead of the mean keys' channels.
    """
    blocks = (q_tiles + BLOCK_R - 1) // BLOCK_R
    bh = tl.program_id(0) // blocks
    b, h = bh // heads, bh % heads
    key_bh = (b * key_heads + h // (heads // key_heads)).to(tl.int64)
    length_ptr += b.to(tl.int64) * k_tiles
    k_mean_ptr += key_bh * k_tiles * DIM
    words = (k_tiles + 31) // 32
    columns = tl.arange(0, BLOCK_D)
    q_tile = tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    row = bh.to(tl.int64) * q_tiles + q_tile
    live = q_tile < q_tiles
    mask = live[:, None] & (columns < DIM)[None, :]
    q = tl.load(q_mean_ptr + row[:, None] * DIM + columns[None, :], mask=mask, other=0.0)
    if head_scale_ptr is not None:
        q *= tl.load(head_scale_ptr + b * stride_hb + h)
    q *= scale
    centre = tl.load(centre_ptr + key_bh * DIM + columns, mask=columns < DIM, other=0.0)
    mean = tl.sum(q * centre[None, :], 1)
    bit = tl.arange(0, 32)
    if EXACT:
        variance = tl.zeros([BLOCK_R], tl.float32)
        number = 0.0
        for word in range(0, words):
            k_tile = word * 32 + bit
            k = _mean_keys(k_mean_ptr, k_tile, k_tile < k_tiles, DIM, BLOCK_D)
            gap = tl.dot(q, tl.trans(k), input_precision=PRECISION) - mean[:, None]
            weight = _weights(length_ptr, pinned_ptr, k_tile, k_tile < k_tiles)
            variance += tl.sum(gap * gap * weight[None, :], 1)
            number += tl.sum(weight, 0)
        variance /= tl.maximum(number, 1.0)
    else:
        spread = tl.load(variance_ptr + key_bh * DIM + columns, mask=columns < DIM, other=0.0)
        variance = tl.sum(q * q * spread[None, :], 1)
    threshold = mean + beta * tl.sqrt(variance + 1e-6)
    for word in range(0, words):
        k_tile = word * 32 + bit
        k = _mean_keys(k_mean_ptr, k_tile, k_tile < k_tiles, DIM, BLOCK_D)
        above = tl.dot(q, tl.trans(k), input_precision=PRECISION) > threshold[:, None]
        above &= (k_tile < k_tiles)[None, :]
        chosen = tl.sum(above.to(tl.int32) << bit[None, :], 1)
        tl.store(bits_ptr + row * words + word, chosen, mask=live)


def route(problem: Problem, routing: Routing, k_mean: Tensor, length: Tensor, precision: str) -> Tensor:
    """Bits int32 [B, H, NQ, W] of the tiles whose score exceeds their row's threshold, pinned or not.

    The call is in the caller's token order, q with contiguous rows; `k_mean` [B, HK, NK, D] are mean keys in q's dtype,
    `length` float32 [B, NK] the valid keys of each tile, `precision` is Triton's for products of float32.
    """
    assert problem.selection is not None
    q, pinned = problem.q, problem.selection.pinned
    batch, heads, num_q, dim = q.shape
    key_heads, q_tiles, k_tiles = k_mean.shape[1], problem.query_tiles, problem.key_tiles
    block_d = column_block(dim)
    if pinned is not None:  # uint8 [NK]: in every query tile
        pinned = unpack_bits(pinned, k_tiles).all(0).to(torch.uint8)
    q_mean = q.new_empty(batch, heads, q_tiles, dim, dtype=torch.float32)
    centre, variance = (q.new_empty(batch, key_heads, dim, dtype=torch.float32) for _ in range(2))
    bits = torch.empty(batch, heads, q_tiles, word_count(k_tiles), dtype=torch.int32, device=q.device)
    _query_mean_kernel[(batch * heads * q_tiles,)](
        q, problem.token_order, q_mean, *q.stride()[:3], num_q, heads, q_tiles,
        TILE_Q=problem.block_q, BLOCK_N=BLOCK_N, DIM=dim, BLOCK_D=block_d,
    )  # fmt: skip
    _key_statistics_kernel[(batch * key_heads,)](
        k_mean, length, pinned, centre, variance, key_heads, k_tiles,
        BLOCK_N=BLOCK_N, DIM=dim, BLOCK_D=block_d,
    )  # fmt: skip
    _route_kernel[(batch * heads * triton.cdiv(q_tiles, BLOCK_ROWS),)](
        q_mean, k_mean, length, pinned, centre, variance, problem.head_scale, bits,
        scale_stride(problem), heads, key_heads, q_tiles, k_tiles,
        problem.scale * LOG2_E, float(routing.beta),
        BLOCK_R=BLOCK_ROWS, DIM=dim, BLOCK_D=block_d, EXACT=routing.threshold == "exact", PRECISION=precision,
        num_stages=NUM_STAGES,
    )  # fmt: skip
    return bits
