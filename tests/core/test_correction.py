"""Corrected caches: what skipped steps were off by is measured by the next computed one, and partly taken off in it."""

import pytest
import torch
from cache_calls import Driven, line, run_through, still
from wan_tiny import denoise, tiny_transformer

import dit_accel
from dit_accel import ConfigError, EasyCache, FirstBlockCache, StaticCache
from dit_accel.methods.caches.correction import SHARE

SIGMAS = (1.0, 0.9, 0.8, 0.7, 0.5, 0.3, 0.15)


def curved(step, branch):
    return (torch.full((1, 2, 3), float(step**2)),)


def given(output, **options):
    driven = Driven(StaticCache(predictor="taylor", corrected=True, **options), output)
    return [
        float(driven.forward(step, still(step), steps=len(SIGMAS), sigma=sigma)[0].mean())
        for step, sigma in enumerate(SIGMAS)
    ]


def test_a_computed_step_takes_off_a_share_of_what_the_skipped_ones_moved_too_much():
    """By hand: through 0 and 1 the line is step; on step ** 2 it is off by step * (step - 1), as its growth says."""
    assert given(curved, steps=(1, 1, 0, 0, 1, 1, 1)) == pytest.approx(
        [0, 1, 2, 3, 16 + SHARE * (2 * 0.1 + 6 * 0.2) / 0.2, 25, 36]
    )


def test_the_last_step_goes_down_to_no_noise():
    steps = (1, 1, 1, 1, 0, 0, 1)
    missed = 36 - (9 + 3 * (9 - 4))
    grown = [(at - 3) * (at - 2) / (3 * 4) for at in (4, 5)]
    owed = missed * (grown[0] * 0.2 + grown[1] * 0.15)
    assert given(curved, steps=steps)[-1] == pytest.approx(36 + SHARE * owed / 0.15)


def test_nothing_is_taken_off_where_the_forecast_was_right():
    assert given(lambda step, branch: (torch.full((1, 2, 3), 3.0 * step),), steps=(1, 1, 0, 0, 0, 1, 1)) == (
        pytest.approx([3.0 * step for step in range(7)])
    )


def test_what_is_stored_is_the_model_s_own_output():
    driven = Driven(StaticCache(predictor="taylor", corrected=True, steps=(1, 1, 0, 0, 1, 0, 0)), curved)
    out = [
        float(driven.forward(step, still(step), steps=7, sigma=sigma)[0].mean()) for step, sigma in enumerate(SIGMAS)
    ]
    assert out[5] == pytest.approx(16 + (16 - 1) / 3)  # the line through 1 and 16, not what was given at step 4


def test_each_branch_is_corrected_by_itself_and_a_reset_forgets():
    driven = Driven(
        StaticCache(predictor="taylor", corrected=True, steps=(1, 1, 0, 0, 1, 1, 1)),
        lambda step, branch: curved(step, branch) if branch == "cond" else line(step, branch),
    )

    def run():
        return [
            [float(driven.forward(step, still(step), branch, steps=7, sigma=sigma)[0].mean())
             for branch in ("cond", "uncond")]
            for step, sigma in enumerate(SIGMAS)
        ]  # fmt: skip

    first = run()
    assert first[4][0] > 16
    assert first[4][1] == 104
    driven.handler.reset()
    driven.handler.begin_run()
    assert run() == first


def test_two_calls_in_one_step_are_no_way():
    """Schedulers of two stages call twice at a noise level: a step of no width is not divided by."""
    driven = Driven(StaticCache(predictor="taylor", corrected=True, steps=(1, 1, 0, 1)), curved)
    for step, sigma in enumerate((0.9, 0.9, 0.9, 0.9)):
        out = driven.forward(step, still(step), steps=5 if step < 0 else 4, sigma=sigma)[0]
    assert torch.isfinite(out).all()


def test_it_comes_nearer_on_a_smooth_path():
    """Euler steps along a known velocity, from 1 down to 0: corrected, the skipped run ends nearer to the whole one."""
    steps = 24
    levels = [1 - step / steps for step in range(steps)]
    computed = tuple(int(step < 4 or step % 4 == 0 or step == steps - 1) for step in range(steps))

    def end(**options):
        driven = Driven(StaticCache(predictor="taylor", steps=computed, **options), lambda step, branch: (
            torch.full((1, 2, 3), float(torch.tensor(3 * levels[step]).sin())),))  # fmt: skip
        at = 0.0
        for step in range(steps):
            at -= float(driven.forward(step, still(step), steps=steps, sigma=levels[step])[0].mean()) / steps
        return at

    whole = -sum(float(torch.tensor(3 * level).sin()) for level in levels) / steps
    assert abs(end(corrected=True) - whole) < 0.75 * abs(end() - whole)


def test_it_needs_the_noise_level_and_whole_forwards():
    driven = Driven(StaticCache(every=2, corrected=True), line)
    with pytest.raises(ConfigError, match=r"^staticcache\.corrected = True.*noise level.*corrected = False"):
        run_through(driven, still)
    with pytest.raises(ConfigError, match=r"^firstblockcache\.corrected = True.*EasyCache"):
        dit_accel.attach(tiny_transformer(), FirstBlockCache(threshold=0.1, corrected=True))


def test_on_a_model():
    options = dict(threshold=1e9, warmup_steps=3, max_consecutive=2, predictor="taylor", damping=0.2)
    transformer = tiny_transformer()
    made = {}
    for corrected in (False, True):
        with dit_accel.attach(transformer, EasyCache(**options, corrected=corrected)) as attachment:
            made[corrected] = denoise(transformer, 8, sigma=1.0)
            assert torch.equal(denoise(transformer, 8, sigma=1.0), made[corrected])
            assert attachment.report().section("easycache").lines[0] == "transformer, cond: ###..#.#"
    assert not torch.equal(made[True], made[False])
