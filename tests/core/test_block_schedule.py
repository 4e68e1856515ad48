"""Schedules of caches of blocks, and block numbers: against the published ones, and what can't be read."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_accel import ConfigError
from dit_accel.methods.caches.block_numbers import read_numbers, spell_numbers
from dit_accel.rules.block_schedule import fixed, rescaled, runs_of, shrinking


def test_the_fixed_schedule_is_the_published_one():
    assert fixed(6, 6, 50) == (6, 12, 18, 24, 30, 36, 42, 48)


def test_the_shrinking_schedule_is_near_the_published_one():
    """HunyuanVideo's single blocks: 6, 18, 26, 32, 38, 42, 46, 48, whose distances shrink from 12 to 2."""
    assert shrinking(6, 12, 2, 50) == (6, 18, 27, 34, 40, 44, 47)
    assert shrinking(6, 5, 5, 50) == fixed(6, 5, 50)


@given(st.integers(0, 20), st.integers(1, 20), st.integers(1, 20), st.integers(1, 100))
def test_distances_of_the_shrinking_schedule_shrink(first, one, two, steps):
    every, last = max(one, two), min(one, two)
    found = shrinking(first, every, last, steps)
    distances = [b - a for a, b in itertools.pairwise(found)]
    assert all(last <= distance <= every for distance in distances)
    assert distances == sorted(distances, reverse=True)
    assert all(first <= step < steps for step in found)


@given(st.sets(st.integers(0, 49), min_size=1), st.integers(1, 200))
def test_rescaled_steps_are_of_the_run_and_keep_their_share_of_it(listed, steps):
    found = rescaled(sorted(listed), 50, steps)
    assert found == tuple(sorted({*found}))
    assert all(type(step) is int for step in found)
    assert 0 <= found[0] <= found[-1] < steps
    assert all(min(abs(step / steps - one / 50) for one in listed) <= 1 / steps for step in found)
    assert rescaled(sorted(listed), 50, 50) == tuple(sorted(listed))


@given(st.sets(st.integers(0, 99), min_size=1))
def test_numbers_are_read_as_they_are_spelt(numbers):
    assert read_numbers(spell_numbers(numbers), "x") == tuple(sorted(numbers))
    assert sum(last - first + 1 for first, last in runs_of([*numbers])) == len(numbers)


@pytest.mark.parametrize("text", ["a", "3-", "3-2", "1;2", "-1", ""])
def test_numbers_that_can_not_be_read(text):
    with pytest.raises(ConfigError, match=rf"^here\.blocks = {text!r}.*'0, 2-7'"):
        read_numbers(text, "here.blocks")


def test_no_numbers():
    with pytest.raises(ConfigError, match=r"^here\.blocks.*0 blocks"):
        read_numbers((), "here.blocks")
