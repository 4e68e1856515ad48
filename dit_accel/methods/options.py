"""How a config declares an option: its type and range in one annotation, such as ``Annotated[float, ge(0)]``.

A text beside the rules is advice for whoever breaks one: ``Annotated[float, ge(0), "0 skips nothing"]``. An option that
takes any text is taken to name a file or a hub's model, unless its annotation says when it does: ``Annotated[str,
NO_FILE]``.
"""

import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

Note = typing.TypeVar("Note")


@dataclass(frozen=True, slots=True)
class Rule:
    """What a value must be besides of its type.

    Attributes:
        words: what follows "must be" in the error.
        holds: value -> whether it is that.
    """

    words: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class Names:
    """When an option's text names a file or a model of a hub."""

    outside: Callable[[str], bool]  # text -> whether it names one


NO_FILE, JSON_FILE = Names(lambda text: False), Names(lambda text: ".json" in text)
"""Of a text that never names a file, and of one that does where it ends in ``.json``."""


def ge(limit: float) -> Rule:
    """Return the rule that a number is ``limit`` or more."""
    return Rule(f">= {limit:g}", lambda value: value >= limit)


def gt(limit: float) -> Rule:
    """Return the rule that a number is above ``limit``."""
    return Rule(f"above {limit:g}", lambda value: value > limit)


def le(limit: float) -> Rule:
    """Return the rule that a number is ``limit`` or less."""
    return Rule(f"at most {limit:g}", lambda value: value <= limit)


def lt(limit: float) -> Rule:
    """Return the rule that a number is below ``limit``."""
    return Rule(f"below {limit:g}", lambda value: value < limit)


def within(low: float, high: float) -> Rule:
    """Return the rule that a number is from ``low`` to ``high``, both included."""
    return Rule(f"from {low:g} to {high:g}", lambda value: low <= value <= high)


def begins_with(first: float) -> Rule:
    """Return the rule that a list's first number is ``first``."""
    return Rule(f"a list that begins with {first:g}", lambda values: values[:1] == (first,))


Share = Annotated[float, within(0, 1)]
"""A number from 0 to 1."""

Count = Annotated[int, ge(1)]
"""A whole number from 1 on."""

Steps = Annotated[
    int | float,
    Rule(
        "a whole number of steps from 0 on, or a share of the run below 1",
        lambda value: value >= 0 and (value <= 1 or value == int(value)),
    ),
    "write 5 for five steps, 0.2 for a fifth of them",
]
"""A number of steps; below 1 a share of the run's, rounded up."""

BlockSize = Annotated[
    int, Rule("a power of two from 16 to 512", lambda value: 16 <= value <= 512 and not value & (value - 1))
]
"""Tokens of a tile."""


def find_broken(value: Any, hint: Any, fits: Callable[[Any, Any], bool]) -> tuple[str, Any, str] | None:
    """Find the rule that a value breaks: what it must be or hold, in words, its value, and advice; None: none."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        rules = _notes(hint, Rule)
        if all(rule.holds(value) for rule in rules):
            return find_broken(value, parts[0], fits)
        words = " and ".join(rule.words for rule in rules)
        return f"be {words}", value, "".join(_notes(hint, str))
    if origin in (typing.Union, types.UnionType):
        return next((find_broken(value, part, fits) for part in parts if fits(value, part)), None)
    if origin is tuple and (broken := next(filter(None, (find_broken(item, parts[0], fits) for item in value)), None)):
        return f"hold values that are {broken[0].removeprefix('be ')}", *broken[1:]
    return None


def may_name(value: Any, hint: Any, fits: Callable[[Any, Any], bool]) -> bool:
    """Tell whether a value may name a file or a model of a hub, by its annotation; ``fits`` as in `find_broken`."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, (int, float, types.NoneType)) or origin is typing.Literal:
        return False
    if origin is Annotated:
        texts = value if isinstance(value, tuple) else (value,)
        verdicts = [any(map(names.outside, texts)) for names in _notes(hint, Names)]
        return any(verdicts) if verdicts else may_name(value, parts[0], fits)
    if origin in (typing.Union, types.UnionType):
        return any(may_name(value, part, fits) for part in parts if fits(value, part))
    if origin is tuple and isinstance(value, tuple):
        return any(may_name(item, parts[0], fits) for item in value)
    return True


def _notes(hint: Any, kind: type[Note]) -> list[Note]:
    """Return the notes of one kind beside an ``Annotated``'s type."""
    return [note for note in typing.get_args(hint)[1:] if isinstance(note, kind)]
