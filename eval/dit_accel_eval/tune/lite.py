"""Tunes LiteAttention: thresholds by layer and step for a target error, found on a model's own generations.

Source: the calibration of LiteAttention (arXiv 2511.11062), see `lite_search`. Beyond the original: branches are tuned
apart, several prompts count, the error to dense attention that has built up is reported, and a run can be stopped.
"""

import contextlib
import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dit_accel_pipelines.generation.generate import run
from dit_accel_pipelines.generation.loading import load_pipeline
from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.request import Request, settle

import dit_accel
from dit_accel import ConfigError, LiteAttention
from dit_accel.errors import did_you_mean
from dit_accel.methods.attention.lite.handler import LiteHandler
from dit_accel.methods.attention.lite.thresholds import LiteThresholds, write_thresholds
from dit_accel.methods.attention.sparse import SparseConfig
from dit_accel.methods.config import MethodConfig

from ..metrics.psnr import psnr
from .base import Progress, Table, Tuned, check_output, left_prompts, run_settings
from .lite_search import METRICS, Found, Metric, Tuner, threshold_of

NOTHING_VOTES = (
    "tune lite has nothing to tune, got num_inference_steps = {steps}: each step is dense by lite's dense_ options, or "
    "is the last, whose votes no later step follows; ask for more steps, or fewer dense ones: --set lite.dense_steps=0"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedPrompt:
    """One prompt's tuning run: its calls, and the PSNR of its frames to the dense run's, in dB."""

    prompt: str
    psnr: float
    calls: tuple[Found, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """One step over all layers, branches and prompts: the median threshold written, and means of `Found`'s figures."""

    step: int
    threshold: float
    kept: float
    added: float
    dense: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedLite(Tuned):
    """What `tune_lite` found and wrote."""

    output: Path
    thresholds: LiteThresholds
    prompts: tuple[TunedPrompt, ...]

    def by_step(self) -> list[StepRow]:
        """Return one row for each step that voted."""
        calls = [call for prompt in self.prompts for call in prompt.calls]
        rows = []
        for step in sorted({call.step for call in calls}):
            now = [call for call in calls if call.step == step]
            written = {(c.transformer, c.layer): self.thresholds.at(c.transformer, c.layer, step) for c in now}
            means = {name: statistics.fmean(getattr(call, name) for call in now) for name in ("kept", "added", "dense")}
            rows.append(StepRow(step=step, threshold=statistics.median(written.values()), **means))
        return rows

    def table(self) -> Table:
        """Return what was found by step, and the clips' PSNR."""
        columns = ("step", "threshold", "tiles kept", "error added", "error to dense")
        rows = [
            (str(row.step), f"{row.threshold:.2f}", f"{row.kept:.3f}", f"{row.added:.4f}", f"{row.dense:.4f}")
            for row in self.by_step()
        ]
        return columns, rows, [f"{one.psnr:.1f} dB to the dense run: {one.prompt}" for one in self.prompts]

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the single calls as plain values, for JSON."""
        return {
            "output": str(self.output),
            "model": self.thresholds.model,
            "criterion": self.thresholds.criterion,
            "num_inference_steps": self.thresholds.num_inference_steps,
            "target_error": self.thresholds.target_error,
            "steps": [dataclasses.asdict(row) for row in self.by_step()],
            "prompts": [{"prompt": one.prompt, "psnr": one.psnr} for one in self.prompts],
        }


def tune_lite(
    request: Request, output: Path, *, target_error: float = 0.01, metric: str = "l1", stages: Stages | None = None
) -> TunedLite:
    """Tune on every prompt of a request, which may hold a `LiteAttention` without thresholds; write their TOML file.

    One vote may add an error of ``target_error`` to the next call, by a metric of `METRICS` and in its units.
    """
    config, others = _lite_of(request)
    if metric not in METRICS:
        raise ConfigError(f"tune has no metric {metric!r}; {did_you_mean(metric, METRICS)}")
    if not 0 < target_error < 1:
        raise ConfigError(f"target_error must be between 0 and 1, got {target_error}; 0.01 is usual")
    check_output(output, ".toml")
    request, *_ = settle(dataclasses.replace(request, methods=(config, *others)))
    progress = lite_progress(request, output, target_error, metric)
    stages = stages or Stages(quiet=True)
    stages.stage("loading")
    pipe = load_pipeline(request)
    steps = request.num_inference_steps
    with dit_accel.attach(pipe, *request.methods, preset="none", backend=request.backend) as attachment:
        execution = attachment._execution
        (lite,) = (handler for handler in execution.handlers if isinstance(handler, LiteHandler))
        layers = dict(Counter(layer.state.name for layer in execution.layers))
    _check_something_votes(lite.settings, steps, max(layers.values()))
    for prompt in left_prompts(request, progress, stages, ": dense, then tuned"):
        dense = run(pipe, prompt, request, stages=stages)
        with _tuning(pipe, request, target_error, METRICS[metric]) as (attachment, tuner):
            tuned = run(pipe, prompt, request, attachment=attachment, stages=stages)
        steps = len(tuned.timings.steps)
        if not tuner.found:
            raise ConfigError(NOTHING_VOTES.format(steps=steps))
        frames, reference = (np.divide(made.frames, 255, dtype=np.float32) for made in (tuned, dense))
        progress.add(TunedPrompt(prompt=prompt, psnr=psnr(frames, reference), calls=tuple(tuner.found)))
    assert steps is not None
    thresholds = combine(progress.done, layers, steps, lite.model.name, config.criterion, target_error)
    write_thresholds(output, thresholds)
    progress.finish()
    return TunedLite(output=output, thresholds=thresholds, prompts=tuple(progress.done))


def combine(
    prompts: Sequence[TunedPrompt], layers: dict[str, int], steps: int, model: str, criterion: Any, target_error: float
) -> LiteThresholds:
    """Return for each layer and step the lowest threshold that any prompt or branch asked for, else one for nothing."""
    nothing = threshold_of(criterion, -math.inf)
    lowest: dict[tuple[str, int, int], float] = {}
    for call in (call for prompt in prompts for call in prompt.calls):
        key = call.transformer, call.layer, call.step
        lowest[key] = min(call.threshold, lowest.get(key, call.threshold))
    tables = {
        name: tuple(tuple(lowest.get((name, layer, step), nothing) for step in range(steps)) for layer in range(count))
        for name, count in layers.items()
    }
    return LiteThresholds(
        model=model, criterion=criterion, num_inference_steps=steps, thresholds=tables, target_error=target_error
    )


@contextlib.contextmanager
def _tuning(pipe: Any, request: Request, target_error: float, metric: Metric) -> Iterator[tuple[Any, Tuner]]:
    """Attach the request's methods with a `Tuner` in LiteAttention's place."""
    with dit_accel.attach(pipe, *request.methods, preset="none", backend=request.backend) as attachment:
        execution = attachment._execution
        (lite,) = (handler for handler in execution.handlers if isinstance(handler, LiteHandler))
        tuner = Tuner(request.methods[0], lite.model, target_error, metric)  # type: ignore[arg-type]
        handlers = [tuner if handler is lite else handler for handler in execution.handlers]
        for handler in handlers:  # who works with LiteAttention works with the tuner
            handler.check_with([other for other in handlers if other is not handler])
        execution.use(handlers)
        yield attachment, tuner


def lite_progress(request: Request, output: Path, target_error: float, metric: str) -> Progress[TunedPrompt]:
    """Return what a tuning run has done so far."""
    return Progress(output, run_settings(request, target_error=target_error, metric=metric), _read_prompt)


def _read_prompt(saved: dict[str, Any]) -> TunedPrompt:
    return TunedPrompt(**{**saved, "calls": tuple(Found(**call) for call in saved["calls"])})


def _check_something_votes(settings: SparseConfig, steps: int | None, layers: int) -> None:
    """Refuse a run in which fewer than two steps are not dense, where known: the last one's votes aren't read."""
    if steps is None or settings.dense_above_sigma is not None:  # noise levels are known only while it runs
        return
    if all(sum(not settings.is_dense(step, steps, layer) for step in range(steps)) < 2 for layer in range(layers)):
        raise ConfigError(NOTHING_VOTES.format(steps=steps))


def _lite_of(request: Request) -> tuple[LiteAttention, tuple[MethodConfig, ...]]:
    """Return the LiteAttention config to tune, and the other methods."""
    others = tuple(method for method in request.methods if not isinstance(method, LiteAttention))
    config = next((method for method in request.methods if isinstance(method, LiteAttention)), LiteAttention())
    for name in ("threshold", "target_density", "thresholds_file"):
        value = getattr(config, name)
        if value is not None:
            raise ConfigError(f"tune lite finds the thresholds itself, got lite.{name} = {value!r}; leave it out")
    if config.criterion == "budget":
        raise ConfigError(
            "tune lite tunes lite.criterion 'maxgap' or 'mass', got 'budget', which bounds its own error; use one"
        )
    return config, others
