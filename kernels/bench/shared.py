"""Count the bytes of shared memory that one turn of a loop moves, from its machine instructions.

An SM moves 128 bytes of it a clock, whoever asks: loads and stores of warps, copies that arrive from memory, and the
tensor cores, which from Hopper on read their right factor there (every warp group its own way through the whole of it)
and the left one too, unless that lies in registers or tensor memory. A warp's access counts as the bytes that its lanes
ask for and at least 128, a clock's worth; bank conflicts are not counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from listing import Instruction

CLOCK_BYTES = 128  # that an SM's (a CU's) shared memory moves in a clock, on every target here
STEP_BYTES = 32  # that one row of a factor takes in one step of wgmma or tcgen05: 16 elements of 2 bytes
GROUP = 4  # warps of a warp group, which issue wgmma together


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What a loop's text doesn't tell: warps of a block, the bytes of one bulk copy, and what tcgen05 multiplies.

    `products` are multiply-adds of a turn on the tensor cores, `rows` those of the left factor in one tcgen05
    instruction, whose text holds no shape.
    """

    warps: int
    copy: int = 0
    products: int = 0
    rows: int = 128


def shared_bytes(body: list[Instruction], turn: Turn) -> int:
    """Bytes that a block moves in one turn of a loop."""
    steps = sum(x.opcode.startswith("UTCHMMA") for x in body)
    columns = turn.products / (16 * turn.rows * steps) if steps else 0
    return round(sum(_bytes(x, turn, columns) for x in body))


def _bytes(x: Instruction, turn: Turn, columns: float) -> float:
    """Bytes that a block moves by one instruction; `columns` are those of the right factor in a tcgen05 one."""
    head, *rest = x.opcode.split(".")
    if head == "HGMMA":
        rows, width = (int(n) for n in rest[0].split("x")[:2])
        left = rows if re.match(r"\w+, *gdesc", x.operands) else 0
        return (left + width) * STEP_BYTES * turn.warps // GROUP
    if head == "UTCHMMA":
        left = turn.rows if x.operands.startswith("gdesc") else 0
        return (left + columns) * STEP_BYTES
    if head in ("UTMALDG", "UBLKCP"):
        return turn.copy
    if head in ("LDSM", "STSM"):
        return 128 * (int(rest[-1]) if rest[-1] in ("2", "4") else 1) * turn.warps
    if head in ("LDS", "STS", "ATOMS", "LDGSTS"):
        lane = next((int(n) // 8 for n in rest if n in ("64", "128")), 4)
        return 32 * lane * turn.warps
    match = re.fullmatch(r"ds_\w*?(read|write|load|store)(2?)(?:st64)?\w*?_b(\d+)\w*", x.opcode)
    if match:
        return 64 * int(match[3]) // 8 * (2 if match[2] else 1) * turn.warps
    return 64 * 4 * turn.warps if x.opcode.startswith("ds_") else 0
