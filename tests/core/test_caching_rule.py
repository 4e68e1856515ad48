"""MagCache's drift and TeaCache's rescaled change, against the rules written out and published numbers."""

import math

import numpy as np
import pytest
from dit_accel_pipelines.families.step_caches import MAGCACHE, TEACACHE, TEACACHE_RET
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.rules.caching import drift, resampled, rescaled

RATIOS = st.lists(st.floats(0.5, 1.5), min_size=2, max_size=60).map(lambda tail: (1.0, *tail))


def test_drift_adds_how_far_the_size_is_off_in_each_step():
    ratios = (1.0, 1.1, 0.9, 0.8, 0.5)
    assert drift(ratios, 1, 0) == pytest.approx(0.1)
    assert drift(ratios, 2, 1) == pytest.approx(0.1 + abs(1 - 1.1 * 0.9))
    assert drift(ratios, 4, 2) == pytest.approx(0.1 + abs(1 - 0.9 * 0.8) + abs(1 - 0.9 * 0.8 * 0.5))


@given(RATIOS)
def test_as_many_steps_take_the_curve_as_it_is(ratios):
    assert resampled(ratios, len(ratios)) == ratios


@given(RATIOS, st.integers(2, 5))
def test_a_step_of_several_has_the_product_of_their_ratios(ratios, times):
    ratios = ratios[: len(ratios) // times * times] or (1.0,) * times
    steps = len(ratios) // times
    coarse = resampled(ratios, steps)
    assert len(coarse) == steps
    for step in range(1, steps):
        share = ratios[(step - 1) * times + 1 : step * times + 1]
        assert coarse[step] == pytest.approx(math.prod(share))


@given(RATIOS, st.integers(1, 200))
def test_the_run_as_a_whole_keeps_its_product_and_begins_with_one(ratios, steps):
    again = resampled(ratios, steps)
    assert len(again) == steps
    assert again[0] == 1
    assert min(again) > 0
    if steps > len(ratios):  # up to the last step that was measured
        at = (len(ratios) - 1) / len(ratios) * steps
        if at == int(at):
            assert math.prod(again[: int(at) + 1]) == pytest.approx(math.prod(ratios))


@given(st.floats(0.9, 1.1), st.integers(2, 50), st.integers(1, 100))
def test_a_geometric_curve_stays_geometric(ratio, measured, steps):
    again = resampled((1.0, *[ratio] * (measured - 1)), steps)
    assert again[1:] == pytest.approx([ratio ** (measured / steps)] * (steps - 1))


@pytest.mark.parametrize(
    ("family", "changes", "values"),
    [
        ("flux.1-dev", (0.0, 0.02, 0.05, 0.1, 0.2), (0.26, 0.21, 0.18, 0.21, 0.26)),
        ("mochi-1", (0.0, 0.05, 0.1, 0.2), (0.0, 0.05, 0.1, 0.0)),  # -1.1 as published
        ("wan2.1-14b", (0.0, 0.1, 0.2), (0.0, 0.0, 0.13)),  # -13 and -.6
        ("cogvideox-2b", (0.02, 0.05, 0.1, 0.2), (0.03, 0.07, 0.14, 0.27)),
    ],
)
def test_published_polynomials_never_lower_the_sum(family, changes, values):
    polynomial = TEACACHE[family]["polynomial"]
    assert [rescaled(polynomial, change) for change in changes] == pytest.approx(values, abs=0.006)


@pytest.mark.parametrize(
    ("family", "changes", "values"),
    [
        ("wan2.1-1.3b", (0.0, 0.02, 0.05, 0.1, 0.2), (0.0, 0.08, 0.14, 0.05, 0.0)),  # -.05 and -28 as published
        ("wan2.1-14b", (0.0, 0.02, 0.05, 0.1), (0.0, 0.14, 0.22, 0.0)),
        ("wan2.1-i2v-14b-480p", (0.0, 0.02, 0.05, 0.1), (0.13, 0.18, 0.14, 3.1)),
        ("wan2.1-i2v-14b-720p", (0.0, 0.02, 0.05, 0.1), (0.0, 0.16, 0.17, 0.84)),
    ],
)
def test_published_polynomials_of_the_mode_of_five_first_steps(family, changes, values):
    recipe = TEACACHE_RET[family]
    assert [rescaled(recipe["polynomial"], change) for change in changes] == pytest.approx(values, abs=0.05)
    assert (recipe["warmup_steps"], recipe["last_steps"]) == (5, 0)


def test_what_is_no_number_stays_none():
    assert not rescaled((1.0, 0.0), math.nan) < 1e9


@pytest.mark.parametrize("family", sorted(MAGCACHE))
def test_published_ratios_are_one_for_each_step(family):
    ratios = MAGCACHE[family]["ratios"]
    assert len(ratios) in (20, 28, 40, 50)
    assert ratios[0] == 1
    assert np.all((np.array(ratios) > 0.5) & (np.array(ratios) < 1.7))
