"""What each preset level measured in runs of few and of many steps, and what it promises in one of any number.

The figures are those of `eval/studies/preset_levels.py` on the embedded models, on prompts that did not choose the
levels; `preset_figures.json` holds them, written by `eval/studies/preset_table.py`.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

PROMPTS = 16
"""Prompts that each figure was measured on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A level in runs of one number of steps, on one embedded model with one solver.

    Attributes:
        median: PSNR in dB to the user's own dense run of the same seed, steps and solver; the median prompt's.
        tenth: the same, the 10th percentile of the prompts.
        loop: how many times as fast the denoising loop was, by processor time; the median prompt's.
        call: the same of the whole call, with the text encoder and the VAE.
        skipped: share of the forwards.
    """

    model: str
    solver: str
    steps: int
    median: float
    tenth: float
    loop: float
    call: float
    skipped: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What a level promises: the least of what was measured in runs of the nearest numbers of steps.

    Attributes:
        median: PSNR in dB, the median prompt's.
        tenth: PSNR in dB that nine of ten prompts reached.
        loop: how many times as fast the denoising loop was.
        call: how many times as fast the whole call was.
        skipped: share of the forwards, between the nearest numbers of steps in proportion.
        steps: those numbers.
    """

    median: float
    tenth: float
    loop: float
    call: float
    skipped: float
    steps: tuple[int, ...]

    def __str__(self) -> str:
        steps = " and ".join(map(str, self.steps))
        return f"{self.median:.0f} dB, {self.tenth:.0f} or more on 9 of 10 prompts, on tiny models at {steps} steps"


@functools.cache
def figures(level: str) -> tuple[Figure, ...]:
    """Return what a level measured; nothing for one that was not."""
    text = Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
    return tuple(Figure(**one) for one in json.loads(text).get(level, ()))


def promise(level: str, steps: int, model: str | None = None) -> Promise | None:
    """Return what a level promises in a run of so many steps; None where it skips nothing, or was not measured.

    Args:
        model: an embedded model, whose own figures are given; of any other name the least of all.
    """
    found = figures(level)
    found = tuple(one for one in found if one.model == model) or found
    counts = sorted({one.steps for one in found})
    if not counts or steps < counts[0]:
        return None
    below, above = max(one for one in counts if one <= steps), min((one for one in counts if one >= steps), default=0)
    near = [one for one in found if one.steps in (below, above or below)]
    skipped = [min(one.skipped for one in near if one.steps == count) for count in (below, above or below)]
    share = (steps - below) / (above - below) if above > below else 0.0
    return Promise(
        median=min(one.median for one in near), tenth=min(one.tenth for one in near),
        loop=min(one.loop for one in near), call=min(one.call for one in near),
        skipped=skipped[0] + share * (skipped[1] - skipped[0]), steps=tuple(sorted({below, above or below})),
    )  # fmt: skip
