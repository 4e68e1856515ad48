"""Sizes of the launches of forward and backward: launch_table.json and what follows from it.

A row of the table is for a kernel ("fwd", "dq", "dkdv", "pooled"), architectures ("": any) and their families, a kind
of dtype, head dims and a tile up to a size, and the calls with a feature ("eight" for eight bits, "decay", "mask"; "":
any). Its `source` says how it was chosen: "compiled" (the compilers' reports: spills and shared memory within the
bounds of bench/aot.py), or the card, date and seconds of a measurement.
"""
# pyright: basic

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """Sizes of one launch: rows of Q and of K in a chunk, rows of what the loop runs over in loops with masks, warps.

    Chunks are cut down to the tile where that is smaller; `num_stages` are those of the software pipeline.
    """

    block_q: int
    block_k: int
    block_s: int
    num_warps: int
    num_stages: int


class Key(NamedTuple):
    """What a row of the table is for; head dim and tokens of a tile are the most that it serves."""

    arch: str
    kind: str
    dim: int
    tile: int
    kernel: str = "fwd"
    feature: str = ""


LARGE = 128  # tokens of the tiles of rows that serve all tiles
TABLE = Path(__file__).with_name("launch_table.json")
# Architectures that run what their family's row was made for, with as much shared memory or more.
FAMILY = dict(sm_86="sm_89", sm_87="sm_80", sm_101="sm_100", sm_103="sm_100", sm_110="sm_100", sm_121="sm_120")


def family_of(arch: str) -> str:
    """The architecture whose rows serve this one: every other AMD GPU has as much shared memory as gfx942 at least."""
    return "gfx942" if arch.startswith("gfx") else FAMILY.get(arch, arch)


@lru_cache(maxsize=1)
def launch_table() -> dict[Key, Launch]:
    """The launch of every key, read once."""
    names = [field.name for field in fields(Launch)]
    rows = json.loads(TABLE.read_text())
    return {key: Launch(**{name: row[name] for name in names}) for row in rows for key in keys_of_row(row)}


def keys_of_row(row: dict[str, Any]) -> list[Key]:
    """What a row of launch_table.json is for: each of its architectures, head dims and features."""
    several = product(row["arch"], row["dim"], row["feature"])
    return [Key(arch, row["kind"], dim, row["tile"], row["kernel"], feature) for arch, dim, feature in several]


def key_of(arch: str, dtype: torch.dtype, dim: int, tile: int, kernel: str = "fwd") -> Key:
    """The key of a call; a tile of more than 64 tokens counts as 128."""
    kind, columns = "fp32" if dtype == torch.float32 else "half", next(n for n in (32, 64, 128, 256) if dim <= n)
    return Key(family_of(arch), kind, columns, 64 if tile <= 64 else LARGE, kernel)


def row_of(
    arch: str, dtype: torch.dtype, dim: int, tile: int = LARGE, kernel: str = "fwd", features: Iterable[str] = ()
) -> Key:
    """The row of the table that serves a call; arguments as in `launch_of`.

    Where the table has no row for a call's features it is that of any, where it has none for such tiles that of tiles
    of 128, where it has none up to 32 columns that of 64, and where the architecture's family has none, any's.
    """
    key = key_of(arch, dtype, dim, tile, kernel)
    choices = product((key.arch, ""), (key.dim, max(key.dim, 64)), (key.tile, LARGE), (*features, ""))
    keys = (key._replace(arch=a, dim=d, tile=t, feature=f) for a, d, t, f in choices)
    return next(key for key in keys if key in launch_table())


def launch_of(
    arch: str, dtype: torch.dtype, dim: int, tile: int = LARGE, kernel: str = "fwd", features: Iterable[str] = ()
) -> Launch:
    """Sizes for an architecture ("sm_90", "gfx942" ...), dtype, head dim, tokens of a tile, kernel and features."""
    return launch_table()[row_of(arch, dtype, dim, tile, kernel, features)]


def with_order(launch: Launch, *, decay: bool) -> Launch:
    """Sizes where a token order gives the rows: their addresses take registers.

    From slow loops always, from the others of small programs, and with decay from all.
    """
    small = launch.block_q <= 64 and launch.num_warps <= 4
    block_q, block_k = launch.block_q // (2 if decay else 1), min(launch.block_k, 32) if small else launch.block_k
    return replace(launch, block_q=block_q, block_k=block_k, block_s=min(launch.block_s, 16))


def next_power_of_2(n: int) -> int:
    """The lowest power of 2 that is at least n (n >= 1)."""
    return 1 << (n - 1).bit_length()


def query_block(tile: int, most: int) -> int:
    """Query rows of a program: a power of 2 from 16 to `most` that covers a tile or a part of it."""
    return max(16, min(most, next_power_of_2(tile)))


def column_block(dim: int) -> int:
    """Columns that cover a head dim: a power of 2 of at least 16."""
    return max(16, next_power_of_2(dim))


def warps(launch: Launch, block_q: int) -> int:
    """Warps of a program with `block_q` query rows: half of the launch's where it has at most half of the rows."""
    return launch.num_warps // 2 if launch.num_warps > 4 and block_q <= launch.block_q // 2 else launch.num_warps


def key_block(tile: int, most: int) -> tuple[int, bool]:
    """Keys of a chunk, a power of 2 from 16 to `most`, and whether it divides the tile."""
    divisor = tile & -tile
    return (min(most, divisor), True) if divisor >= 16 else (query_block(tile, most), False)


def column_parts(dim: int, least: int = 16) -> tuple[int, int]:
    """Head dim as two powers of 2 of at least so many (the second may be 0) that cover it: 96 = 64 + 32."""
    first = max(least, 1 << (dim.bit_length() - 1))
    return first, 0 if dim <= first else max(least, next_power_of_2(dim - first))


def eight_bit_number(arch: str, precision: str) -> torch.dtype | None:
    """The dtype in which an architecture multiplies numbers of eight bits of a precision; None where it has none."""
    if precision == "int8":
        return torch.int8
    if arch.startswith("gfx94"):
        return torch.float8_e4m3fnuz
    newer = arch.startswith(("gfx95", "gfx12")) or (arch.startswith("sm_") and int(arch[3:]) >= 89)
    return torch.float8_e4m3fn if newer or arch == "cpu" else None  # where the interpreter runs


def products_of(arch: str, dtype: torch.dtype) -> str:
    """How products of a dtype are made: tf32x3 for fp32 on NVIDIA, as they are ("ieee") elsewhere.

    Three tf32 products come close to fp32 and run on tensor cores, which have no fp32 there; AMD's matrix cores have
    it, and Triton's interpreter computes in fp32 in any case.
    """
    return "tf32x3" if dtype == torch.float32 and arch.startswith("sm_") else "ieee"


def bulk_copies(arch: str, dtype: torch.dtype) -> bool:
    """Whether chunks of K and V come by tensor descriptors, which saves the plain loops registers and instructions."""
    return family_of(arch) in ("sm_90", "sm_100") and dtype != torch.float32


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> str:
    """Name such as "sm_90" or "gfx942"; the device type where there is no more to say."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
