"""What a method of guidance did in a run, and a word where it did nothing."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...report.sections import Strip
from ..base import Handler, Model, Phase
from ..gradients import is_recorded
from ..site import ForwardContext
from .guidance_config import WindowedConfig
from .rows import Sample, as_rows


class UnperturbedRun(UserWarning):
    """A run perturbed nothing though a method that perturbs was attached."""


class WindowedHandler(Handler, ABC):
    """A method of guidance on one model that acts in a part of the run, and notes in which forwards it did."""

    phase = Phase.GUIDANCE
    settings: WindowedConfig

    did: ClassVar[str] = "perturbed"
    """What it does to a forward, for the warning that it did so to none."""

    def __init__(self, config: Any, model: Model) -> None:
        super().__init__(config, model)
        self._log: list[Any] = []
        self._seen = 0
        self._steps: int | None = None
        self._warned = self._warned_of_window = False

    @property
    @abstractmethod
    def neutral(self) -> bool:
        """Whether the settings change nothing."""

    def acts(self, context: ForwardContext, latents: Any) -> bool:
        """Tell whether it acts in a forward; it counts that, and warns once of a window that is too short."""
        if self.neutral or context.training or is_recorded(latents):
            return False
        self._seen, self._steps = self._seen + 1, context.num_inference_steps
        if not self._warned_of_window and (short := self.settings.too_short(self._steps)):
            self._warned_of_window = True
            warnings.warn(short, UserWarning, stacklevel=3)
        return self.settings.acts(context.step_index, context.num_inference_steps)

    def nothing_done(self) -> str | None:
        """Tell why nothing was done in a run, or None."""
        if not self._seen or self._log:
            return None
        return (
            f"{self.name} {self.did} nothing in {self._seen} forwards: no step from start = {self.settings.start} to "
            f"stop = {self.settings.stop} of the run was conditional; widen the window"
        )

    def warn_of_nothing(self) -> None:
        """Warn, once, if nothing was done in a run."""
        if not self._warned and (reason := self.nothing_done()):
            self._warned = True
            warnings.warn(reason, UnperturbedRun, stacklevel=3)

    def begin_run(self) -> None:
        """Say once if nothing was done in the run that ended, and forget it."""
        self.warn_of_nothing()
        self._log, self._seen = [], 0


@dataclass(frozen=True, slots=True)
class PerturbedForward:
    """One perturbed forward."""

    transformer: str  # component name
    step_index: int  # the step
    branch: str  # the branch that was perturbed, or that a perturbed one runs beside
    distance: Tensor | None = None  # |cond - perturbed| / |cond|, a number or a scalar tensor; None: not measured
    first: int = 0  # block at which it began
    extra: bool = True  # it ran besides the pipeline's own


def strips_of(did: str, log: Sequence[tuple[str, int, str, float | None]], measured: str = "") -> tuple[Strip, ...]:
    """Return the strips that `Report.plot` draws of guidance: the steps in which it acted, and what it measured there.

    ``log``: transformer, step, branch and what was measured, of each forward in which it acted.
    """
    strips: list[Strip] = []
    for transformer, branch in dict.fromkeys((entry[0], entry[2]) for entry in log):
        values = {step: value for name, step, of, value in log if (name, of) == (transformer, branch)}
        strips.append(
            Strip(
                transformer=transformer, branch=branch, steps=tuple(values), reused=(False,) * len(values),
                values=tuple(values.values()), did=did, measured=measured,
            )
        )  # fmt: skip
    return tuple(strips)


def distances_of(log: Sequence[PerturbedForward]) -> list[float | None]:
    """Return the distance of each forward, or None; all are read at once, since a read waits for the device."""
    measured = [entry.distance for entry in log if entry.distance is not None]
    values = iter(torch.stack(measured).tolist() if measured else ())
    return [None if entry.distance is None else next(values) for entry in log]


def note_of(context: ForwardContext, cond: Sample, perturbed: Sample, first: int | None) -> PerturbedForward:
    """Return the note on a perturbed forward; reads nothing back from the device."""
    pairs = list(zip(as_rows(cond), as_rows(perturbed), strict=True))
    apart = torch.stack([torch.linalg.vector_norm(row.float() - other.float()) for row, other in pairs]).norm()
    size = torch.stack([torch.linalg.vector_norm(row.float()) for row, _ in pairs]).norm()
    return PerturbedForward(context.transformer, context.step_index, context.branch, apart / size, first or 0)
