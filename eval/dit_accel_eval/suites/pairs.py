"""Pairs of arms that a suite declares before it runs, such as ours against another project's.

A table of ``[[compare]]`` has an ``arm``, the arm ``against`` which it is compared, and the ``margin`` in dB that it is
to be ahead by, 0 where none is given. The pairs of a suite are judged together, see `figures.pair_figures`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dit_accel import ConfigError
from dit_accel.errors import did_you_mean

from .arms import Arm, check_kinds

KINDS = {"arm": str, "against": str, "margin": (int, float)}
"""Key of a pair -> what it must be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """An arm, what it is held against, and by how many dB it is to be ahead."""

    arm: str
    against: str
    margin: float = 0.0

    def __str__(self) -> str:
        return f"{self.arm} vs {self.against}"


def read_pairs(tables: Sequence[Any], arms: Sequence[Arm], where: str) -> tuple[Pair, ...]:
    """Return the pairs of a suite's ``[[compare]]`` tables."""
    names, found = [arm.name for arm in arms], list[Pair]()
    for values in tables:
        if not isinstance(values, dict):
            raise ConfigError(f"{where} has compare = {values!r}; write [[compare]] with arm and against below it")
        check_kinds(values, KINDS, f"{where}: compare")
        missing = [key for key in ("arm", "against") if key not in values]
        if missing:
            raise ConfigError(f"{where} has a [[compare]] without {' and '.join(missing)}; name two of its arms")
        pair = Pair(**values)
        for name in (pair.arm, pair.against):
            if name not in names:
                raise ConfigError(f"{where} compares {name!r}, which is none of its arms; {did_you_mean(name, names)}")
        if pair.arm == pair.against or str(pair) in map(str, found):
            raise ConfigError(f"{where} compares {pair.arm!r} with {pair.against!r}, itself or a second time; drop it")
        found.append(pair)
    return tuple(found)
