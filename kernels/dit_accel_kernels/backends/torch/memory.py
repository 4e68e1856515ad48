"""Memory for large tensors on a CPU, in pages of 2 MB where Linux gives them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

LEAST_BYTES = 4 << 20
_PAGE, _HUGE = 4096, 14  # MADV_HUGEPAGE


def fresh(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory on the CPU, whose first writing takes half the time of that in small pages."""
    made = torch.empty(tuple(shape), dtype=dtype)
    ask = _madvise()
    if ask is not None and made.nbytes >= LEAST_BYTES:
        first = -(-made.data_ptr() // _PAGE) * _PAGE
        size = (made.data_ptr() + made.nbytes - first) // _PAGE * _PAGE
        ask(ctypes.c_void_p(first), ctypes.c_size_t(size), _HUGE)  # a kernel without them refuses, and nothing changes
    return made


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, on the CPU into such memory."""
    if x.dtype == dtype or x.device.type != "cpu":
        return x.to(dtype)
    return fresh(x.shape, dtype).copy_(x)


@lru_cache(maxsize=1)
def _madvise() -> Callable[..., int] | None:
    """The C library's madvise, where there is one."""
    try:
        return ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):  # Windows
        return None
