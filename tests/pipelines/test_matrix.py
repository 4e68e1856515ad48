"""Every stock pipeline of diffusers that an adapter covers, with every method, in every situation of a user's day.

Each row of a batch is that row alone, a second run is the first, whatever ran before; what does not go together is
refused by name, as the adapter declares. `make test` runs a few cases that have each method in each situation and every
pipeline in some, `make test-slow` every method on every pipeline, `make test-pipelines` all there is.
"""

import time
import zlib
from collections import Counter
from functools import cache

import pytest
from matrix_classes import pipeline_classes
from matrix_limits import limit_of, limits
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
    """All cases of a pipeline, in an order of its own."""
    possible = [one for one in SITUATIONS if one not in limits().get(name, {})]
    cases = [(method, one) for method in METHODS for one in possible]
    return sorted(cases, key=lambda case: zlib.crc32(f"{name} {case}".encode()))


@cache
def sampled(each: int) -> dict[str, list[Case]]:
    """Some cases of every pipeline: those first that no pipeline before it had, and methods that it has not had yet."""
    chosen: dict[str, list[Case]] = {}
    seen: Counter[Case] = Counter()
    for name in PIPELINES:
        mine = chosen[name] = []
        methods: Counter[str] = Counter()
        situations: Counter[str] = Counter()
        left = cases_of(name)
        for _ in range(min(each, len(left))):
            best = min(left, key=lambda case: (methods[case[0]], seen[case] + situations[case[1]]))
            left.remove(best)
            mine.append(best)
            seen[best] += 1
            methods[best[0]] += 1
            situations[best[1]] += 1
    return chosen


def require_right(name: str, cases: list[Case]) -> None:
    """Run cases of a pipeline; all that is wrong is said at once."""
    found = wrong_in(name, sorted(cases, key=lambda case: (case[0], list(SITUATIONS).index(case[1]))))
    assert not found, f"{name}:\n" + "\n".join(found)


FEW, MANY = 3, 2 * len(METHODS)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_right_with_some_methods_in_some_situations(name):
    require_right(name, sampled(FEW)[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_right_with_every_method(name):
    require_right(name, sampled(MANY)[name])


@pytest.mark.slow
@pytest.mark.rare
@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_right_with_every_method_in_every_situation(name, record_property):
    began = time.perf_counter()
    cases = cases_of(name)
    require_right(name, cases)
    record_property("cases", len(cases))
    record_property("seconds", time.perf_counter() - began)


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_what_diffusers_cannot_do_is_no_more_than_that(name):
    plain, known = plain_of(name), limits()[name]
    assert {one: limit_of(plain, one) for one in SITUATIONS if limit_of(plain, one)} == known


def test_every_pipeline_class_is_in_the_matrix():
    classes = set(pipeline_classes())
    built = {name.split(",")[0] for name in PIPELINES}
    assert not classes - built - set(NOT_BUILT), "give matrix_stock a tiny pipeline of each"
    assert not (built | set(NOT_BUILT)) - classes, "these are no pipelines of a covered transformer"
    assert not built & set(NOT_BUILT)
    assert set(limits()) == set(PIPELINES), "run tests/support/matrix_limits.py"


def test_every_transformer_has_a_pipeline():
    from matrix_classes import covered

    assert not covered() - set().union(*pipeline_classes().values())


def test_every_method_is_in_the_matrix():
    call = plain_of("WanPipeline").call
    assert {name for of in METHODS.values() for name in names_of(of(call))} == set(handlers())


def test_the_sample_has_every_method_in_every_situation_and_every_pipeline():
    few = sampled(FEW)
    assert {case for cases in few.values() for case in cases} == {(m, s) for m in METHODS for s in SITUATIONS}
    assert all(few.values())
    many = sampled(MANY)
    assert all({method for method, _ in cases} == set(METHODS) for cases in many.values())
    for name, cases in many.items():
        assert {one for _, one in cases} == set(SITUATIONS) - set(limits()[name])
