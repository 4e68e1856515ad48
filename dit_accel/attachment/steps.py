"""Where the denoising stands, as far as timesteps and schedulers show it; for pipelines that don't tell it."""

import math
from dataclasses import dataclass
from typing import Any

import torch
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
    index = getattr(scheduler, "step_index", None)
    if index is None:
        index = getattr(scheduler, "begin_index", None) or 0
    return _noise_level_at(scheduler, index)


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


class Schedule:
    """The timesteps that a scheduler has laid out, read off it once, and a run that may follow them.

    Pipelines hand a model the timestep as the scheduler lists it, divided by the number of timesteps that the model was
    trained on, or one of these two counted from the other end.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        timesteps = getattr(scheduler, "timesteps", None)
        values = timesteps.tolist() if isinstance(timesteps, Tensor) else timesteps
        self._values = [float(one) for one in values] if values is not None else []
        config = getattr(scheduler, "config", None)
        self._trained = float(getattr(config, "num_train_timesteps", None) or 1000)
        self._starts: dict[tuple[float, float], int] = {}  # offset and factor of a timestep -> where the run began

    def __len__(self) -> int:
        return len(self._values)

    def timeline(self, start: int) -> Timeline:
        """Return the steps of a run that begins at the timestep at this position, counted from 0."""
        remaining, different = len(self._values[start:]), _different(self._values[start:])
        halves = getattr(self._scheduler, "order", 1) == 2 and different == remaining > 1
        return Timeline((different + 2) // 2 if halves else different, halves, repeats=different < remaining)

    def noise_level(self, position: int) -> float | None:
        """Return the sigma of the timestep at a position, or None where there is none."""
        return _noise_level_at(self._scheduler, position)

    def follow(self, timestep: float, dtype: torch.dtype | None, number: int) -> tuple[int, int] | None:
        """Return at which positions a run began and stands; None: it does not follow the list, one after the other.

        A scheduler whose number of steps was never set lists all that the model was trained on: no run's.

        Args:
            timestep: the noisiest one that a forward is given.
            dtype: of the tensor that held it, which tells how it was rounded; None: it was in none.
            number: which of the run's different timesteps it is, from 0.
        """
        if getattr(self._scheduler, "num_inference_steps", None) is None and len(self) == self._trained:
            return None
        whole = dtype is not None and not dtype.is_floating_point
        epsilon = 1e-5 if dtype is None or whole else max(1e-5, torch.finfo(dtype).eps)
        trained, matches = self._trained, {}
        scales = ((0, 1), (0, 1 / trained), (trained, -1), (1, -1 / trained)) if number == 0 else tuple(self._starts)
        for offset, factor in scales:
            far = [abs(offset + factor * one - timestep) for one in self._values]
            start = far.index(min(far)) if number == 0 and far else self._starts.get((offset, factor), 0)
            position = self._later(start, number)
            allowed = abs(factor) * (trained * epsilon + (whole and abs(factor) == 1))
            if position is not None and far[position] <= allowed:
                matches[offset, factor] = far[position] / allowed, start, position
        self._starts = {scale: start for scale, (_, start, _) in matches.items()}
        return min(matches.values())[1:] if matches else None

    def _later(self, start: int, number: int) -> int | None:
        """Return the position of the ``number``-th different timestep after the one at a position, or None."""
        for position in range(start, len(self)):
            number -= position > start and self._values[position] != self._values[position - 1]
            if number == 0:
                return position
        return None


def timeline_of(pipe: Any) -> Timeline:
    """Return the steps of the run that a pipeline has begun.

    A run that starts in the middle (image to image, ``strength`` below 1) has the steps that remain.
    """
    scheduler = getattr(pipe, "scheduler", None)
    schedule = Schedule(scheduler)
    if not len(schedule):
        return Timeline()
    remaining = getattr(pipe, "_num_timesteps", None)
    if not isinstance(remaining, int) or not 0 < remaining <= len(schedule):
        remaining = len(schedule) - (getattr(scheduler, "begin_index", None) or 0)
    return schedule.timeline(len(schedule) - remaining)


def _different(values: list[float]) -> int:
    return 1 + sum(a != b for a, b in zip(values[1:], values[:-1], strict=True)) if values else 0


def _noise_level_at(scheduler: Any, index: int) -> float | None:
    sigmas = getattr(scheduler, "sigmas", None)
    return float(sigmas[index]) if sigmas is not None and index < len(sigmas) else None
