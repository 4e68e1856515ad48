"""Tunes MagCache and TeaCache: measures their numbers on a model's own generations, of which all steps are computed.

Sources: the calibrations of MagCache (arXiv 2506.09045) and TeaCache (arXiv 2411.19108). Where we depart from them:
sizes are means of absolute values, of what is stored here, not of the last block's residual; MagCache's ratios are
averaged over prompts, geometrically; TeaCache's polynomial fits not the change of the output, but that of what is
stored here, relative to the output, which is the error of holding it for one step.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from dit_accel_pipelines.generation.progress import Stages
from torch import Tensor

from dit_accel import ConfigError, MagCache, TeaCache
from dit_accel.methods.caches.calibrated import CalibratedConfig, CalibratedHandler
from dit_accel.methods.caches.easy import mean_change, mean_size
from dit_accel.methods.caches.tea import TeaHandler
from dit_accel.methods.site import ForwardContext, target_sample
from dit_accel.rules.caching import rescaled

from ..runs.loaded import TuningRequest
from .base import Tuned, TuningRun, replaced_method, write_config

DEGREE = 4  # of TeaCache's polynomial
Config = TypeVar("Config", bound=CalibratedConfig)
Note = dict[str, Any]  # what was noted of one forward, as plain values; with ``transformer`` and ``step``
Watch = Callable[[CalibratedHandler, ForwardContext, Any], Note]  # of an output of the branch that decides


def tune_magcache(request: TuningRequest, output: Path, *, stages: Stages | None = None) -> Tuned:
    """Measure the ratios on every prompt, for ``--config``; the request may hold a `MagCache` without ratios.

    Found are the ``ratios`` of the steps, geometric means over prompts, and their ``spread``, largest over smallest.
    """
    requested = config_of(request, MagCache)
    config = dataclasses.replace(requested, threshold=0.0, ratios=(1.0,), branches="all")

    def size(handler: CalibratedHandler, context: ForwardContext, _: Any) -> Note:
        size = float(mean_size(handler.stored(context)))
        return {"transformer": context.transformer, "step": context.step_index, "size": size}

    runs, prompts, model, steps = watched_runs(request, output, config, lambda: size, stages)
    curves = np.array([_ratios(notes, steps) for notes in prompts])
    ratios, spread = (
        tuple(round(float(ratio), 5) for ratio in values)
        for values in (np.exp(np.log(curves).mean(0)), curves.max(0) / curves.min(0))
    )
    about = f"Measured by dit-accel tune magcache on {model}: {steps} steps, {len(curves)} prompts."
    write_config(output, dataclasses.replace(requested, ratios=ratios, measured_on=model), [about])
    runs.finish()
    return Tuned(
        found={"model": model, "ratios": ratios, "spread": spread, "prompts": len(curves)},
        columns=("step", "ratio", "largest over smallest"),
        rows=[(str(step), f"{ratios[step]:.5f}", f"{spread[step]:.5f}") for step in range(steps)],
    )


def _ratios(notes: Sequence[Note], steps: int) -> np.ndarray:
    """Return the ratios of one prompt's run; of two forwards of a step the last counts."""
    sizes = {note["step"]: note["size"] for note in notes}
    for step in range(steps):
        if not sizes.get(step, 0) > 0:
            size = sizes.get(step)
            raise ConfigError(f"tune magcache needs sizes above 0, got {size} at step {step}; show something else")
    values = np.array([sizes[step] for step in range(steps)])
    return np.concatenate([[1.0], values[1:] / values[:-1]])


def tune_teacache(request: TuningRequest, output: Path, *, stages: Stages | None = None) -> Tuned:
    """Fit the polynomials on every prompt, for ``--config``; the request may hold a `TeaCache` without polynomials.

    Found are the ``fits``, one a transformer: its ``polynomial``, the highest power first, over changes of the signal
    from ``lowest`` to ``highest``, how many ``points``, the RMS that it is ``off`` by, and their ``spread``.
    """
    requested = config_of(request, TeaCache)
    config = dataclasses.replace(requested, threshold=0.0, polynomial=(0.0,), polynomial_2=(0.0,), branches="all")
    runs, prompts, model, steps = watched_runs(request, output, config, _Changes, stages)
    notes = [note for prompt in prompts for note in prompt if "signal" in note]
    fits = [_fit(name, notes) for name in sorted({note["transformer"] for note in notes})]
    if not fits:
        raise ConfigError(f"tune teacache needs steps to compare, got {steps}; ask for {DEGREE + 2} or more")
    first, second = (*(fit["polynomial"] for fit in fits), None)[:2]
    about = [f"Fitted by dit-accel tune teacache on {model}: {steps} steps, {len(prompts)} prompts."]
    about += [
        f"{fit['transformer']}: changes of the signal from {fit['lowest']:.4g} to {fit['highest']:.4g}, off by "
        f"{fit['off']:.3g} where they spread by {fit['spread']:.3g}"
        for fit in fits
    ]
    measured = dataclasses.replace(requested, polynomial=first, polynomial_2=second, measured_on=model)
    write_config(output, measured, about)
    runs.finish()
    numbers = ("lowest", "highest", "off", "spread")
    return Tuned(
        found={"model": model, "steps": steps, "prompts": len(prompts), "fits": fits},
        columns=("transformer", "points", "smallest change", "largest", "off by", "spread"),
        rows=[(fit["transformer"], str(fit["points"]), *(f"{fit[name]:.4g}" for name in numbers)) for fit in fits],
    )


class _Changes:
    """Notes how the signal and what is stored changed since the step before of the same transformer."""

    def __init__(self) -> None:
        self._last: tuple[str, int, Tensor, Tensor, Tensor] | None = None

    def __call__(self, handler: CalibratedHandler, context: ForwardContext, output: Any) -> Note:
        note: Note = {"transformer": context.transformer, "step": context.step_index}
        assert isinstance(handler, TeaHandler)
        signal = handler.signal(context)
        stored, sample = handler.stored(context), target_sample(output)
        if self._last is not None and self._last[:2] == (context.transformer, context.step_index - 1):
            _, _, signal_before, stored_before, given_before = self._last
            note["signal"] = float(mean_change(signal, signal_before) / mean_size(signal_before))
            note["output"] = float(mean_change(stored, stored_before) / mean_size(given_before))
        self._last = context.transformer, context.step_index, signal, stored, sample
        return note


def _fit(transformer: str, notes: Sequence[Note]) -> dict[str, Any]:
    points = [note for note in notes if note["transformer"] == transformer]
    signal, output = (np.array([note[name] for note in points]) for name in ("signal", "output"))
    different = len({*signal.round(12).tolist()})
    if different <= DEGREE:
        saw = f"saw {different} changes of {transformer}'s signal"
        raise ConfigError(f"tune teacache fits {DEGREE + 1} coefficients and {saw}; ask for more steps")
    if not (np.isfinite(signal).all() and np.isfinite(output).all()):
        raise ConfigError(f"tune teacache saw changes of {transformer} that are no numbers; check the model's type")
    polynomial = tuple(float(f"{value:.9g}") for value in np.polyfit(signal, output, DEGREE))
    fitted = np.array([rescaled(polynomial, change) for change in signal])
    off, spread = float(np.sqrt(np.mean((fitted - output) ** 2))), float(output.std())
    return {
        "transformer": transformer, "polynomial": polynomial, "lowest": float(signal.min()),
        "highest": float(signal.max()), "points": len(points), "off": off, "spread": spread,
    }  # fmt: skip


def watched_runs(
    request: TuningRequest, output: Path, config: CalibratedConfig, new_watch: Callable[[], Watch],
    stages: Stages | None,
) -> tuple[TuningRun, list[list[Note]], str, int]:  # fmt: skip
    """Generate every prompt with all steps computed; return the run, each prompt's notes, the model and the steps."""
    rest = replaced_method(request, type(config))[1]
    runs = TuningRun(dataclasses.replace(request, methods=(config, *rest)), output, ".toml", stages)
    with runs.attached() as attachment:
        handlers = attachment.engine.handlers
        cache: Any = next(handler for handler in handlers if isinstance(handler, CalibratedHandler))

        def noted(prompt: str) -> list[Note]:
            watch, notes = new_watch(), list[Note]()
            cache.computed = lambda context, decider, output: notes.append(watch(cache, context, output))
            runs.run(prompt)
            return notes

        prompts = runs.over_prompts(noted)
    return runs, prompts, cache.model.name, 1 + max(note["step"] for notes in prompts for note in notes)


def config_of(request: TuningRequest, config_type: type[Config]) -> Config:
    """Return the request's config of a cache; one that has numbers is refused."""
    config = replaced_method(request, config_type)[0]
    for name in (config.numbers, "family", "measured_on"):
        if getattr(config, name) is not None:
            given = f"{config.name}.{name} = {getattr(config, name)!r}"
            raise ConfigError(f"tune {config.name} measures the {config.numbers} itself, got {given}; leave it out")
    return config
