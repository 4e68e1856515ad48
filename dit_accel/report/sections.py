"""A section of the report: what one method says about its run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """In which forwards of one transformer and branch a method acted, in the order of the run; `Report.plot` draws it.

    Attributes:
        transformer: component name.
        branch: name of the denoising call.
        steps: 0-based steps.
        reused: for each step, whether it was skipped, and a forecast given.
        values: for each step, what decided; None where nothing was measured.
        threshold: what that was compared with; None: with nothing.
        did: what the method did in the steps that are drawn as bars.
        measured: what ``values`` are.
    """

    transformer: str
    branch: str
    steps: tuple[int, ...]
    reused: tuple[bool, ...]
    values: tuple[float | None, ...]
    threshold: float | None = None
    did: str = "computed"
    measured: str = "what decided"


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """What one method did in the last generation.

    Attributes:
        method: the method's name.
        title: one line.
        lines: what a reader should know, a line each.
        data: the same as plain values, for JSON and for tools.
        strips: what to draw of it.
    """

    method: str
    title: str
    lines: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    strips: tuple[Strip, ...] = ()

    def __str__(self) -> str:
        return "\n".join([self.title, *(f"  {line}" for line in self.lines)])
