"""What "auto" means on a CPU: cpu_table.json, and what follows from it.

A row of the table is for what the processor has ("amx", "avx512_bf16", "avx512"), a dtype, calls of at least so many
tokens, tiles of up to 64 tokens or more (64, 128) and a backend. Its `shares` are pairs of a density and of the ideal
that the backend reaches there, its speed over that of dense SDPA times the density: 1 is a time that falls with the
density. Between two densities the share is on their line, beyond the last it stays. `source` says where a row is from.
bench/cpu_table.py writes it. Where no row serves a call nothing is known of it, and it is torch's.
"""

from __future__ import annotations

import json
import os
import time
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..problem import Problem
from ..tiles import Grid, TileLists
from . import flex
from .torch import fused

DENSE = "DIT_ACCEL_CPU_DENSE"
"""Environment variable: what `dense_speed` says, a number, in place of a measurement."""

DENSE_TOKENS, DENSE_TILE = 1024, 128  # of the calls that are measured, and of dense calls by the loop

TABLE = Path(__file__).with_name("cpu_table.json")
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
Shares = tuple[tuple[float, float], ...]

_PROBES = {  # the most telling first
    "amx": "_is_amx_tile_supported",
    "avx512_bf16": "_is_avx512_bf16_supported",
    "avx512": "_is_avx512_supported",
}


@lru_cache(maxsize=1)
def processor_kind() -> str:
    """What this machine's processor has, as the table's rows name it; "other" for what they don't know."""
    return next((name for name, probe in _PROBES.items() if getattr(torch.cpu, probe, bool)()), "other")


def choice(dtype: torch.dtype | None, tiles: Grid) -> tuple[str, float | None]:
    """The faster backend for a call by these lists, and its predicted speed over dense SDPA.

    The speed is None where it is not known. Pooled tiles count nothing. flex counts where there is a C++ compiler and
    tile sides are powers of 2; that the call has neither votes nor LSE is the caller's to know.
    """
    tile = 64 if min(tiles.block_q, tiles.block_k) <= 64 else 128
    rows = _serving(processor_kind(), DTYPES.get(dtype) if dtype else None, min(tiles.num_q, tiles.num_k), tile)
    density = max(tiles.density, 1e-9)
    speed = {backend: _at(shares, density) / density for backend, shares in rows.items()}
    ahead = sorted(speed, key=speed.__getitem__, reverse=True)
    takes_flex = flex.takes_tiles(tiles.block_q, tiles.block_k)
    runs = (n for n in ahead if n != "flex" or (takes_flex and flex.missing_requirement("cpu") is None))
    fastest = next(runs, "torch")
    return fastest, speed.get(fastest)


def predicted_speedup(device: torch.device, dtype: torch.dtype, lists: TileLists) -> float | None:
    """How many times as fast as dense SDPA a call by these lists alone is, with backend "auto"; None: it is not known.

    Known on processors and from the sizes on that backends/cpu_table.json has. `block_sparse_attention` computes what
    it is asked for, whatever this says.
    """
    return choice(dtype, lists)[1] if device.type == "cpu" else None


def dense_speed(dtype: torch.dtype, dim: int) -> float | None:
    """How many times as fast as torch's SDPA the compiled loop computes dense attention on a core of this CPU.

    Measured once a process for each dtype and head dim, in some tens of milliseconds of one thread's own time, which
    other work on the machine hardly changes; what the environment variable DIT_ACCEL_CPU_DENSE holds, if it is set.
    None where the loop takes no such calls.
    """
    if not fused.takes(torch.device("cpu"), dtype):
        return None
    named = os.environ.get(DENSE)
    if named is None:
        return _dense_speed(dtype, dim)
    try:
        return float(named)
    except ValueError:
        raise ValueError(f"{DENSE} must be a number, the loop's speed over that of SDPA; found {named!r}") from None


@lru_cache(maxsize=64)
def _dense_speed(dtype: torch.dtype, dim: int) -> float:
    """The ratio of the best of five calls each, in turn."""
    generator = torch.Generator().manual_seed(0)  # the caller's draws stay as they are
    q, k, v = (torch.randn(1, 1, DENSE_TOKENS, dim, generator=generator).to(dtype) for _ in range(3))
    tiles = TileLists.full(DENSE_TOKENS, DENSE_TOKENS, block_q=DENSE_TILE, block_k=DENSE_TILE)
    sizes = dict(block_q=DENSE_TILE, block_k=DENSE_TILE)
    problem = Problem(q=q, k=k, v=v, **tiles.parts, **sizes, scale=dim**-0.5, heads_first=True)
    dense, loop = (
        partial(scaled_dot_product_attention, q, k, v),
        partial(fused.attend_by_loop, problem, None, need_lse=False),
    )
    best, threads = [float("inf")] * 2, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for turn in range(6):
                for i, call in enumerate((dense, loop)):
                    began = time.thread_time()
                    call()
                    if turn:  # the first fills caches
                        best[i] = min(best[i], time.thread_time() - began)
    finally:
        torch.set_num_threads(threads)
    return best[0] / best[1]


@lru_cache(maxsize=64)
def _serving(kind: str, dtype: str | None, tokens: int, tile: int) -> dict[str, Shares]:
    """Backend -> shares, of the rows measured nearest to such calls: first by the tile, then by the tokens."""
    table = json.loads(TABLE.read_text())
    rows = [row for row in table if (row["processor"], row["dtype"]) == (kind, dtype) and row["tokens"] <= tokens]
    rows.sort(key=lambda row: (row["tile"] == tile, row["tokens"]))
    return {row["backend"]: tuple(map(tuple, row["shares"])) for row in rows}


def _at(shares: Shares, density: float) -> float:
    """The share of the ideal at a density."""
    ends = ((0.0, shares[0][1]), *shares, (1.0, shares[-1][1]))
    (low, first), (high, last) = next(pair for pair in pairwise(ends) if density <= pair[1][0])
    return first + (last - first) * (density - low) / (high - low)
