"""Device code of the backward's pre-pass: delta = sum(out * grad_out) - grad_lse and LSE of every query row.

In float32 delta is summed without rounding in between: where one key has nearly all weight, grad_out v' - delta is a
small difference of large numbers.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false
# (Triton compiles this code; to a type checker its constexprs are plain numbers in the wrong place.)

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel_kernels.backends.triton.loads import _load_part


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
