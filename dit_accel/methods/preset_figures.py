"""What each preset level measured in runs of few and of many steps, and what it promises in one of any number.

The figures are those of `eval/studies/preset_levels.py` on the embedded models, on prompts that did not choose the
levels; `preset_figures.json` holds them, written by `eval/studies/preset_table.py`.
"""

import bisect
import functools
import json
from dataclasses import dataclass
from pathlib import Path

PROMPTS = 16
"""Prompts that each figure was measured on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A level in runs of one number of steps, on one embedded model with one solver."""

    model: str
    solver: str
    steps: int
    median: float  # PSNR in dB to the user's own dense run of the same seed, steps and solver; the median prompt's
    tenth: float  # the same, the 10th percentile of the prompts
    loop: float  # how many times as fast the denoising loop was, by processor time; the median prompt's
    call: float  # the same of the whole call, with the text encoder and the VAE
    skipped: float  # share of the forwards


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What a level promises: the least of what was measured in runs of the nearest numbers of steps."""

    median: float  # PSNR in dB, the median prompt's
    tenth: float  # PSNR in dB that nine of ten prompts reached
    loop: float  # how many times as fast the denoising loop was
    call: float  # how many times as fast the whole call was
    skipped: float  # share of the forwards, between the nearest numbers of steps in proportion
    steps: tuple[int, ...]  # those numbers

    def __str__(self) -> str:
        steps = " and ".join(map(str, self.steps))
        return f"{self.median:.0f} dB, {self.tenth:.0f} or more on 9 of 10 prompts, on tiny models at {steps} steps"


@functools.cache
def figures(level: str) -> tuple[Figure, ...]:
    """Return a level's figures; none for one that was not measured."""
    text = Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
    return tuple(Figure(**entry) for entry in json.loads(text).get(level, ()))


def promise(level: str, steps: int, model: str | None = None) -> Promise | None:
    """Return a level's promise for a run of so many steps; None where it skips nothing, or was not measured.

    ``model``: an embedded model, whose own figures are given; of any other name the least of all.
    """
    measured = figures(level)
    measured = tuple(figure for figure in measured if figure.model == model) or measured
    counts = sorted({figure.steps for figure in measured})
    if not counts or steps < counts[0]:
        return None
    # Beyond the longest run that was measured, both neighbours are that run.
    below = counts[bisect.bisect_right(counts, steps) - 1]
    above = counts[min(bisect.bisect_left(counts, steps), len(counts) - 1)]

    def least(quantity: str, *near: int) -> float:
        return min(getattr(figure, quantity) for figure in measured if figure.steps in near)

    share = (steps - below) / (above - below) if above > below else 0.0
    skipped = least("skipped", below)
    skipped += share * (least("skipped", above) - skipped)
    quantities = {name: least(name, below, above) for name in ("median", "tenth", "loop", "call")}
    return Promise(**quantities, skipped=skipped, steps=tuple(sorted({below, above})))
