"""The compiled loop of fused.cpp as Python calls it: its structure, its functions, and what they say of memory."""

import ctypes
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

POINTERS = (
    "q", "k", "v", "out", "keys", "values", "key_means", "value_means", "lengths", "valid", "head_scale", "decay",
    "mean_decay", "frames", "exact_offsets", "exact", "pooled_offsets", "pooled", "mask_ids",
    "mask_bits", "odd", "evidence_starts", "lse", "evidence", "done", "parallel",
)  # fmt: skip
STRIDES = ("q_strides", "k_strides", "v_strides", "out_strides")
SIZES = (
    "batch", "heads", "key_heads", "groups", "num_q", "num_k", "rows", "columns", "dim", "value_dim", "by_mass",
    "narrow", "pairs", "team", "threads", "next", "end",
)  # fmt: skip


class LoopCall(ctypes.Structure):
    """`LoopCall` of fused.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64 * 3) for name in STRIDES),
        *((name, ctypes.c_int64) for name in SIZES),
        ("scale", ctypes.c_double),
        ("seconds", ctypes.c_double),
    )


def bound(path: Path) -> ctypes.CDLL:
    """Load the loop from a file whose bytes are known to be its own.

    Raises OSError if it can't be loaded, lacks a function or was built for another structure.
    """
    loaded = ctypes.CDLL(str(path))
    try:
        for size in (loaded.panel, loaded.call_bytes, loaded.has_pairs, loaded.tile_words):
            size.restype = ctypes.c_int64
        for function in (loaded.attend, loaded.pack):
            function.restype, function.errcheck = ctypes.c_int64, _require_memory
    except AttributeError as error:
        raise OSError(f"{path} is no compiled loop: {error}") from None
    if loaded.call_bytes() != ctypes.sizeof(LoopCall):
        raise OSError(f"{path} takes calls of {loaded.call_bytes()} bytes, not of {ctypes.sizeof(LoopCall)}")
    return loaded


def _require_memory(failed: Any, function: Any, _: Any) -> Any:
    if failed:
        raise MemoryError(f"{function.__name__} of the compiled loop found no memory for what it keeps beside the call")
    return failed


@lru_cache(maxsize=1)
def torchs_threads() -> int | None:
    """Return where GOMP_parallel is, which runs a function on the threads that torch keeps; None: torch has none such.

    A child process has none of its parent's threads, and libgomp waits for them there: it starts its own.
    """
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            loaded = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
            return ctypes.cast(loaded.GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: globals().update(torchs_threads=lambda: None))
