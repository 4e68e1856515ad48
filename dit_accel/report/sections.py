"""A section of the report: what one method says about its run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """What one method did in the last generation.

    Attributes:
        method: the method's name.
        title: one line.
        lines: what a reader should know, a line each.
        data: the same as plain values, for JSON and for tools.
    """

    method: str
    title: str
    lines: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join([self.title, *(f"  {line}" for line in self.lines)])
