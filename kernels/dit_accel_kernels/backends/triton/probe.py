"""Whether Triton's interpreter multiplies bfloat16 as numbers: it may multiply the bit patterns."""

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


@lru_cache(maxsize=1)
def bfloat16_products() -> bool:
    """Whether the interpreter's product of two matrices of bfloat16 is theirs: tried once in a process."""
    a, out = torch.full((SIDE, SIDE), 1.5, dtype=torch.bfloat16), torch.empty(SIDE, SIDE)
    _square_kernel[(1,)](a, out, SIDE=SIDE)
    return bool((out == SIDE * 1.5**2).all())
