"""Where the denoising stands, as far as the call stack, timesteps and schedulers show it; for what doesn't tell it.

The pipeline in whose call a forward runs is read off the stack, since several may share a transformer.
"""

import math
import sys
import threading
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.noise import listed_level

EQUAL = 1e-3
"""Timesteps nearer than this share of their mean distance are one: a solver's second evaluation, off by rounding."""


class Course:
    """The timesteps that the forwards of one run were given, and which way they go: up or down, as the model has it."""

    def __init__(self) -> None:
        self.ends: tuple[float, float] | None = None
        self._way = 0.0  # -1: they fall, and the highest is the noisiest; 1: they rise; 0: not known yet
        self._far, self._moves = 0.0, 0

    @property
    def noisiest(self) -> tuple[float, ...]:
        """The timestep of the noisiest frame or row: both ends of the range until it moves, nothing at first."""
        if self.ends is None:
            return ()
        return self.ends if self._way == 0 else (self.ends[self._way < 0],)

    def move(self, timestep: Tensor) -> int:
        """Note a forward's timestep; return 1 where it went on, -1 where it turned back, 0 where it is unchanged.

        ``timestep``: one per row, frame or token, or per several of these; what is given as clean keeps its own.
        """
        low, high = torch.stack(timestep.aminmax()).tolist()
        if self.ends is None:
            self.ends = low, high
            return 0
        moved = low - self.ends[0], high - self.ends[1]
        if self._way == 0:
            self._way = math.copysign(1.0, most) if (most := max(moved, key=abs)) else 0.0
        by = moved[self._way < 0]
        if abs(by) <= EQUAL * self._far / max(self._moves, 1):
            return 0
        self.ends = low, high
        self._far, self._moves = self._far + abs(by), self._moves + 1
        return int(math.copysign(1, by * self._way))


def noise_level(scheduler: Any) -> float | None:
    """Return the noise level of the step that a scheduler is about to take, or None where it does not tell."""
    index = getattr(scheduler, "step_index", None)
    if index is None:
        index = getattr(scheduler, "begin_index", None) or 0
    return listed_level(scheduler, index)


@dataclass(frozen=True, slots=True)
class Timeline:
    """The steps of one run, as its scheduler lays them out."""

    steps: int | None = None  # how many there are; None where it is not known
    # the scheduler evaluates the model at a point between two steps too (DPM2), so that two timesteps make one step,
    # except for the first
    halves: bool = False
    repeats: bool = False  # it evaluates the model twice at a timestep (Heun), which is one step

    def step_of(self, number: int) -> int:
        """Return the step of the ``number``-th different timestep of the run, from 0."""
        return (number + 1) // 2 if self.halves else number


class Schedule:
    """The timesteps that a scheduler has laid out, read off it once, and a run through them.

    Pipelines hand a model the timestep as the scheduler lists it, divided by the number of timesteps that the model was
    trained on, or one of these two counted from the other end.

    ``start``: position in its list at which the run begins.
    """

    def __init__(self, scheduler: Any, start: int = 0) -> None:
        self._scheduler, self._start = scheduler, start
        timesteps = getattr(scheduler, "timesteps", None)
        values = timesteps.tolist() if isinstance(timesteps, Tensor) else timesteps
        self._values = [float(value) for value in values] if values is not None else []
        self._numbers = _numbered(self._values)
        config = getattr(scheduler, "config", None)
        self._trained = float(getattr(config, "num_train_timesteps", None) or 1000)
        self._starts: dict[tuple[float, float], int] = {}  # offset and factor of a timestep -> where the run began

    def __len__(self) -> int:
        return len(self._values)

    def timeline(self, start: int | None = None) -> Timeline:
        """Return the steps of a run that begins at a position, counted from 0; None: where this one does."""
        numbers = self._numbers[self._start if start is None else start :]
        remaining, different = len(numbers), numbers[-1] - numbers[0] + 1 if numbers else 0
        halves = getattr(self._scheduler, "order", 1) == 2 and different == remaining > 1
        return Timeline((different + 2) // 2 if halves else different, halves, repeats=different < remaining)

    def number(self) -> int | None:
        """Return which of the run's different timesteps the scheduler is about to take; None: it does not tell."""
        index = getattr(self._scheduler, "step_index", None)
        if not isinstance(index, int) or not self._start <= index < len(self):
            return None
        return self._numbers[index] - self._numbers[self._start]

    def is_over(self, number: int) -> bool:
        """Tell whether the ``number``-th of the run's different timesteps is the last that is listed."""
        return not self._numbers or number >= self._numbers[-1] - self._numbers[self._start]

    def sigma(self, number: int) -> float | None:
        """Return the noise level of a run's ``number``-th different timestep."""
        if self.number() is not None:
            return noise_level(self._scheduler)
        position = self._later(self._start, number)
        return None if position is None else self.noise_level(position)

    def noise_level(self, position: int) -> float | None:
        """Return the noise level of the timestep at a position, or None where there is none."""
        return listed_level(self._scheduler, position)

    def follow(self, timesteps: Sequence[float], dtype: torch.dtype | None, number: int) -> tuple[int, int] | None:
        """Return at which positions a run began and stands; None: it does not follow the list, one after the other.

        A scheduler whose number of steps was never set lists all that the model was trained on: no run's.

        Args:
            timesteps: the noisiest one that a forward is given; several where it is not known which that is.
            dtype: of the tensor that held it, which tells how it was rounded; None: it was in none.
        """
        if getattr(self._scheduler, "num_inference_steps", None) is None and len(self) == self._trained:
            return None
        whole = dtype is not None and not dtype.is_floating_point  # cut off, so up to 1 away from the list's
        epsilon = 1e-5 if dtype is None or whole else max(1e-5, torch.finfo(dtype).eps)
        trained, matches = self._trained, {}
        # how a pipeline hands timesteps on shows in the first one; those after it must follow in the same way
        scales = ((0, 1), (0, 1 / trained), (trained, -1), (1, -1 / trained)) if number == 0 else tuple(self._starts)
        for offset, factor in scales:
            far = [min(abs(offset + factor * value - timestep) for timestep in timesteps) for value in self._values]
            # only the first may begin anywhere, as image to image does
            start = far.index(min(far)) if number == 0 and far else self._starts.get((offset, factor), 0)
            position = self._later(start, number)
            allowed = abs(factor) * (trained * epsilon + (whole and abs(factor) == 1))
            if position is not None and far[position] <= allowed:
                matches[offset, factor] = far[position] / allowed, start, position
        self._starts = {scale: start for scale, (_, start, _) in matches.items()}
        return min(matches.values())[1:] if matches else None

    def _later(self, start: int, number: int) -> int | None:
        """Return the position of the ``number``-th different timestep after the one at a position, or None."""
        wanted = self._numbers[start] + number if start < len(self) else -1
        return self._numbers.index(wanted, start) if wanted in self._numbers[start:] else None


def schedule_of(pipe: Any) -> Schedule:
    """Return the timesteps of the run that a pipeline has begun.

    A run that starts in the middle (image to image, ``strength`` below 1) has the steps that remain.
    """
    scheduler = getattr(pipe, "scheduler", None)
    whole = len(Schedule(scheduler))
    remaining = getattr(pipe, "_num_timesteps", None)
    if not isinstance(remaining, int) or not 0 < remaining <= whole:
        remaining = whole - (getattr(scheduler, "begin_index", None) or 0)
    return Schedule(scheduler, whole - remaining)


def timeline_of(pipe: Any) -> Timeline:
    """Return the steps of the run that a pipeline has begun."""
    schedule = schedule_of(pipe)
    return schedule.timeline() if len(schedule) else Timeline()


def _numbered(values: Sequence[float]) -> list[int]:
    """Return which of the different timesteps each of a list is, from 0."""
    gaps = [abs(value - other) for value, other in zip(values[1:], values[:-1], strict=True)]
    least = EQUAL * sum(gaps) / max(len(gaps), 1)
    numbers = [0] if values else []
    for gap in gaps:
        numbers.append(numbers[-1] + (gap > least))
    return numbers


_PIPELINES = (
    ("diffusers.pipelines.pipeline_utils", "DiffusionPipeline"),
    ("diffusers.modular_pipelines.modular_pipeline", "ModularPipeline"),
)
"""Where diffusers keeps the base classes of its pipelines; only looked up, never imported."""


@dataclass(frozen=True, slots=True, eq=False)
class PipelineRun:
    """One call of a pipeline, as the forwards inside it see it."""

    _pipe: Callable[[], Any]
    _code: types.CodeType
    thread: int  # the thread in which it runs
    frame: int  # number of its stack frame, unique among those that exist at one time

    @property
    def pipe(self) -> Any:
        """The pipeline; None where it is gone."""
        return self._pipe()

    def is_same(self, other: "PipelineRun | None") -> bool:
        """Tell whether another one is the same call, of those that are still running."""
        return (
            other is not None and (self.thread, self.frame) == (other.thread, other.frame) and self.pipe is other.pipe
        )

    def goes_on(self) -> bool:
        """Tell whether the call has not returned yet; its thread may be another one."""
        frame = sys._current_frames().get(self.thread)
        while frame is not None:
            if id(frame) == self.frame and frame.f_code is self._code:
                return True
            frame = frame.f_back
        return False


def current_run(transformer: nn.Module) -> PipelineRun | None:
    """Return the call of a pipeline that is running and holds a transformer, or None: a loop written by hand runs it.

    diffusers does not tell a transformer who calls it, and any number of pipelines may share one
    (``Other(**pipe.components)``, ``from_pipe``), each with numbers of its own.
    The transformer is the module itself, not what ``torch.compile`` made of it.
    """
    kinds = tuple(
        kind for module, name in _PIPELINES if (kind := getattr(sys.modules.get(module), name, None)) is not None
    )
    frame = sys._getframe(1) if kinds else None
    while frame is not None:
        code = frame.f_code
        # reading a frame's variables keeps them alive as long as it runs: only of what may be a pipeline's call
        if code.co_name == "__call__" and code.co_varnames[:1] == ("self",):
            owner = frame.f_locals.get("self")
            if isinstance(owner, kinds) and _holds(owner, transformer):
                return PipelineRun(weakref.ref(owner), code, threading.get_ident(), id(frame))
        frame = frame.f_back
    return None


def _holds(pipe: Any, transformer: nn.Module) -> bool:
    return any(getattr(part, "_orig_mod", part) is transformer for part in vars(pipe).values())
