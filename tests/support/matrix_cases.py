"""The cases of the matrix: (pipeline, method, situation), which of them are run when, and what is wrong in them."""

import zlib
from collections import Counter
from functools import cache

from matrix_limits import declared, limits
from matrix_methods import METHODS
from matrix_situations import SITUATIONS, Plain, Trial, prepare
from tiny_stock import PIPELINES

from dit_accel import ConfigError

LONG = ("Cosmos", "CogVideoXVideo", "EasyAnimate", "Helios", "HunyuanVideo15", "LTX2", "LTXI2V", "SkyReels")
"""How the names begin of pipelines whose runs take seconds: `make test` has others."""

EACH = 1
"""Situations of every pair of a pipeline and a method that `make test-slow` runs."""

Case = tuple[str, str]
"""(method, situation)."""


@cache
def plain_of(name: str) -> Plain:
    """A pipeline, made once a process."""
    return Plain(name)


def wrong_in(name: str, cases: list[Case]) -> list[str]:
    """Run some cases of a pipeline and say what is wrong; what is attached is kept from case to case."""
    plain, found = plain_of(name), []
    for situation in dict.fromkeys(one for _, one in cases):
        prepare(situation, plain)
    for method in dict.fromkeys(method for method, _ in cases):
        trial = Trial(plain, method)
        why = declared(trial)
        try:
            trial.fresh()
            for situation in [one for of, one in cases if of == method]:
                found += [f"{method}, {situation}: {line}" for line in _tried(trial, situation, why)]
        except ConfigError as error:
            if why is None or why not in str(error):
                found.append(f"{method}: refused though nothing declares it: {error}")
        finally:
            trial.close()
    return found


def _tried(trial: Trial, situation: str, why: str | None) -> list[str]:
    try:
        lines = SITUATIONS[situation](trial)
    except ConfigError as error:
        trial.fresh()
        if why is not None and why in str(error):
            return []
        return [f"refused though nothing declares it: {error}"]
    except Exception as error:
        trial.fresh()
        return [f"{type(error).__name__}: {error}"]
    if why is not None and situation == "one prompt":
        lines.append(f"it ran, and must be refused: {why}")
    return lines


def cases_of(name: str) -> list[Case]:
    """All cases of a pipeline, in an order of its own; what is refused is tried once."""
    known = limits()[name]
    possible = [one for one in SITUATIONS if one not in known.cannot]
    cases = [(method, one) for method in METHODS if method not in known.refused for one in possible]
    cases += [(method, "one prompt") for method in known.refused]
    return sorted(cases, key=lambda case: zlib.crc32(f"{name} {case}".encode()))


@cache
def few() -> dict[str, Case]:
    """One case of every pipeline, the methods and the situations in turn: of those that were least, one not yet had."""
    chosen: dict[str, Case] = {}
    seen: Counter[object] = Counter()
    for name in PIPELINES:
        running = [case for case in cases_of(name) if case[0] not in limits()[name].refused]
        chosen[name] = min(running, key=lambda case: (seen[case], seen[case[0]] + seen[case[1]]))
        seen.update([chosen[name], *chosen[name]])
    return chosen


@cache
def quick() -> tuple[str, ...]:
    """Pipelines of all kinds, as few as have among their one case every method and every situation."""
    names, seen = [name for name in few() if not name.startswith(LONG)], set[str]()
    spread, chosen = [*names[::3], *names[1::3], *names[2::3]], []
    for new in (2, 1):  # first those whose method and situation are both not yet had
        for name in spread:
            if len(set(few()[name]) - seen) >= new:
                chosen.append(name)
                seen |= set(few()[name])
    return tuple(chosen)


def many(name: str) -> list[Case]:
    """Cases of a pipeline with every method in `EACH` situations, every situation among them or in `few`."""
    return _many()[name]


@cache
def _many() -> dict[str, list[Case]]:
    """`many` of all pipelines: of what a pipeline can, first the cases that the fewest others have."""
    taken: Counter[Case] = Counter(few().values())
    return {name: _many_of(name, taken) for name in PIPELINES}


def _many_of(name: str, taken: Counter[Case]) -> list[Case]:
    left, chosen = [case for case in cases_of(name) if case != few()[name]], []
    situations: Counter[str] = Counter([few()[name][1]])
    for method in METHODS:
        mine = [case for case in left if case[0] == method]
        for _ in range(min(EACH, len(mine))):
            best = min(mine, key=lambda case: (taken[case], situations[case[1]]))
            mine.remove(best)
            chosen.append(best)
            situations[best[1]] += 1
    missing = [next((case for case in left if case[1] == one), None) for one in SITUATIONS if not situations[one]]
    chosen += [case for case in missing if case is not None]
    taken.update(chosen)
    return chosen
