"""What a step cache did: one entry a forward, and the report's section made of them."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...report.sections import Section, Strip


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedForward:
    """One forward of the last generation."""

    transformer: str  # component name
    step_index: int  # 0-based step
    branch: str  # name of the denoising call
    reused: bool  # it was skipped, and a forecast given
    reason: str  # why
    value: float | None = None  # the indicator; None where it was not requested


def extended(section: Section | None, lines: Iterable[str], **data: Any) -> Section | None:
    """Return a section with further lines and data; None stays None."""
    return section and replace(section, lines=(*section.lines, *lines), data={**section.data, **data})


def section_of(method: str, forwards: list[CachedForward], threshold: float | None) -> Section | None:
    """Return the report's section: what was computed and reused by branch, and why; None where nothing ran."""
    if not forwards:
        return None
    branches: dict[tuple[str, str], list[CachedForward]] = {}
    for entry in forwards:
        branches.setdefault((entry.transformer, entry.branch), []).append(entry)
    lines = [
        f"{transformer}, {branch}: {''.join('.' if entry.reused else '#' for entry in entries)}"
        for (transformer, branch), entries in branches.items()
    ]
    strips = tuple(
        Strip(
            transformer=transformer, branch=branch, steps=tuple(entry.step_index for entry in entries),
            reused=tuple(entry.reused for entry in entries), values=tuple(entry.value for entry in entries),
            threshold=threshold,
        )
        for (transformer, branch), entries in branches.items()
    )  # fmt: skip
    measured = [entry.value for entry in forwards if entry.value is not None]
    lines += [_spread(measured, threshold)] if measured else []
    reused = sum(entry.reused for entry in forwards)
    data = {
        "forwards": [asdict(entry) for entry in forwards], "reused": reused, "computed": len(forwards) - reused,
        "threshold": threshold,
    }  # fmt: skip
    title = f"{method}: {reused} of {len(forwards)} forwards reused (# computed, . reused)"
    return Section(method=method, title=title, lines=tuple(lines), data=data, strips=strips)


def _spread(measured: list[float], threshold: float | None) -> str:
    """Return between what an indicator lay, and its threshold, in words."""
    numbers = [value for value in measured if not math.isnan(value)]
    spread = f"indicator {min(numbers):.3g} to {max(numbers):.3g}" if numbers else "indicator not a number"
    return spread if threshold is None else f"{spread}, threshold {threshold:g}"
