"""What the judges of suites share: each arm with the arm that it is held against, and their difference in a cell."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from dit_accel_eval.runs.results import Line
from dit_accel_eval.statistics import clip_mean
from dit_accel_eval.suites.arms import Arm
from dit_accel_eval.suites.suite import Suite


def plain(suite: Suite, arm: Arm) -> Arm | None:
    """Return the arm of a suite that differs from another only in having no methods."""
    without = {**arm.to_dict(), "methods": {}}
    return next((other for other in suite.arms if other is not arm and other.to_dict() == without), None)


def held_arms(
    suite: Suite, lines: Sequence[Line], rival_of: Callable[[Suite, Arm, Sequence[Line]], Arm | None] | None = None
) -> Iterator[tuple[Arm, dict[int, Line], Arm | None, dict[int, Line]]]:
    """Give each arm that ran with its lines by clip, and its rival, by default the `plain` arm, with its lines."""
    by_arm = {arm.name: {line["clip"]: line for line in lines if line["arm"] == arm.name} for arm in suite.arms}
    for arm in suite.arms:
        if by_arm[arm.name]:
            rival = rival_of(suite, arm, lines) if rival_of else plain(suite, arm)
            yield arm, by_arm[arm.name], rival, by_arm[rival.name] if rival else {}


def paired_cell(
    clips: Mapping[int, Mapping[str, Any]], rivals: Mapping[int, Mapping[str, Any]], name: str, *, scale: float = 1.0,
    ratio: bool = False,
) -> str:  # fmt: skip
    """Return a table's cell of the paired difference, or ratio, of an arm and its rival in a measure; "" without.

    The mean with its interval, from `FEWEST` clips on, and the number of clips where some have no finite value.
    """
    both = sorted(set(clips) & set(rivals))
    pairs = [(clips[clip].get(name, np.nan), rivals[clip].get(name, np.nan)) for clip in both]
    values = [scale * (x / y if ratio else x - y) for x, y in pairs if np.isfinite(x - y)]
    if not values:
        return ""
    return f"{clip_mean(values)}" + (f" ({len(values)})" if len(values) < len(both) else "")
