"""Gradients through tile lists on Triton: of Q along query tiles, of K and V along key tiles, without atomics.

Four launches. A pre-pass forms delta = sum(out * grad_out) - grad_lse for every query row, in float32 without rounding
in between: where one key has nearly all weight, grad_out v' - delta is a small difference of large numbers. One
program then owns a block of rows of grad_q, and another a block of rows of grad_k and grad_v, summing over the query
heads that share its key head: every number is written once, by one program that adds in a fixed order, so gradients are
deterministic by construction. Pooled columns get their gradients in a kernel of their own, 32 tiles at a time over a
bitmap of the lists; where grad_k and grad_v are written they are spread over the tile's valid tokens by true length.
"""

# Device code is typed by Triton's compiler:
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import Problem
from ...selection import LOG2_E, narrows
from .attend import check, fitting, masks_of, on_device, wider
from .backward_kernels import _dkdv_kernel, _dq_kernel, _pooled_dkdv_kernel
from .expand import Lists, expand, expand_columns, static_lists
from .launch import Launch, architecture, key_block, launch_of, query_block
from .loads import _load_part
from .plan import RowPlan, row_plan
from .pool import pool
from .slices import joined, key_part, part_of, slices
from .transpose import WORD, ColumnPlan, column_plan

DELTA_ROWS = 32  # query rows of a program of the pre-pass


@triton.jit
def _add_exactly(a, rest_a, b, rest_b):
    """The sum of two numbers with rests that are too small for them, and the rest of the sum (Knuth's two-sum)."""
    total = a + b
    part = total - a
    return total, rest_a + rest_b + ((a - (total - part)) + (b - part))


@triton.jit
def _dot_exactly(a, b):
    """Dot products of the rows of two float32 matrices with one rounding in all."""
    product = a * b
    total, rest = tl.reduce((product, tl.fma(a, b, -product)), 1, _add_exactly)
    return total + rest


@triton.jit
def _delta_kernel(
    out_ptr, grad_ptr, lse_ptr, grad_lse_ptr, delta_ptr, base_ptr,  # the last four [B, H, S_q]
    stride_ob, stride_oh, stride_os, stride_gb, stride_gh, stride_gs, heads, num_q,
    BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Delta of every row, and its LSE as `_weights` takes it: +inf for rows without a key, for weights of 0."""
    blocks = tl.cdiv(num_q, BLOCK)
    bh, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    row = first + tl.arange(0, BLOCK)
    live = row < num_q
    out = _load_part(out_ptr + b * stride_ob + h * stride_oh, row, live, stride_os, True, 0, BLOCK_D, DIM)
    grad = _load_part(grad_ptr + b * stride_gb + h * stride_gh, row, live, stride_gs, True, 0, BLOCK_D, DIM)
    at = bh.to(tl.int64) * num_q + row
    if out_ptr.dtype.element_ty == tl.float32:
        delta = _dot_exactly(out, grad)
    else:
        delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + at, mask=live, other=0.0)
    lse = tl.load(lse_ptr + at, mask=live, other=0.0)
    if out_ptr.dtype.element_ty != tl.float32:
        lse *= 1.4426950408889634
    empty = lse == float("-inf")
    tl.store(delta_ptr + at, tl.where(empty, 0.0, delta), mask=live)
    tl.store(base_ptr + at, tl.where(empty, float("inf"), lse), mask=live)


def features_of(problem: Problem) -> tuple[str, ...]:
    """Features of a call for which the launch table may have rows of their own."""
    masks = (problem.key_valid, problem.key_mask, problem.key_length, problem.mask_ids)
    return ("decay",) * (problem.decay is not None) + ("mask",) * any(x is not None for x in masks)


def attend_backward(
    problem: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, laid out like them, in the problem's token order (tiled, or that of `token_order`).

    Args:
        problem: the call, as the forward got it; a selection with what was `routed`, without a routing.
        out: its output [B, H, S_q, Dv], in q's dtype.
        lse: its natural-log LSE, float32 [B, H, S_q].
        grad_out: gradient of the output, like out.
        grad_lse: gradient of the LSE, float32 [B, H, S_q]; None: not used.

    Raises:
        BackendUnavailableError: this machine or this call is out of the kernels' reach.
    """
    check(problem)
    cuts = slices(problem)
    if len(cuts) == 1:
        return _attend_backward(problem, out, lse, grad_out, grad_lse)
    parts = [
        _attend_backward(
            part_of(problem, at), out[at], lse[at], grad_out[at], None if grad_lse is None else grad_lse[at]
        )
        for at in cuts
    ]
    keys = [key_part(problem, cut) for cut in cuts]
    whole = [
        joined(torch.empty_like(x), [part[i] for part in parts], at)
        for i, (x, at) in enumerate(((problem.q, cuts), (problem.k, keys), (problem.v, keys)))
    ]
    return whole[0], whole[1], whole[2]


def _attend_backward(
    problem: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_backward` of batches and heads that are computed together."""
    tensors = (problem.q, problem.k, problem.v, out, grad_out)
    q, k, v, out, grad_out = (x if x.stride(-1) == 1 else x.contiguous() for x in tensors)
    grads = tuple(torch.empty_like(x) for x in (q, k, v))
    features = features_of(problem)
    dq, dkdv, pooled = (  # fp32 is full fp32, without tensor cores: splitting its operands would spill
        launch_of(architecture(q.device), q.dtype, wider(problem), kernel=kernel, features=features)
        for kernel in ("dq", "dkdv", "pooled")
    )
    with on_device(q.device):
        base, delta = _delta(out, lse, grad_out, grad_lse)
        block_k, _ = key_block(problem.block_k, dq.block_k)
        rows = row_plan(problem)
        lists = static_lists(problem, rows)
        means: tuple[Tensor | None, ...] = (None, None, None)
        if problem.may_pool:
            means = pool(k, v, block_k=problem.block_k, token_order=problem.token_order, valid=rows.valid)
        norm = torch.empty_like(base) if q.dtype == torch.float32 else None
        shared = (q, k, v, grad_out, base, delta, norm)
        block_q, whole_q = key_block(problem.block_q, dkdv.block_q)
        columns = column_plan(problem, whole_chunks=whole_q)
        if problem.selection is not None and narrows(problem.selection):
            lists, exact = expand(problem, rows, problem.selection.routed)
            columns = expand_columns(problem, columns, exact)
        with fitting("dq", problem, features):
            _query_grad(problem, rows, lists, shared, means, grads[0], dq, block_k)
        with fitting("pooled", problem, features):
            mean_grads = _pooled_grads(problem, rows, lists, shared, means, pooled)
        with fitting("dkdv", problem, features):
            _key_grads(problem, rows, columns, shared, mean_grads, grads[1:], dkdv, block_q)
    return grads[0], grads[1], grads[2]


def _delta(out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """LSE in the kernels' base, +inf for empty rows, and delta: float32 [B, H, S_q]."""
    batch, heads, tokens, dim = out.shape
    base, delta = (torch.empty(batch, heads, tokens, dtype=torch.float32, device=out.device) for _ in range(2))
    _delta_kernel[(batch * heads * triton.cdiv(tokens, DELTA_ROWS),)](
        out, grad_out, lse.contiguous(), None if grad_lse is None else grad_lse.contiguous(), delta, base,
        *out.stride()[:3], *grad_out.stride()[:3], heads, tokens,
        BLOCK=DELTA_ROWS, DIM=dim, BLOCK_D=column_block(dim), num_warps=4,
    )  # fmt: skip
    return base, delta


def column_block(dim: int) -> int:
    """Columns of a chunk: a power of 2 of at least 16 that covers the head dim."""
    return max(16, triton.next_power_of_2(dim))


def _scale_stride(problem: Problem) -> int:
    """Stride of the batch in head_scale [B or 1, H]."""
    return 0 if problem.head_scale is None or problem.head_scale.shape[0] == 1 else problem.q.shape[1]


def _scale(problem: Problem) -> float:
    """Logit scale in the kernels' base: natural in float32, else 2."""
    return problem.scale * (1.0 if problem.q.dtype == torch.float32 else LOG2_E)


def _query_grad(
    problem: Problem, plan: RowPlan, lists: Lists, shared: tuple[Any, ...], means: tuple[Tensor | None, ...],
    grad_q: Tensor, size: Launch, block_k: int,
) -> None:  # fmt: skip
    """Write grad_q."""
    q, k, v, grad_out, base, delta, norm = shared
    batch, heads, num_q, dim = q.shape
    block_q = query_block(problem.block_q, size.block_q)
    table = None if problem.decay is None else problem.decay[0]
    programs = batch * heads * problem.query_tiles * triton.cdiv(problem.block_q, block_q)
    _dq_kernel[(programs,)](
        q, k, v, grad_out, grad_q, base, delta, norm, lists.indices, lists.bounds, plan.q_order, lists.entry_t,
        problem.token_order, plan.valid, problem.head_scale, table, plan.q_frames, plan.k_frames,
        None if means[0] is None else plan.pooled_t, *masks_of(problem, plan), lists.pooled_bits, *means,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3], *grad_q.stride()[:3],
        *plan.strides, _scale_stride(problem), *(lists.strides or (None, None)),
        *(lists.pooled_strides or (None, None)),
        num_q, k.shape[2], heads, k.shape[1],
        problem.query_tiles, problem.key_tiles, 0 if table is None else table.numel() - 1,
        _scale(problem),
        TILE_Q=problem.block_q, TILE_K=problem.block_k, BLOCK_Q=block_q, BLOCK_K=block_k,
        BLOCK_S=size.block_s, DIM=dim, BLOCK_D=column_block(dim), DIM_V=v.shape[3], BLOCK_DV=column_block(v.shape[3]),
        PRECISION="ieee", num_warps=size.num_warps, num_stages=size.num_stages,
    )  # fmt: skip


def _pooled_grads(
    problem: Problem, rows: RowPlan, lists: Lists, shared: tuple[Any, ...], means: tuple[Tensor | None, ...],
    size: Launch,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of the means of K and V, float32 [B, HK, NK, D or Dv], and the true lengths; None without any."""
    k_mean, v_mean, length = means
    if k_mean is None or v_mean is None or lists.pooled_bits is None or lists.pooled_strides is None:
        return None, None, None
    q, _, v, grad_out, base, delta, norm = shared
    batch, heads, num_q, dim = q.shape
    key_heads, words = k_mean.shape[1], lists.pooled_bits.shape[-1]
    dk_mean, dv_mean = (torch.empty(x.shape, dtype=torch.float32, device=q.device) for x in (k_mean, v_mean))
    _pooled_dkdv_kernel[(batch * key_heads * words * (WORD // size.block_k),)](
        q, grad_out, base, delta, norm, k_mean, v_mean, length, dk_mean, dv_mean, lists.pooled_bits,
        problem.token_order, problem.head_scale, rows.q_frames, rows.pooled_t,
        *q.stride()[:3], *grad_out.stride()[:3], *lists.pooled_strides, _scale_stride(problem),
        num_q, heads, key_heads, problem.query_tiles, problem.key_tiles, words, _scale(problem),
        TILE_Q=problem.block_q, BLOCK_Q=query_block(problem.block_q, size.block_q), BLOCK_K=size.block_k, WORD=WORD,
        DIM=dim, BLOCK_D=column_block(dim), DIM_V=v.shape[3], BLOCK_DV=column_block(v.shape[3]), PRECISION="ieee",
        num_warps=size.num_warps, num_stages=size.num_stages,
    )  # fmt: skip
    return dk_mean, dv_mean, length


def _key_grads(
    problem: Problem, rows: RowPlan, plan: ColumnPlan, shared: tuple[Any, ...],
    mean_grads: tuple[Tensor | None, ...], grads: tuple[Tensor, ...], size: Launch, block_q: int,
) -> None:  # fmt: skip
    """Write grad_k and grad_v."""
    q, k, v, grad_out, base, delta, norm = shared
    batch, heads, num_q, dim = q.shape
    key_heads, num_k = k.shape[1], k.shape[2]
    block_k = query_block(problem.block_k, size.block_k)
    table = None if problem.decay is None else problem.decay[0]
    programs = batch * key_heads * problem.key_tiles * triton.cdiv(problem.block_k, block_k)
    _dkdv_kernel[(programs,)](
        q, k, v, grad_out, *grads, base, delta, norm, plan.q_tiles, plan.bounds, plan.order, plan.entry_t,
        problem.token_order, rows.valid, problem.head_scale, table, rows.q_frames, rows.k_frames,
        plan.entry_mask, masks_of(problem, rows)[1], *mean_grads,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3],
        *grads[0].stride()[:3], *grads[1].stride()[:3],
        *plan.strides, *plan.order_strides, _scale_stride(problem), *(plan.entry_strides or (None, None)),
        num_q, num_k, heads, key_heads, problem.key_tiles, 0 if table is None else table.numel() - 1,
        _scale(problem),
        TILE_Q=problem.block_q, TILE_K=problem.block_k, BLOCK_Q=block_q, BLOCK_K=block_k,
        BLOCK_S=size.block_s, DIM=dim, BLOCK_D=column_block(dim), DIM_V=v.shape[3], BLOCK_DV=column_block(v.shape[3]),
        PRECISION="ieee", num_warps=size.num_warps, num_stages=size.num_stages,
    )  # fmt: skip
