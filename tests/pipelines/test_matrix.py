"""Every stock pipeline of diffusers that an adapter covers, with every method, in every situation of a user's day.

Each row of a batch is that row alone, a second run is the first, whatever ran before; what does not go together is
refused by name, as the adapter declares. `make test` runs a few cases that have each method in each situation and every
pipeline in some, `make test-slow` every method on every pipeline, `make test-pipelines` all there is.
"""

import time
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache

import pytest
from matrix_classes import covered, pipeline_classes
from matrix_limits import forwards_of, found_of, limits
from matrix_methods import METHODS, names_of
from matrix_refusals import declared
from matrix_situations import SITUATIONS, Plain, Trial, prepare
from matrix_stock import NOT_BUILT, PIPELINES

from dit_accel import ConfigError
from dit_accel.methods.registry import handlers

Case = tuple[str, str]
"""(method, situation)."""


@cache
def plain_of(name: str) -> Plain:
    """A pipeline, made once a process."""
    return Plain(name, PIPELINES[name])


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
def few() -> dict[str, list[Case]]:
    """The fewest cases that have every method in every situation somewhere, at least one of every pipeline."""
    left = {name: cases_of(name) for name in PIPELINES}
    chosen: dict[str, list[Case]] = {name: [] for name in PIPELINES}
    seen: set[Case] = set()
    missing = {case for cases in left.values() for case in cases}
    while missing - seen:
        for name, cases in left.items():
            new = [case for case in cases if case not in seen]
            if new or not chosen[name]:
                chosen[name].append((new or cases)[0])
                seen.add(chosen[name][-1])
    return chosen


def many(name: str) -> list[Case]:
    """Cases of a pipeline with every method in `EACH` situations, every situation among them, others beside `few`."""
    left, chosen = [case for case in cases_of(name) if case not in few()[name]], []
    situations: Counter[str] = Counter()
    for method in METHODS:
        mine = [case for case in left if case[0] == method]
        for _ in range(min(EACH, len(mine))):
            best = min(mine, key=lambda case: situations[case[1]])
            mine.remove(best)
            chosen.append(best)
            situations[best[1]] += 1
    return chosen


def require_right(name: str, cases: list[Case], record: Callable[[str, object], None]) -> None:
    """Run cases of a pipeline; all that is wrong is said at once."""
    began = time.perf_counter()
    found = wrong_in(name, sorted(cases, key=lambda case: (case[0], list(SITUATIONS).index(case[1]))))
    record("cases", len(cases))
    record("seconds", time.perf_counter() - began)
    assert not found, f"{name}:\n" + "\n".join(found)


EACH = 2


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_right_with_some_methods_in_some_situations(name, record_property):
    require_right(name, few()[name], record_property)


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_right_with_every_method(name, record_property):
    require_right(name, many(name), record_property)


@pytest.mark.slow
@pytest.mark.rare
@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_right_with_every_method_in_every_situation(name, record_property):
    require_right(name, cases_of(name), record_property)


@pytest.mark.slow
@pytest.mark.rare
@pytest.mark.parametrize("name", PIPELINES)
def test_what_diffusers_cannot_do_is_no_more_than_that(name):
    assert found_of(plain_of(name)) == limits()[name]


def test_every_pipeline_class_is_in_the_matrix():
    classes = set(pipeline_classes())
    built = {name.split(",")[0] for name in PIPELINES}
    assert not classes - built - set(NOT_BUILT), "give matrix_stock a tiny pipeline of each"
    assert not (built | set(NOT_BUILT)) - classes, "these are no pipelines of a covered transformer"
    assert not built & set(NOT_BUILT)
    assert set(limits()) == set(PIPELINES), "run tests/support/matrix_limits.py"


def test_every_transformer_has_a_pipeline():
    assert not covered() - set().union(*pipeline_classes().values())


def test_every_method_is_in_the_matrix():
    call = plain_of("WanPipeline").call
    assert {name for of in METHODS.values() for name in names_of(of(call))} == set(handlers())


def test_guidance_comes_in_one_call_and_in_two():
    seen = {name: forwards_of(plain_of(name)) for name in ("WanPipeline", "StableDiffusion3Pipeline", "FluxPipeline")}
    assert seen == {"WanPipeline": (2, 1), "StableDiffusion3Pipeline": (1, 2), "FluxPipeline": (1, 1)}


def test_the_samples_have_every_method_in_every_situation_and_every_pipeline():
    chosen = few()
    assert {case for cases in chosen.values() for case in cases} == {(m, s) for m in METHODS for s in SITUATIONS}
    assert all(chosen.values())
    for name in PIPELINES:
        cases = many(name) + chosen[name]
        assert {method for method, _ in cases} == set(METHODS)
        assert {one for _, one in cases} == {one for _, one in cases_of(name)}
