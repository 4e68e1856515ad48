"""Whether Triton's interpreter multiplies bfloat16 as numbers, not bit patterns, and rounds to float8."""

from functools import lru_cache

import torch
import triton
import triton.language as tl

SIDE = 16  # the least that a product takes


@triton.jit
def _square_kernel(a_ptr, out_ptr, SIDE: tl.constexpr, EIGHT: tl.constexpr):
    i = tl.arange(0, SIDE)
    at = i[:, None] * SIDE + i[None, :]
    a = tl.load(a_ptr + at)
    a = a.to(tl.float8e4nv) if EIGHT else a
    tl.store(out_ptr + at, tl.dot(a, a))


@lru_cache(maxsize=2)
def multiplies(dtype: torch.dtype) -> bool:
    """Whether the interpreter rounds to float8 (e4m3), or multiplies another dtype as numbers: tried once a process."""
    eight = dtype == torch.float8_e4m3fn
    a = torch.full((SIDE, SIDE), 1.99 if eight else 1.5, dtype=torch.float32 if eight else dtype)
    out = torch.empty(SIDE, SIDE)
    _square_kernel[(1,)](a, out, SIDE=SIDE, EIGHT=eight)
    return bool((out == SIDE * (2.0 if eight else 1.5) ** 2).all())
