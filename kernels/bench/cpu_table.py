"""Write the table by which "auto" decides on a CPU, from results/cpu.jsonl and reports of other processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dit_accel_kernels.backends.cpu import TABLE

RESULTS = Path(__file__).parent / "results" / "cpu.jsonl"
BACKENDS = ("torch", "flex")
LEAST_TOKENS = 4096  # of shorter calls nothing is said: what "auto" would save in one is less than it measures
REPORT = "reported, before the compiled loop, not measured here"
REPORTED = (  # the loop left bf16 on such processors as it was; fp32 is not taken over
    ("amx", "bf16", 16384, 128, "torch", ((0.1, 0.38), (0.25, 0.38), (0.5, 0.39))),
    ("amx", "bf16", 16384, 128, "flex", ((0.1, 0.5), (0.25, 0.58), (0.5, 0.67))),
    ("amx", "bf16", 4096, 64, "torch", ((0.1, 0.23), (0.25, 0.31), (0.5, 0.33))),
    ("amx", "bf16", 4096, 64, "flex", ((0.1, 0.35), (0.25, 0.44), (0.5, 0.49))),
)
ALIKE = {("amx", "fp32"): ("avx512", "AMX multiplies no fp32: as ")}
"""Rows without a record of their own -> the processor whose records stand for them, and why."""

KEY = ("processor", "dtype", "tokens", "tile", "backend")


def rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table's rows: of one setting those of the last make that was measured, which replace a reported one."""
    shares_of = {row[:5]: (REPORT, dict(row[5])) for row in REPORTED}
    measured: dict[tuple, tuple[str, dict[float, float]]] = {}
    for record in records:
        if record["candidate"] in BACKENDS and record["shape"][2] >= LEAST_TOKENS:
            source = f"measured: {record['device']}"
            key = (record["processor"], record["dtype"], record["shape"][2], record["block"], record["candidate"])
            if measured.get(key, ("",))[0] != source:
                measured[key] = source, {}
            measured[key][1][record["density"]] = round(record["of_ideal"], 3)
    for (kind, dtype), (other, why) in ALIKE.items():
        for key, (source, shares) in measured.items():
            if key[:2] == (other, dtype):
                shares_of[(kind, *key[1:])] = why + source, shares
    shares_of |= measured
    return [
        {**dict(zip(KEY, key, strict=True)), "shares": sorted(map(list, shares.items())), "source": source}
        for key, (source, shares) in sorted(shares_of.items())
    ]


def read(path: Path = RESULTS) -> list[dict[str, Any]]:
    """The committed records."""
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    TABLE.write_text("[\n" + ",\n".join("  " + json.dumps(row) for row in rows(read())) + "\n]\n")
