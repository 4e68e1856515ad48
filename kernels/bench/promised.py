"""Calls that launch every row of the launch table on every target that takes it: what the package promises to run.

A row is launched at the sizes that it is for: its head dim and its tile are the most that it serves, and smaller ones
take no more of a card. A row for wide heads serves dims that the forward takes in two parts, so that it runs at three
quarters of its dim too. Float16 takes what bfloat16 takes.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from calls import DTYPES, Setting
from dit_accel_kernels.backends.triton.launch import Key, launch_table, row_of
from recorded import Recorded, launches_of

NAMES = {"half": "bf16", "fp32": "fp32"}  # of the dtype that stands for a kind of a row
ALL = "pooled+mask+scale+keep+pinned+maxgap"  # every loop of the forward, and what its loops hold most of
PARTIAL = "partial+mask+scale"  # what a selection excludes
FORWARD = (ALL, f"decay+{ALL}", PARTIAL, f"{ALL}+int8")  # all but the third take pooled tiles in chunks of their own
GRADS = "partial+pooled+mask+scale+order+backward"
BACKWARD = (f"decay+{GRADS}", GRADS, "scale+backward")
KERNELS = ("fwd", "dq", "dkdv", "pooled")
FEATURES = ((), ("decay",), ("mask",), ("decay", "mask"), ("eight",))  # of a call, in the order of looking rows up


def sizes() -> list[tuple[str, int, int]]:
    """Kind of dtype, head dim and tile of every row, once each."""
    return sorted({(key.kind, key.dim, key.tile) for key in launch_table()})


def promised(target: str) -> set[Key]:
    """The rows that calls on a target are served by, at the sizes that they are for."""
    rows = set()
    for (kind, dim, tile), kernel, features in product(sizes(), KERNELS, FEATURES):
        given = tuple(x for x in features if x != ("mask" if kernel == "fwd" else "eight"))
        row = row_of(target, DTYPES[NAMES[kind]], dim, tile, kernel, given)
        if (row.dim, row.tile) == (dim, tile):
            rows.add(row)
    return rows


def record_cases(target: str, into: dict[str, Recorded]) -> None:
    """Record what launches the rows of a target: a backward's rows by the first of its calls, which takes most."""
    for kind, dim, tile in sizes():
        at, size = Setting(dtype=NAMES[kind], dim=dim, tile=tile), (dim, tile)
        for call in FORWARD:
            into |= _of_rows(call, at, target, size)
        if dim > 32:  # three quarters of which would be no two powers of 2 of at least 16
            into |= _of_rows(ALL, replace(at, dim=dim * 3 // 4), target, size)
        seen: set[Key | None] = set()
        for call in BACKWARD if tile == 128 else ():  # its rows are for any tile
            launched = _of_rows(call, at, target, size)
            backward = {name: x for name, x in launched.items() if x.row not in seen and x.kernel_name != "fwd"}
            seen |= {x.row for x in backward.values()}
            into |= backward


def _of_rows(call: str, at: Setting, target: str, size: tuple[int, int]) -> dict[str, Recorded]:
    """What a call launches by rows whose own head dim and tile are these."""
    launched: dict[str, Recorded] = {}
    launches_of(call, at, target, launched)
    return {name: x for name, x in launched.items() if x.row and (x.row.dim, x.row.tile) == size}
