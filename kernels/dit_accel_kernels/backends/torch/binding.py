"""The compiled loop of fused.cpp as Python calls it: its structure, its functions, and what they say of memory."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

POINTERS = (
    "q", "keys", "values", "key_means", "value_means", "lengths", "absent", "decay", "mean_decay", "frames",
    "exact_starts", "exact_counts", "pooled_starts", "pooled_counts", "exact", "pooled", "heads", "evidence_starts",
    "out", "lse", "evidence",
)  # fmt: skip
SIZES = (
    "query_tiles", "key_tiles", "rows", "columns", "dim", "last_columns", "by_mass", "narrow_q", "narrow_out",
)  # fmt: skip


class Call(ctypes.Structure):
    """`Call` of fused.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in SIZES),
        ("scale", ctypes.c_double),
    )


def bound(path: Path) -> ctypes.CDLL:
    """Load the loop from a file whose bytes are known to be its own.

    Raises:
        OSError: if it can't be loaded, lacks a function or was built for another structure.
    """
    loaded = ctypes.CDLL(str(path))
    try:
        loaded.panel.restype = loaded.call_bytes.restype = ctypes.c_int64
        for function in (loaded.attend, loaded.pack_keys, loaded.pack_values):
            function.restype, function.errcheck = ctypes.c_int64, _require_memory
    except AttributeError as error:
        raise OSError(f"{path} is no compiled loop: {error}") from None
    if loaded.call_bytes() != ctypes.sizeof(Call):
        raise OSError(f"{path} takes calls of {loaded.call_bytes()} bytes, not of {ctypes.sizeof(Call)}")
    return loaded


def _require_memory(failed: Any, function: Any, _: Any) -> Any:
    if failed:
        raise MemoryError(f"{function.__name__} of the compiled loop found no memory for what it keeps beside the call")
    return failed
