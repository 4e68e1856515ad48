"""Tunes MagCache: measures how the size of what it stores changes from step to step, on a model's own generations.

Source: the calibration of MagCache (arXiv 2506.09045). Where we depart from it: several prompts, whose ratios are
averaged geometrically; sizes are means of absolute values, of what is stored here, not of the last block's residual.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.request import Request

from dit_accel import ConfigError, MagCache
from dit_accel.methods.caches.calibrated import CalibratedHandler
from dit_accel.methods.caches.easy import mean_size
from dit_accel.methods.site import ForwardContext

from .base import Table, Tuned
from .cache_runs import Note, config_of, watched_runs, write_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios(Tuned):
    """What `tune_magcache` measured and wrote.

    Attributes:
        output: the file.
        model: what was measured.
        ratios: one for each step, the geometric mean over the prompts; the first is 1.
        spread: of each step, the largest ratio of a prompt over the smallest.
        prompts: how many there were.
    """

    output: Path
    model: str
    ratios: tuple[float, ...]
    spread: tuple[float, ...]
    prompts: int

    def table(self) -> Table:
        """Return the ratios by step."""
        rows = [
            (str(step), f"{ratio:.5f}", f"{spread:.5f}")
            for step, (ratio, spread) in enumerate(zip(self.ratios, self.spread, strict=True))
        ]
        return ("step", "ratio", "largest over smallest"), rows, []


def tune_magcache(request: Request, output: Path, *, stages: Stages | None = None) -> Ratios:
    """Measure the ratios on every prompt, for ``--config``; the request may hold a `MagCache` without ratios."""
    requested = config_of(request, MagCache)
    config = dataclasses.replace(requested, threshold=0.0, ratios=(1.0,), branches="all")
    found = watched_runs(request, output, config, lambda: _note_size, stages)
    curves = np.array([_ratios(notes, found.steps) for notes in found.prompts])
    ratios = tuple(round(float(ratio), 5) for ratio in np.exp(np.log(curves).mean(0)))
    write_config(
        output,
        dataclasses.replace(requested, ratios=ratios, measured_on=found.model),
        [f"Measured by dit-accel tune magcache on {found.model}: {found.steps} steps, {len(curves)} prompts."],
    )
    found.progress.finish()
    spread = tuple(round(float(ratio), 5) for ratio in curves.max(0) / curves.min(0))
    return Ratios(output=output, model=found.model, ratios=ratios, spread=spread, prompts=len(curves))


def _note_size(handler: CalibratedHandler, context: ForwardContext, output: Any) -> Note:
    size = float(mean_size(handler.stored(context)))
    return {"transformer": context.transformer, "step": context.step_index, "size": size}


def _ratios(notes: Sequence[Note], steps: int) -> np.ndarray:
    """Return the ratios of one prompt's run; of two forwards of a step the last counts."""
    sizes = {note["step"]: note["size"] for note in notes}
    missing = sorted({*range(steps)} - {*sizes})
    if missing or not all(size > 0 for size in sizes.values()):
        raise ConfigError(
            f"tune magcache needs a size above 0 for every step, got {sizes.get(missing[0] if missing else 0)} at step "
            f"{missing[0] if missing else min(sizes, key=lambda step: sizes[step])}; show something else"
        )
    values = np.array([sizes[step] for step in range(steps)])
    return np.concatenate([[1.0], values[1:] / values[:-1]])
