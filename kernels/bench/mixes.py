"""Read what a logit takes in a kernel's loops from the compile table: instructions, exponentials, shared memory.

The table (results/aot.jsonl) holds counts of the machine instructions of one warp in one turn of a loop; a logit is one
query times one key.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cards import TARGETS

TABLE = Path(__file__).parent / "results" / "aot.jsonl"
KINDS = {  # of calls in the table, by candidate of gpu.py; those that it lacks at some size run "plain" there
    "triton": "plain",
    "triton-kept": "plain",
    "triton-decay": "decay",
    "triton-pooled": "pooled",
    "triton-routed": "pinned+route",
    "triton-votes": "keep+maxgap",
    "triton-backward": "backward",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """What one loop takes for a logit, and how its programs are cut.

    `plain` counts instructions of a lane that are neither tensor-core nor exp2, `tensor` and `exp2` those, and `fp32`
    operations of the fp32 lanes among the plain ones; `shared` is in bytes. A program holds `rows` of one side
    (queries, or keys in the gradient of keys) and walks the other by `columns`; `blocks` programs fit one SM.
    """

    plain: float
    exp2: float
    fp32: float = 0.0
    tensor: float = 0.0
    shared: float = 0.0
    rows: int = 128
    columns: int = 128
    blocks: int = 1


Table = dict[tuple[str, str], dict[str, Any]]  # records by launch and target


def read_table(path: Path = TABLE) -> Table:
    """The records of a compile table, by launch and target."""
    found = map(json.loads, path.read_text().splitlines())
    return {(record["launch"], record["target"]): record for record in found}


def read_mix(table: Table, launch: str, target: str, loop: str = "mix") -> Mix:
    """The mix of a launch's hot loop, or with "pooled" of its loop over pooled tiles.

    What doesn't run in every turn, such as the store of a word of votes, counts as often as it runs.

    Raises ValueError where the table has no such row with such a loop.
    """
    record = table.get((launch, target), {})
    mix = record.get(loop)
    if not mix:
        what = "hot loop" if loop == "mix" else "loop over pooled tiles"
        raise ValueError(
            f"the table must hold launch {launch!r} on {target} with a {what}, found none: run aot.py first"
        )
    logits = mix["rows"] * mix["columns"]
    lanes = record["warps"] * TARGETS[target].warp / logits
    keys = launch.startswith("dkdv")
    return Mix(
        plain=(mix.get("every", mix["instructions"]) - mix["tensor"] - mix["exp2"]) * lanes,
        exp2=mix["exp2"] * lanes,
        fp32=mix["fp32"] * lanes,
        tensor=mix["tensor"] * lanes,
        shared=mix["shared_bytes"] / logits,
        rows=mix["columns" if keys else "rows"],
        columns=mix["rows" if keys else "columns"],
        blocks=max(1, record["blocks"]),
    )


def launch_of(candidate: str, dim: int, block: int, target: str, table: Table) -> str | None:
    """The launch in the table that a bf16 call of gpu.py makes, of a gradient that of Q; None where it has none."""
    backward = candidate == "triton-backward"
    for kind in (KINDS[candidate],) if backward else (KINDS[candidate], "plain"):
        launch = f"{'dq' if backward else 'fwd'}-bf16-d{dim}-b{block}-{kind}"
        if (launch, target) in table:
            return launch
    return None


def mixes_of(launch: str, target: str, table: Table) -> dict[str, Mix]:
    """The mixes of a call's loops: "exact" and, where it has such a loop, "pooled"; or "dq" and "dkdv"."""
    if launch.startswith("dq-"):
        return {name: read_mix(table, launch.replace("dq-", f"{name}-", 1), target) for name in ("dq", "dkdv")}
    found = {"exact": read_mix(table, launch, target)}
    if "pooled" in table[launch, target]:
        found["pooled"] = read_mix(table, launch, target, "pooled")
    return found
