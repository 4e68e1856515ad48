"""Memory on a CPU: of large tensors in pages of 2 MB where Linux gives them, of pieces of work used again."""

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from threading import local

import torch
from torch import Tensor

LEAST_BYTES = 4 << 20
KEPT_BYTES = 4 << 20  # of a buffer, for each of torch's threads: new memory costs a page fault every 4 KB
_KEPT = local()
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


def buffer(name: str, like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory on the device of `like`; small ones on the CPU are a thread's last of the name and dtype."""
    size, dtype = math.prod(shape), dtype or like.dtype
    if like.device.type != "cpu" or size * dtype.itemsize > KEPT_BYTES * torch.get_num_threads():
        return like.new_empty(shape, dtype=dtype)
    flat = _KEPT.__dict__.get(f"{name} {dtype}")
    if flat is None or len(flat) < size:
        with torch.inference_mode(False):  # what is made in it can't be written outside
            flat = _KEPT.__dict__[f"{name} {dtype}"] = torch.empty(size, dtype=dtype)
    return flat[:size].view(shape)


def taken(name: str, x: Tensor, index: Tensor) -> Tensor:
    """x[index], in a buffer."""
    shape = (*index.shape, *x.shape[1:])
    return torch.index_select(x, 0, index.flatten(), out=buffer(name, x, (index.numel(), *x.shape[1:]))).view(shape)


@lru_cache(maxsize=1)
def _madvise() -> Callable[..., int] | None:
    """The C library's madvise, where there is one."""
    try:
        return ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):  # Windows
        return None
