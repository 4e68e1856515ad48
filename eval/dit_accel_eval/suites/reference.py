"""Dense runs kept on disk, and among them the reference of a clip: the converged run, which no solver's steps blur.

The steps are doubled until two runs agree. Runs are found again by the hash of all that shapes them.
"""

import dataclasses
import hashlib
import json
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dit_accel_pipelines.generation.solvers import BEST, shift_of

from dit_accel import ConfigError
from dit_accel.files import user_cache, written_whole

from ..metrics.metric import Clip
from ..metrics.pixels import psnr
from ..runs.counting import Counts
from ..runs.model import ModelRun, SuiteModel, Times
from ..runs.results import AGREE, ITSELF, explained_disk_errors

FIRST, MOST = 16, 512  # steps with which the search begins, and the most that it tries


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The run that a clip's arms are held against, and its agreement in dB with the run of half the steps."""

    frames: Clip
    steps: int
    agreement: float
    step: Counts
    seconds: float | None = None


def default_cache() -> Path:
    """Return the folder of dense runs where none is named: ``dit-accel`` in the user's cache folder."""
    return user_cache() / "dense-runs"


def reference_run(model: SuiteModel, clip: int, cache: Path, steps: int | None, solver: str = BEST) -> Reference:
    """Return a clip's reference: the model's own dense run of so many steps of a solver; None: the converged one."""
    if steps is None:
        return converged(model, clip, cache)
    return _reference(dense_run(model, clip, steps, cache, solver), steps, ITSELF)


def converged(model: SuiteModel, clip: int, cache: Path, *, first: int = FIRST, most: int = MOST) -> Reference:
    """Return a clip's converged run, made or found again."""
    steps, coarse = first, dense_run(model, clip, first, cache)
    while True:
        steps *= 2
        fine = dense_run(model, clip, steps, cache)
        agreement = psnr(fine.frames, coarse.frames)
        if agreement >= AGREE or 2 * steps > most:
            return _reference(fine, steps, agreement)
        coarse = fine


def _reference(run: ModelRun, steps: int, agreement: float) -> Reference:
    seconds = run.times.processor / steps if run.times and run.times.processor else None
    return Reference(frames=run.frames, steps=steps, agreement=agreement, step=run.counts / steps, seconds=seconds)


def dense_run(model: SuiteModel, clip: int, steps: int, cache: Path, solver: str = BEST) -> ModelRun:
    """Return a dense run of a solver with the model's own noise shift, made or found again, with its times."""
    setting = {  # all that shapes the run
        "model": model.name, "weights": model.weights, "prompt": model.prompt(clip), "seed": model.seed(clip),
        "call": model.call, "solver": solver, "flow_shift": shift_of(model.shipped), "steps": steps,
        **({} if model.dtype is None else {"dtype": model.dtype}),
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:24]
    path = cache / f"{name}.npz"
    if not path.exists():
        run = model.run(clip, steps=steps, solver=solver)
        meta = {"setting": setting, "counts": dataclasses.asdict(run.counts), "memory": run.memory}
        meta |= {"times": dataclasses.asdict(run.times)} if run.times else {}
        with explained_disk_errors(path):
            cache.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            np.savez(temporary, frames=run.frames.astype(np.float16), meta=json.dumps(meta))
    return _read(path, setting)


def _read(path: Path, setting: dict[str, Any]) -> ModelRun:
    try:
        with np.load(path) as saved:
            frames, meta = saved["frames"].astype(np.float32), json.loads(str(saved["meta"]))
        made_with, counts = meta["setting"], Counts(**meta["counts"])
        times, memory = meta.get("times"), meta.get("memory")  # earlier releases kept none
        times = Times(**{**times, "steps": tuple(times["steps"])}) if times else None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} is not a dense run that this release can read ({error}); delete it") from None
    for name, value in setting.items():
        if made_with.get(name) != value:
            raise ConfigError(f"{path} is a dense run of {name} {made_with.get(name)!r}, not {value!r}; delete it")
    steps = setting["steps"]
    return ModelRun(
        frames=frames, counts=counts, attended=1.0, seconds=math.nan, times=times, memory=memory,
        by_step=((counts / steps, 1.0),) * steps,
    )  # fmt: skip
