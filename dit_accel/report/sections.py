"""A section of the report: what one method says about its run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """In which forwards of one transformer and branch a method acted, in order; `Report.plot` draws it."""

    transformer: str  # component name
    branch: str  # name of the denoising call
    steps: tuple[int, ...]  # 0-based steps
    reused: tuple[bool, ...]  # for each step, whether it was skipped, and a forecast given
    values: tuple[float | None, ...]  # for each step, what decided; None where nothing was measured
    threshold: float | None = None  # what that was compared with; None: with nothing
    did: str = "computed"  # what the method did in the steps that are drawn as bars
    measured: str = "what decided"  # what ``values`` are


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """What one method did in the last generation."""

    method: str  # the method's name
    title: str  # one line
    lines: tuple[str, ...] = ()  # what a reader should know, a line each
    data: Mapping[str, Any] = field(default_factory=dict)  # the same as plain values, for JSON and for tools
    strips: tuple[Strip, ...] = ()  # what to draw of it

    def __str__(self) -> str:
        return "\n".join([self.title, *(f"  {line}" for line in self.lines)])
