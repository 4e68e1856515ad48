"""Corrected caches: what skipped steps were off by is measured by the next computed one, and partly taken off in it."""

import pytest
import torch
from cache_calls import Driven, line, run_through, still
from wan_tiny import tiny_transformer

import dit_accel
from dit_accel import ConfigError, FirstBlockCache, StaticCache
from dit_accel.methods.caches.correction import DAMPING, SHARE

SIGMAS = (1.0, 0.9, 0.8, 0.7, 0.5, 0.3, 0.15)


def squares(step, branch):
    return (torch.full((1, 2, 3), float(step**2) if branch == "cond" else 3.0),)


def outputs(*steps, output=squares, branch="cond", driven=None, sigmas=SIGMAS):
    driven = driven or Driven(StaticCache(predictor="corrected", steps=steps), output)
    return [
        float(driven.forward(step, still(step), branch, steps=len(steps), sigma=sigma)[0].mean())
        for step, sigma in enumerate(sigmas)
    ]


def test_a_computed_step_takes_off_a_share_of_what_the_skipped_ones_moved_too_much():
    """By hand: the line through 0 and 1, followed to four fifths; its error grows as step * (step - 1)."""
    followed = [1 + (1 - DAMPING) * (step - 1) for step in range(5)]
    owed = (16 - followed[4]) / 12 * (2 * 0.1 + 6 * 0.2)
    assert outputs(1, 1, 0, 0, 1, 1, 1) == pytest.approx([0, 1, *followed[2:4], 16 + SHARE * owed / 0.2, 25, 36])


def test_the_last_step_goes_down_to_no_noise():
    missed = 36 - (9 + (1 - DAMPING) * 3 * (9 - 4))
    owed = sum(missed * (at - 3) * (at - 2) / 12 * width for at, width in ((4, 0.2), (5, 0.15)))
    assert outputs(1, 1, 1, 1, 0, 0, 1)[-1] == pytest.approx(36 + SHARE * owed / 0.15)


def test_what_is_stored_is_the_models_own_output():
    given = outputs(1, 1, 0, 0, 1, 0, 0)
    assert given[5] == pytest.approx(16 + (1 - DAMPING) * (16 - 1) / 3)  # not the line through the corrected step 4


def test_each_branch_is_corrected_by_itself_and_a_reset_forgets():
    steps = (1, 1, 0, 0, 1, 1, 1)
    driven = Driven(StaticCache(predictor="corrected", steps=steps), squares)
    first = outputs(*steps, driven=driven)
    assert first[4] > 16
    assert outputs(*steps, driven=driven, branch="uncond") == pytest.approx([3.0] * 7)  # what was right stays
    driven.handler.reset(), driven.handler.begin_run()
    assert outputs(*steps, driven=driven) == first


def test_two_calls_in_one_step_are_no_way():
    """Schedulers of two stages call twice at a noise level: a step of no width is not divided by."""
    assert all(map(torch.isfinite, map(torch.tensor, outputs(1, 1, 0, 1, sigmas=(0.9,) * 4))))


def test_it_comes_nearer_on_a_smooth_path():
    """Euler steps along a known velocity, from 1 down to 0: corrected, the skipped run ends nearer to the whole one."""
    steps = 24
    levels = [1 - step / steps for step in range(steps)]
    computed = tuple(int(step < 4 or step % 4 == 0 or step == steps - 1) for step in range(steps))

    def velocity(step, branch="cond"):
        return (torch.full((1, 2, 3), float(torch.tensor(3 * levels[step]).sin())),)

    whole = sum(float(velocity(step)[0].mean()) for step in range(steps)) / steps
    ends = [
        sum(outputs(*computed, driven=Driven(StaticCache(predictor=how, steps=computed), velocity), sigmas=levels))
        for how in ("corrected", "taylor")
    ]
    assert abs(ends[0] / steps - whole) < 0.75 * abs(ends[1] / steps - whole)


def test_it_needs_the_noise_level_and_whole_forwards():
    driven = Driven(StaticCache(every=2, predictor="corrected"), line)
    with pytest.raises(ConfigError, match=r"^staticcache\.predictor = 'corrected'.*noise level.*'taylor'$"):
        run_through(driven, still)
    with pytest.raises(ConfigError, match=r"^firstblockcache\.predictor = 'corrected'.*EasyCache"):
        dit_accel.attach(tiny_transformer(), FirstBlockCache(threshold=0.1, predictor="corrected"))
