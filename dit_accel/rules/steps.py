"""Shares of a run turned into steps: the one place where they are rounded."""

import math


def steps_of(share: int | float, count: int) -> int:
    """Count the steps of a share, from 0 to 1, of a run of ``count``, rounded up.

    The share is taken as the decimal that was written: .28 of 25 is 7, though in binary .28 x 25 lies a little above.
    """
    return math.ceil(round(share * count, 9))


def whole_steps(steps: int | float, count: int) -> int:
    """Count the steps that an option asks for: a whole number or, below 1, a share of a run of ``count``."""
    return steps_of(steps, count) if 0 < steps < 1 else int(steps)


def window(start: float, stop: float, count: int) -> range:
    """Return the steps of a run of ``count`` from one share of it to another, never none.

    Step i of n is in where start <= i / n < stop. Where no step is, it is the first one from ``start`` on, or the last
    of the run.
    """
    first = min(steps_of(start, count), count - 1)
    return range(first, max(steps_of(stop, count), first + 1))


def is_short(start: float, stop: float, count: int) -> bool:
    """Tell whether a window is shorter than one step of the run."""
    return round((stop - start) * count, 9) < 1
