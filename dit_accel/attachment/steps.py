"""Where the denoising stands, as far as timesteps and schedulers show it; for pipelines that don't tell it."""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


def noisiest(timestep: Tensor | None, rising: bool) -> float:
    """Return the timestep of what is still noisiest among frames and rows, falling from step to step; inf for None.

    Args:
        timestep: one per row, frame or token, or per several of these.
        rising: the model's timesteps rise; the result is negative.
    """
    if timestep is None:
        return math.inf
    return float((-timestep if rising else timestep).max())


def noise_level(scheduler: Any) -> float | None:
    """Return the sigma of the step that a scheduler is about to take, or None where it does not tell."""
    sigmas, index = getattr(scheduler, "sigmas", None), getattr(scheduler, "step_index", None)
    if index is None:
        index = getattr(scheduler, "begin_index", None) or 0
    return float(sigmas[index]) if sigmas is not None and index < len(sigmas) else None


@dataclass(frozen=True, slots=True)
class Timeline:
    """The steps of one run, as its scheduler lays them out.

    Attributes:
        steps: how many there are; None where it is not known.
        halves: the scheduler evaluates the model at a point between two steps too (DPM2), so that two timesteps make
            one step, except for the first.
        repeats: it evaluates the model twice at a timestep (Heun), which is one step.
    """

    steps: int | None = None
    halves: bool = False
    repeats: bool = False

    def step_of(self, number: int) -> int:
        """Return the step of the ``number``-th different timestep of the run, from 0."""
        return (number + 1) // 2 if self.halves else number


def timeline_of(pipe: Any) -> Timeline:
    """Return the steps of the run that a pipeline has begun.

    A run that starts in the middle (image to image, ``strength`` below 1) has the steps that are left.
    """
    scheduler = getattr(pipe, "scheduler", None)
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or len(timesteps) == 0:
        return Timeline()
    total = len(timesteps)
    left = getattr(pipe, "_num_timesteps", None)
    if not isinstance(left, int) or not 0 < left <= total:
        left = total - (getattr(scheduler, "begin_index", None) or 0)
    values = timesteps[total - left :].detach().cpu() if isinstance(timesteps, Tensor) else timesteps[total - left :]
    different = 1 + sum(float(a) != float(b) for a, b in zip(values[1:], values[:-1], strict=True))
    halves = getattr(scheduler, "order", 1) == 2 and different == left > 1
    return Timeline((different + 2) // 2 if halves else different, halves, repeats=different < left)


class Pipeline:
    """The pipeline that methods are attached to, held weakly and asked again at each run: its parts may be replaced."""

    def __init__(self, pipe: Any) -> None:
        self._pipe: Callable[[], Any]
        try:
            self._pipe = weakref.ref(pipe)
        except TypeError:  # a stand-in that holds components
            self._pipe = lambda: pipe
        self._timesteps: Callable[[], Any] = lambda: None

    @property
    def pipe(self) -> Any:
        """The pipeline itself; None where it is gone."""
        return self._pipe()

    @property
    def scheduler(self) -> Any:
        """The scheduler that the pipeline has now, or None."""
        return getattr(self._pipe(), "scheduler", None)

    def begins_run(self) -> bool:
        """Tell whether a run began since this was last asked: each run makes its timesteps anew."""
        timesteps = getattr(self.scheduler, "timesteps", None)
        if timesteps is None or timesteps is self._timesteps():
            return False
        try:
            self._timesteps = weakref.ref(timesteps)
        except TypeError:  # a list
            self._timesteps = lambda: timesteps
        return True

    def timeline(self) -> Timeline:
        """Return the steps of the run that has begun."""
        return timeline_of(self._pipe())
