"""Searches the highest threshold whose error is within a target, over a scale of log2 levels."""

import math
from collections.abc import Callable

LOWEST, HIGHEST = -20.0, -(2.0**-6)
"""Log2 levels between which thresholds are searched."""

START = -10.0
"""Where a search begins without a hint: the published threshold."""

FIRST_STRIDE = 0.5
NEAR = 0.9
"""Share of the target error at which a search is over."""

CLOSE = 0.03125
"""Log2 units at which a search is over: tiles are whole, so not every error can be met."""


def search_level(error_at: Callable[[float], float], target: float, start: float = START) -> float:
    """Return the highest log2 level found whose error is within the target; -inf where even `LOWEST` exceeds it."""
    low, high, stride = -math.inf, math.inf, FIRST_STRIDE
    level = min(max(start, LOWEST), HIGHEST)
    while high - low >= CLOSE:
        error = error_at(level)
        if error <= target:
            low = level
            if error >= NEAR * target or level == HIGHEST:
                break
        else:
            high = level
            if level == LOWEST:
                break
        if math.isinf(high - low):  # not between two levels yet: go on in longer and longer strides
            level = min(low + stride, HIGHEST) if low > -math.inf else max(high - stride, LOWEST)
            stride *= 2
        else:
            level = (low + high) / 2
    return low
