"""Whether Triton's interpreter multiplies bfloat16 as numbers, not bit patterns, and rounds to float8."""

# Device code is typed by Triton's compiler:
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

SIDE = 16  # the least that a product takes


@triton.jit
def _square_kernel(a_ptr, out_ptr, SIDE: tl.constexpr):
    i = tl.arange(0, SIDE)
    at = i[:, None] * SIDE + i[None, :]
    a = tl.load(a_ptr + at)
    tl.store(out_ptr + at, tl.dot(a, a))


@triton.jit
def _round_kernel(out_ptr):
    tl.store(out_ptr + tl.arange(0, 1), tl.full([1], 1.99, tl.float32).to(tl.float8e4nv).to(tl.float32))


@lru_cache(maxsize=1)
def rounds_to_float8() -> bool:
    """Whether the interpreter makes a float32 the nearest float8: tried once in a process."""
    _round_kernel[(1,)](out := torch.empty(1))
    return float(out) == 2.0


@lru_cache(maxsize=1)
def bfloat16_products() -> bool:
    """Whether the interpreter's product of two matrices of bfloat16 is theirs: tried once in a process."""
    a, out = torch.full((SIDE, SIDE), 1.5, dtype=torch.bfloat16), torch.empty(SIDE, SIDE)
    _square_kernel[(1,)](a, out, SIDE=SIDE)
    return bool((out == SIDE * 1.5**2).all())
