"""Times denoising with cached rests on a CPU, beside dense runs: `python eval/studies/rest_time.py`.

As `denoising_time.py`, on a clip of 4,416 tokens: runs of fewer dense steps are the rivals, and a run is worth how near
its latents come to those of the dense run of as many steps.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from denoising_time import Arm, table, timed
from dit_accel_eval.runs.results import Line
from study import study

from dit_accel import LiteAttention, SparseD


def main(arguments: Sequence[str] | None = None) -> int:
    """Write one JSON line per arm and print the table; returns the exit code."""
    return study(
        __doc__, arguments, measure, table, out="rest-time.jsonl", threads=1, num_frames=137, steps=10, rounds=3,
        block_size=64,
    )  # fmt: skip


def measure(options: argparse.Namespace, lines: list[Line]) -> list[Line]:
    """Return one line per arm: its density over the whole run, its time and its result against the dense run's."""
    common: dict[str, Any] = dict(block_size=options.block_size, dense_steps=2, dense_layers=0)
    cached: dict[str, Any] = dict(common, rest="cached", refresh=4)
    arms: dict[str, Arm] = {
        "dense": (None, options.steps),
        **{f"dense, {steps} steps": (None, steps) for steps in (options.steps - 1, options.steps - 3)},
        "lite -1": (LiteAttention(threshold=-1.0, **common), options.steps),
        "lite -1, cached": (LiteAttention(threshold=-1.0, **cached), options.steps),
        "sparsed .2": (SparseD(density=0.2, **common), options.steps),
        "sparsed .2, cached": (SparseD(density=0.2, **cached), options.steps),
    }
    return timed(arms, options)


if __name__ == "__main__":
    raise SystemExit(main())
