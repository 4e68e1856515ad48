"""What a step cache did: one entry a forward, and the report's section made of them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ...report.sections import Section, Strip


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedForward:
    """One forward of the last generation.

    Attributes:
        transformer: component name.
        step_index: 0-based step.
        branch: name of the denoising call.
        reused: it was skipped, and a forecast given.
        reason: why.
        value: the indicator; None where it was not requested.
    """

    transformer: str
    step_index: int
    branch: str
    reused: bool
    reason: str
    value: float | None = None


def extended(section: Section | None, lines: Iterable[str], **data: Any) -> Section | None:
    """Return a section with further lines and data; None stays None."""
    return section and replace(section, lines=(*section.lines, *lines), data={**section.data, **data})


def section_of(method: str, forwards: list[CachedForward], threshold: float | None) -> Section | None:
    """Return the report's section: what was computed and reused by branch, and why; None where nothing ran."""
    if not forwards:
        return None
    reused = sum(entry.reused for entry in forwards)
    lines, strips = [], []
    for transformer, branch in dict.fromkeys((entry.transformer, entry.branch) for entry in forwards):
        own = [entry for entry in forwards if (entry.transformer, entry.branch) == (transformer, branch)]
        drawn = "".join("." if entry.reused else "#" for entry in own)
        lines.append(f"{transformer}, {branch}: {drawn}")
        strips.append(
            Strip(
                transformer=transformer, branch=branch, steps=tuple(entry.step_index for entry in own),
                reused=tuple(entry.reused for entry in own), values=tuple(entry.value for entry in own),
                threshold=threshold,
            )
        )  # fmt: skip
    if any(entry.value is not None for entry in forwards):
        values = [entry.value for entry in forwards if entry.value is not None and entry.value == entry.value]
        spread = f"{min(values):.3g} to {max(values):.3g}" if values else "not a number"
        lines.append(f"indicator {spread}, threshold {threshold:g}" if threshold is not None else f"indicator {spread}")
    data: dict[str, Any] = {
        "forwards": [{name: getattr(entry, name) for name in entry.__slots__} for entry in forwards],
        "reused": reused,
        "computed": len(forwards) - reused,
        "threshold": threshold,
    }
    title = f"{method}: {reused} of {len(forwards)} forwards reused (# computed, . reused)"
    return Section(method=method, title=title, lines=tuple(lines), data=data, strips=tuple(strips))
