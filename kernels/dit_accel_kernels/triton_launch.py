"""Sizes of the forward kernel's launches: a small table by architecture, dtype and head dim, and what follows from it.

With tiles of 128, each row up to D = 128 compiles without spills, within its card's shared memory (bench/aot.py shows
both). They were chosen by the compilers' reports; none has been timed on a card yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """Sizes of one launch: query rows of a program, keys of a chunk in plain and in slow loops, warps, stages.

    Rows and keys are cut down to the tile where that is smaller.
    """

    block_q: int
    block_k: int
    block_s: int
    num_warps: int
    num_stages: int


def _launch(block_q: int, block_k: int, block_s: int, num_warps: int, num_stages: int) -> Launch:
    return Launch(block_q=block_q, block_k=block_k, block_s=block_s, num_warps=num_warps, num_stages=num_stages)


_GENERIC = ""
_TABLE = {  # (architecture, kind of dtype, head dim up to): sizes
    (_GENERIC, "half", 64): _launch(128, 64, 32, 8, 3),
    (_GENERIC, "half", 128): _launch(128, 32, 32, 8, 3),
    (_GENERIC, "half", 256): _launch(64, 32, 32, 8, 2),
    (_GENERIC, "fp32", 64): _launch(32, 32, 32, 8, 1),
    (_GENERIC, "fp32", 128): _launch(32, 32, 32, 8, 1),
    (_GENERIC, "fp32", 256): _launch(16, 16, 16, 8, 1),
    ("sm_90", "half", 64): _launch(128, 128, 64, 8, 3),
    ("sm_90", "half", 128): _launch(128, 64, 64, 8, 3),
    ("sm_100", "half", 64): _launch(128, 128, 64, 8, 3),
    ("sm_100", "half", 128): _launch(128, 64, 32, 8, 3),
    ("gfx942", "half", 64): _launch(128, 64, 32, 4, 2),
    ("gfx942", "half", 128): _launch(128, 64, 32, 4, 2),
    ("gfx942", "fp32", 128): _launch(64, 32, 32, 4, 2),
}


def launch_of(arch: str, dtype: torch.dtype, dim: int) -> Launch:
    """Sizes for an architecture ("sm_90", "gfx942" ...), dtype and head dim; generic ones where it has no row."""
    kind = "fp32" if dtype == torch.float32 else "half"
    width = 64 if dim <= 64 else 128 if dim <= 128 else 256
    return _TABLE.get((arch, kind, width)) or _TABLE[_GENERIC, kind, width]


def next_power_of_2(n: int) -> int:
    """The lowest power of 2 that is at least n (n >= 1)."""
    return 1 << (n - 1).bit_length()


def query_block(tile: int, most: int) -> int:
    """Query rows of a program: a power of 2 from 16 to `most` that covers a tile or a part of it."""
    return max(16, min(most, next_power_of_2(tile)))


def warps(launch: Launch, block_q: int) -> int:
    """Warps of a program with `block_q` query rows: half of the launch's where it has at most half of the rows."""
    return launch.num_warps // 2 if launch.num_warps > 4 and block_q <= launch.block_q // 2 else launch.num_warps


def key_block(tile: int, most: int) -> tuple[int, bool]:
    """Keys of a chunk, a power of 2 from 16 to `most`, and whether it divides the tile."""
    divisor = tile & -tile
    if divisor >= 16:
        return min(most, divisor), True
    return max(16, min(most, next_power_of_2(tile))), False


def column_parts(dim: int) -> tuple[int, int]:
    """Head dim as two powers of 2 of at least 16 (the second may be 0) that cover it: 96 = 64 + 32."""
    first = max(16, 1 << (dim.bit_length() - 1))
    return first, 0 if dim <= first else max(16, next_power_of_2(dim - first))


def fp32_products(arch: str) -> str:
    """How products of fp32 are made: tf32x3 on NVIDIA, plain fp32 ("ieee") elsewhere.

    Three tf32 products come close to fp32 and run on tensor cores, which have no fp32 there; AMD's matrix cores have
    it, and Triton's interpreter computes in fp32 whatever it is told.
    """
    return "tf32x3" if arch.startswith("sm_") else "ieee"


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> str:
    """Name such as "sm_90" or "gfx942"; the device type where there is no more to say."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
