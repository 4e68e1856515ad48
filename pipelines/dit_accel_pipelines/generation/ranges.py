"""How an option declares which numbers it takes: by a `Range` in its annotation, ``Annotated[int, at_least(1)]``."""

import functools
import math
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dit_accel.errors import ConfigError, did_you_mean


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers that an option takes."""

    words: str  # what follows "must be" in the error
    holds: Callable[[Any], bool]  # number -> whether it is one of them


FINITE = Range("a finite number", math.isfinite)
ABOVE_ZERO = Range("above 0", lambda number: 0 < number < math.inf)
SHARE = Range("a share from 0 to below 1", lambda number: 0 <= number < 1)


def at_least(low: int) -> Range:
    """Return the range of finite numbers from ``low`` on."""
    return Range(f"{low} or more", lambda number: low <= number < math.inf)


def between(low: float, high: float, kind: str = "") -> Range:
    """Return the range from ``low`` to ``high``, both included."""
    return Range(f"{kind}from {low:,} to {high:,}", lambda number: low <= number <= high)


def check_ranges(options: Any) -> None:
    """Raise `ConfigError` for the first number of a dataclass that is set and outside its range."""
    for name, range_ in _ranges(type(options)).items():
        number = getattr(options, name)
        if number is not None and not range_.holds(number):
            shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
            raise ConfigError(f"{name} must be {range_.words}, got {shown}")


def check_choices(options: Any, choices: Mapping[str, Collection[str]], end: str = "") -> None:
    """Raise `ConfigError` for the first option that is set and none of its names; ``end`` stands behind the value."""
    for name, known in choices.items():
        value = getattr(options, name)
        if value is not None and value not in known:
            raise ConfigError(f"there is no {name} {value!r}{end}; {did_you_mean(value, known)}")


@functools.cache
def _ranges(kind: type) -> Mapping[str, Range]:
    hints = typing.get_type_hints(kind, include_extras=True)
    declared = {
        name: [part for part in typing.get_args(hint) if isinstance(part, Range)] for name, hint in hints.items()
    }
    return {name: ranges[0] for name, ranges in declared.items() if ranges}
