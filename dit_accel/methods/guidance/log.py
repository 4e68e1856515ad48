"""What a perturbed branch did: which forwards ran, how far from the conditional ones, and a word where none ran."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...report.sections import Section
from ..base import Model
from ..site import ForwardContext
from .rows import Sample, as_rows


class Describable(Protocol):
    """What the report reads of a handler."""

    @property
    def name(self) -> str:
        """The method's name."""
        ...

    @property
    def settings(self) -> Any:
        """Its settings, a `PerturbedConfig`."""
        ...

    @property
    def model(self) -> Model:
        """The model."""
        ...

    @property
    def neutral(self) -> bool:
        """Whether the settings change nothing."""
        ...

    def describe_perturbation(self) -> str:
        """Return in words what is perturbed."""
        ...


class UnperturbedRun(UserWarning):
    """A run perturbed nothing though a method that perturbs was attached."""


@dataclass(frozen=True, slots=True)
class PerturbedForward:
    """One perturbed forward.

    Attributes:
        transformer: component name.
        step_index: the step.
        branch: the branch that was perturbed, or that a perturbed one runs beside.
        distance: |cond - perturbed| / |cond|, a number or a scalar tensor; None: not measured.
        first: block at which it began.
        extra: it ran besides the pipeline's own.
    """

    transformer: str
    step_index: int
    branch: str
    distance: Tensor | None = None
    first: int = 0
    extra: bool = True


def note_of(context: ForwardContext, cond: Sample, perturbed: Sample, first: int | None) -> PerturbedForward:
    """Return what is noted of a perturbed forward; reads nothing back from the device."""
    pairs = list(zip(as_rows(cond), as_rows(perturbed), strict=True))
    apart = torch.stack([torch.linalg.vector_norm(one.float() - other.float()) for one, other in pairs]).norm()
    size = torch.stack([torch.linalg.vector_norm(one.float()) for one, _ in pairs]).norm()
    return PerturbedForward(context.transformer, context.step_index, context.branch, apart / size, first or 0)


def section_of(
    handler: Describable, log: Sequence[PerturbedForward], seen: int, steps_of_run: int | None
) -> Section | None:
    """Return the report's section; None where nothing ran yet."""
    if not seen:
        return None
    extra = sum(one.extra for one in log)
    steps = sorted({one.step_index for one in log})
    measured = [one for one in log if one.distance is not None]
    distances = torch.stack([one.distance for one in measured]).tolist() if measured else []  # type: ignore[misc]
    data: dict[str, Any] = {
        "perturbed": handler.describe_perturbation(),
        "steps": steps,
        "branches": sorted({one.branch for one in log}),
        "forwards_added": extra,
        "first_block": max((one.first for one in log), default=0),
        "distance": {one.step_index: value for one, value in zip(measured, distances, strict=True)},
    }
    title = f"{handler.name}: {handler.describe_perturbation()}; {extra} forwards added in {len(steps)} steps"
    lines = []
    if log and not extra:
        what = f"the unconditional forward was perturbed in {len(steps)} steps"
        title = f"{handler.name}: {handler.describe_perturbation()}; {what}"
    if data["first_block"]:
        lines.append(f"each began at block {data['first_block']}, from the conditional pass")
    if distances:
        lines.append(f"|cond - perturbed| / |cond|: {min(distances):.3g} to {max(distances):.3g}")
    family = handler.model.family
    if extra and family is not None and family.forwards_per_step == 1:
        lines.append(f"guidance is distilled into {family.name}, so that each forward added doubles its step")
    notices = nothing_ran(handler, seen, log, distances), handler.settings.too_short(steps_of_run)
    lines += [line for line in notices if line]
    return Section(method=handler.name, title=title, lines=tuple(lines), data=data)


def nothing_ran(
    handler: Describable, seen: int, log: Sequence[PerturbedForward], distances: Sequence[float] = ()
) -> str | None:
    """Tell why nothing was perturbed in a run of so many forwards, or None."""
    if not seen or handler.neutral:
        return None
    if log:
        same = bool(distances) and max(distances) == 0
        return f"{handler.name} changed nothing: the perturbed prediction is the conditional one" if same else None
    settings = handler.settings
    if settings.mode == "free":
        return (
            f"{handler.name} perturbed nothing: mode = 'free' perturbs the unconditional forward, and none ran; guide "
            "by a negative prompt, or use mode = 'branch'"
        )
    return (
        f"{handler.name} perturbed nothing in {seen} forwards: no step from start = {settings.start} to stop = "
        f"{settings.stop} of the run was conditional; widen the window"
    )


def warn_if_nothing_ran(handler: Describable, seen: int, log: Sequence[PerturbedForward]) -> bool:
    """Warn if nothing was perturbed in a run; tell whether it warned."""
    reason = nothing_ran(handler, seen, log)
    if reason is not None:
        warnings.warn(reason, UnperturbedRun, stacklevel=3)
    return reason is not None
