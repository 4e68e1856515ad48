"""Gradients through tile lists on Triton: of Q along query tiles, of K and V along key tiles, without atomics.

Four launches. A pre-pass forms delta = sum(out * grad_out) - grad_lse of every query row, in float32 with one rounding:
where one key has nearly all weight, grad_out v' - delta is a small difference of large numbers. Then a program owns a
block of rows of grad_q, or of grad_k and grad_v, summing over the query heads of its key head: each number is written
once, by one program that adds in a fixed order, so gradients are deterministic. Those of pooled columns come from a
kernel of their own, and are spread over the tile's valid tokens where grad_k and grad_v are written.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import Problem
from ...selection import LOG2_E
from ..rows import with_whole_rows
from ..slices import join_slices, key_part, slice_of, slices
from .attend import features_of, fitting, in_pieces, last_distance, launch_sizes, listed, on_device
from .backward_kernels import _dkdv_kernel, _dq_kernel, _pooled_dkdv_kernel
from .expand import expand, expand_columns
from .launch import Launch, column_block, key_block, query_block
from .loads import _load_part
from .plan import WORD, RowPlan, column_plan, row_plan, scale_stride
from .pool import pool
from .support import check

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


class Rows(NamedTuple):
    """What the kernels read of every query row beside it: three times float32 [B, H, S_q], the last in float32 only."""

    grad_out: Tensor
    base: Tensor
    delta: Tensor
    norm: Tensor | None


def attend_backward(
    problem: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, laid out like them, in the problem's token order (tiled, or that of `token_order`).

    The problem is the call as the forward got it, a selection with what was `routed`, without a routing; its output and
    `grad_out` [B, H, S_q, Dv] in q's dtype; its natural-log LSE and `grad_lse` float32 [B, H, S_q], None: not used.
    Raises BackendUnavailableError where this machine or this call is out of the kernels' reach.
    """
    check(problem)
    cuts = slices(problem)
    if len(cuts) == 1:
        return _attend_backward(problem, out, lse, grad_out, grad_lse)
    parts = []
    for at in cuts:
        of_lse = None if grad_lse is None else grad_lse[at]
        parts.append(_attend_backward(slice_of(problem, at), out[at], lse[at], grad_out[at], of_lse))
    q, k, v = (list(part) for part in zip(*parts, strict=True))
    keys = [key_part(problem, cut) for cut in cuts]
    return (
        join_slices(q, cuts, torch.empty_like(problem.q)),
        join_slices(k, keys, torch.empty_like(problem.k)),
        join_slices(v, keys, torch.empty_like(problem.v)),
    )


def _attend_backward(
    problem: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_backward` of batches and heads that are computed together."""
    out, grad_out, problem = with_whole_rows(out), with_whole_rows(grad_out), in_pieces(problem)
    q = problem.q
    masks = (problem.key_valid, problem.key_mask, problem.key_length, problem.mask_ids)
    features = ("decay",) * (problem.decay is not None) + ("mask",) * any(x is not None for x in masks)
    with on_device(q.device):
        base, delta = _delta(out, lse, grad_out, grad_lse)
        rows = Rows(grad_out, base, delta, torch.empty_like(base) if q.dtype == torch.float32 else None)
        plan, exact = row_plan(problem), None
        means: tuple[Tensor | None, ...] = (None, None, None)
        if problem.may_pool:
            means = pool(problem, plan.valid, q.dtype)
        if problem.selection is not None and problem.selection.narrows:
            plan, exact = expand(problem, plan, problem.selection.routed)
        with fitting("dq", problem, features) as launch:
            grad_q = _query_grad(problem, plan, rows, means, launch)
        with fitting("pooled", problem, features) as launch:
            mean_grads = _pooled_grads(problem, plan, rows, means, launch)
        with fitting("dkdv", problem, features) as launch:
            grad_k, grad_v = _key_grads(problem, plan, rows, exact, mean_grads, launch)
    return grad_q, grad_k, grad_v


def _delta(out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """LSE in the kernels' base, +inf for empty rows, and delta: float32 [B, H, S_q]."""
    batch, heads, tokens, dim = out.shape
    base, delta = (torch.empty(batch, heads, tokens, dtype=torch.float32, device=out.device) for _ in range(2))
    _delta_kernel[(batch * heads * triton.cdiv(tokens, DELTA_ROWS),)](
        out, grad_out, lse.contiguous(), None if grad_lse is None else grad_lse.contiguous(), delta, base,
        *out.stride()[:3], *grad_out.stride()[:3], heads, tokens,
        BLOCK=DELTA_ROWS, DIM=dim, BLOCK_D=column_block(dim),
    )  # fmt: skip
    return base, delta


def _scale(problem: Problem) -> float:
    """Logit scale in the kernels' base: natural in float32, else 2."""
    return problem.scale * (1.0 if problem.q.dtype == torch.float32 else LOG2_E)


def _constants(problem: Problem, size: Launch, **more: int) -> dict[str, Any]:
    """What all of the kernels are compiled for; fp32 is full fp32: splitting its operands for tensor cores would spill.

    `more`: the sizes of a kernel's own.
    """
    dim, dim_v = problem.q.shape[3], problem.v.shape[3]
    return dict(
        TILE_Q=problem.block_q, DIM=dim, BLOCK_D=column_block(dim), DIM_V=dim_v, BLOCK_DV=column_block(dim_v),
        PRECISION="ieee", num_warps=size.num_warps, num_stages=size.num_stages, **more,
    )  # fmt: skip


def _query_grad(problem: Problem, plan: RowPlan, rows: Rows, means: tuple[Tensor | None, ...], size: Launch) -> Tensor:
    """Gradient of q, laid out like it."""
    q, k, v, grad_q = problem.q, problem.k, problem.v, torch.empty_like(problem.q)
    block_q, (block_k, _) = query_block(problem.block_q, size.block_q), key_block(problem.block_k, size.block_k)
    programs = q.shape[0] * q.shape[1] * problem.query_tiles * triton.cdiv(problem.block_q, block_q)
    _dq_kernel[(programs,)](
        q, k, v, rows.grad_out, grad_q, *rows[1:], *listed(problem, plan, means),
        *_strides(q, k, v, rows.grad_out, grad_q), *launch_sizes(problem, plan), _scale(problem),
        **_constants(problem, size, TILE_K=problem.block_k, BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_S=size.block_s),
    )  # fmt: skip
    return grad_q


def _pooled_grads(
    problem: Problem, plan: RowPlan, rows: Rows, means: tuple[Tensor | None, ...], size: Launch
) -> tuple[Tensor | None, ...]:
    """Gradients of the means of K and V, float32 [B, HK, NK, D or Dv], and the true lengths; None without any."""
    k_mean, v_mean, length = means
    if k_mean is None or v_mean is None or plan.pooled_bits is None:
        return None, None, None
    q, words = problem.q, plan.pooled_bits.shape[-1]
    dk_mean, dv_mean = (torch.empty(x.shape, dtype=torch.float32, device=q.device) for x in (k_mean, v_mean))
    _pooled_dkdv_kernel[(k_mean.shape[0] * k_mean.shape[1] * words * (WORD // size.block_k),)](
        q, *rows, k_mean, v_mean, length, dk_mean, dv_mean, plan.pooled_bits,
        problem.token_order, problem.head_scale, plan.q_frames, plan.pooled_t,
        *_strides(q, rows.grad_out), *plan.pooled_strides, scale_stride(problem),
        q.shape[2], q.shape[1], k_mean.shape[1], problem.query_tiles, problem.key_tiles, words, _scale(problem),
        **_constants(
            problem, size, BLOCK_Q=query_block(problem.block_q, size.block_q), BLOCK_K=size.block_k, WORD=WORD
        ),
    )  # fmt: skip
    return dk_mean, dv_mean, length


def _key_grads(
    problem: Problem, plan: RowPlan, rows: Rows, exact: Tensor | None, mean_grads: tuple[Tensor | None, ...],
    size: Launch,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of k and v, laid out like them; `exact`: the exact tiles as bits, where a selection narrows them."""
    q, k, v = problem.q, problem.k, problem.v
    grads = torch.empty_like(k), torch.empty_like(v)
    (block_q, whole_q), block_k = key_block(problem.block_q, size.block_q), query_block(problem.block_k, size.block_k)
    columns = column_plan(problem, whole_chunks=whole_q)
    if exact is not None:
        columns = expand_columns(problem, columns, exact)
    programs = k.shape[0] * k.shape[1] * problem.key_tiles * triton.cdiv(problem.block_k, block_k)
    _dkdv_kernel[(programs,)](
        q, k, v, rows.grad_out, *grads, *rows[1:], columns.q_tiles, columns.bounds, columns.order, columns.entry_t,
        *features_of(problem, plan), columns.entry_mask, problem.mask_bits, *mean_grads,
        *_strides(q, k, v, rows.grad_out, *grads), *columns.strides, *columns.order_strides, scale_stride(problem),
        *(columns.entry_strides or (None, None)),
        q.shape[2], k.shape[2], q.shape[1], k.shape[1], problem.key_tiles, last_distance(problem), _scale(problem),
        **_constants(problem, size, TILE_K=problem.block_k, BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_S=size.block_s),
    )  # fmt: skip
    return grads


def _strides(*tensors: Tensor) -> list[int]:
    """All strides but the last, which is 1."""
    return [n for x in tensors for n in x.stride()[:3]]
