"""Tunes TeaCache: fits the polynomial from the change of its signal to what a skipped step would be off by.

Source: the calibration of TeaCache (arXiv 2411.19108). Where we depart from it: it fits to the change of the output,
this to that of what is stored here, relative to the output, which is the error of holding it for one step.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.request import Request
from torch import Tensor

from dit_accel import ConfigError, TeaCache
from dit_accel.methods.caches.calibrated import CalibratedHandler
from dit_accel.methods.caches.easy import mean_change, mean_size
from dit_accel.methods.site import ForwardContext, target_sample
from dit_accel.rules.caching import rescaled

from .base import Table, Tuned
from .cache_runs import Note, config_of, watched_runs, write_config

DEGREE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The polynomial of one transformer.

    Attributes:
        transformer: component name.
        polynomial: coefficients, the highest power first.
        lowest: smallest change of the signal that was seen.
        highest: largest.
        points: changes that were fitted.
        off: root mean square of what the fit is off by.
        spread: standard deviation of what was fitted.
    """

    transformer: str
    polynomial: tuple[float, ...]
    lowest: float
    highest: float
    points: int
    off: float
    spread: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Polynomials(Tuned):
    """What `tune_teacache` fitted and wrote: the file, the model, its steps, prompts and one fit a transformer."""

    output: Path
    model: str
    steps: int
    prompts: int
    fits: tuple[Fit, ...]

    def table(self) -> Table:
        """Return the fits by transformer."""
        columns = ("transformer", "points", "smallest change", "largest", "off by", "spread")
        rows = [
            (fit.transformer, str(fit.points), *(f"{x:.4g}" for x in (fit.lowest, fit.highest, fit.off, fit.spread)))
            for fit in self.fits
        ]
        return columns, rows, []


def tune_teacache(request: Request, output: Path, *, stages: Stages | None = None) -> Polynomials:
    """Fit the polynomials on every prompt, for ``--config``; the request may hold a `TeaCache` without polynomials."""
    requested = config_of(request, TeaCache)
    nothing = (0.0,)
    config = dataclasses.replace(requested, threshold=0.0, polynomial=nothing, polynomial_2=nothing, branches="all")
    found = watched_runs(request, output, config, _Changes, stages)
    notes = [note for prompt in found.prompts for note in prompt if "signal" in note]
    fits = tuple(_fit(name, notes) for name in sorted({note["transformer"] for note in notes}))
    if not fits:
        raise ConfigError(f"tune teacache needs steps to compare, got {found.steps}; ask for {DEGREE + 2} or more")
    first, *second = (fit.polynomial for fit in fits)
    numbers = {"polynomial": first, "polynomial_2": second[0] if second else None, "measured_on": found.model}
    about = [f"Fitted by dit-accel tune teacache on {found.model}: {found.steps} steps, {len(found.prompts)} prompts."]
    about += [
        f"{fit.transformer}: changes of the signal from {fit.lowest:.4g} to {fit.highest:.4g}, off by {fit.off:.3g} "
        f"where they spread by {fit.spread:.3g}"
        for fit in fits
    ]
    write_config(output, dataclasses.replace(requested, **numbers), about)
    found.progress.finish()
    return Polynomials(output=output, model=found.model, steps=found.steps, prompts=len(found.prompts), fits=fits)


class _Changes:
    """Notes how the signal and what is stored changed since the step before of the same transformer."""

    def __init__(self) -> None:
        self._last: tuple[str, int, Tensor, Tensor, Tensor] | None = None

    def __call__(self, handler: CalibratedHandler, context: ForwardContext, output: Any) -> Note:
        note: Note = {"transformer": context.transformer, "step": context.step_index}
        assert handler.model.adapter.signal is not None
        with torch.no_grad():
            signal = handler.model.adapter.signal(handler.transformer_of(context), context.inputs).detach()
        stored, given = handler.stored(context), target_sample(output)
        if self._last is not None and self._last[:2] == (context.transformer, context.step_index - 1):
            _, _, signal_before, stored_before, given_before = self._last
            note["signal"] = float(mean_change(signal, signal_before) / mean_size(signal_before))
            note["output"] = float(mean_change(stored, stored_before) / mean_size(given_before))
        self._last = context.transformer, context.step_index, signal, stored, given
        return note


def _fit(transformer: str, notes: Sequence[Note]) -> Fit:
    own = [note for note in notes if note["transformer"] == transformer]
    signal, output = (np.array([note[name] for note in own]) for name in ("signal", "output"))
    different = len({*signal.round(12).tolist()})
    if different <= DEGREE:
        raise ConfigError(
            f"tune teacache fits {DEGREE + 1} coefficients and saw {different} changes of the signal of {transformer}; "
            "ask for more steps"
        )
    if not (np.isfinite(signal).all() and np.isfinite(output).all()):
        raise ConfigError(f"tune teacache saw changes of {transformer} that are no numbers; check the model's type")
    polynomial = tuple(float(f"{value:.9g}") for value in np.polyfit(signal, output, DEGREE))
    fitted = np.array([rescaled(polynomial, change) for change in signal])
    return Fit(
        transformer=transformer,
        polynomial=polynomial,
        lowest=float(signal.min()),
        highest=float(signal.max()),
        points=len(own),
        off=float(np.sqrt(np.mean((fitted - output) ** 2))),
        spread=float(output.std()),
    )
