"""How a step is forecast and corrected: the weights against polynomials and papers, corrections by hand."""

import numpy as np
import pytest
import torch
from cache_calls import Driven, line, run_through, still
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from hypothesis import given, settings
from hypothesis import strategies as st
from wan_tiny import tiny_transformer

import dit_accel
from dit_accel import ConfigError, FirstBlockCache, StaticCache
from dit_accel.methods.caches.correction import DAMPING, SHARE
from dit_accel.rules.forecast import chebyshev, growth, heun, log_snr, taylor

ONE = torch.ones(1, 2, 3)
COEFFICIENTS = st.lists(st.integers(-3, 3), min_size=4, max_size=4)


@st.composite
def moments(draw, least=2, most=5):
    """Different times in order, and a later one."""
    gaps = draw(st.lists(st.integers(1, 6), min_size=least, max_size=most))
    start = draw(st.integers(0, 10))
    times = [float(start + sum(gaps[:index])) for index in range(len(gaps) + 1)]
    falling = draw(st.booleans())
    return [1 - time / 64 for time in times] if falling else times


def polynomial(coefficients, times):
    return np.polynomial.polynomial.polyval(np.array(times), coefficients)


@settings(deadline=None)
@given(moments(), st.integers(0, 3), COEFFICIENTS)
def test_taylor_is_exact_on_polynomials_of_its_order(times, order, coefficients):
    *known, at = times
    degree = min(order, len(known) - 1)
    weights, used = taylor(known, at, order), coefficients[: degree + 1]
    assert np.dot(weights, polynomial(used, known)) == pytest.approx(polynomial(used, at), rel=1e-6, abs=1e-5)
    assert sum(weights) == pytest.approx(1.0, abs=1e-6)
    assert not any(weights[: -(order + 1)])  # older values are not read


@settings(deadline=None)
@given(moments(least=2, most=4), st.integers(1, 3))
def test_growth_is_what_taylor_is_off_by_on_the_next_power(times, order):
    *known, at = times
    used = known[-(order + 1) :]
    power = [0] * len(used) + [1]
    off = polynomial(power, at) - np.dot(taylor(used, at, order), polynomial(power, used))
    assert growth(used, at) == pytest.approx(abs(off), rel=1e-6, abs=1e-9)


def test_the_log_snr_is_bounded_at_both_ends():
    assert log_snr(0.5, flow=True) == log_snr(1.0, flow=False) == 0
    assert log_snr(0.2, flow=True) == pytest.approx(np.log(4))
    assert log_snr(10.0, flow=False) == pytest.approx(-np.log(10))
    assert [log_snr(level, flow=True) for level in (1.0, 1 - 1e-9, 1e-9, 0.0)] == [-7, -7, 7, 7]


def test_taylor_at_equal_distances_is_taylorseers_and_damped_it_follows_a_share_of_the_change():
    assert taylor([0, 5], 7, 1) == pytest.approx([-0.4, 1.4])  # y + (y - y_old) / 5 * 2
    first, second = 2 / 5, 4 / 25 / 2  # x / d, (x / d)^2 / 2: backward differences, of which Newton's has x (x + d)
    published = [second, -first - 2 * second, 1 + first + second]
    newton = [second + 1 / 5, -first - 2 * second - 2 / 5, 1 + first + second + 1 / 5]
    assert taylor([0, 5, 10], 12, 2) == pytest.approx(newton)
    assert taylor([0, 5, 10], 12, 2) != pytest.approx(published)
    assert taylor([3.0], 4.0, 2) == [1.0]  # with one value it holds it
    assert taylor([0, 5], 7, 1, damping=0.25) == pytest.approx([-0.3, 1.3])
    assert taylor([0, 5], 7, 1, damping=1.0) == [0.0, 1.0]


@settings(deadline=None)
@given(moments(least=3, most=3), st.integers(1, 3), st.floats(-2, 2), st.floats(-2, 2), st.booleans())
def test_heun_is_taylor_on_lines(times, count, slope, value, forecast_before):
    older, before, anchor, _ = times
    known = [older, before, anchor] if forecast_before else [older, anchor]
    line = np.array([value + slope * time for time in known])
    step = anchor - before
    later = [anchor + step * (index + 1) for index in range(count)]
    weights = heun(known, later[:-1], later[-1], before if forecast_before else None)
    assert np.dot(weights, line) == pytest.approx(value + slope * later[-1], rel=1e-6, abs=1e-5)


def test_heun_halves_the_slopes_and_is_drawn_back():
    # computed 0 at time 0 and 4 at time 4, forecast 2 at time 3: slopes 1 and 2
    values = np.array([0.0, 2.0, 4.0])
    assert np.dot(heun([0, 3, 4], [], 5, 3), values) == pytest.approx(4 + 1.5)
    assert np.dot(heun([0, 3, 4], [5], 6, 3), values) == pytest.approx(4 + 2 * (1 + 1.5) / 2)
    plain = heun([0, 4], [5, 6, 7], 8, None)
    assert np.dot(plain, [0.0, 4.0]) == pytest.approx(0.75 * 8 + 0.25 * 4)
    assert heun([2.0], [], 3.0, None) == [1.0]


@settings(deadline=None)
@given(moments(least=4, most=8), st.integers(1, 3), COEFFICIENTS)
def test_chebyshev_is_exact_on_polynomials_without_a_ridge(times, order, coefficients):
    *known, at = times
    used = coefficients[: min(order, len(known) - 1) + 1]
    weights, values = chebyshev(known, at, order, (times[0], at), ridge=0.0), polynomial(used, known)
    scale = max(1.0, np.abs(values).max())
    np.testing.assert_allclose(np.dot(weights, values) / scale, polynomial(used, at) / scale, rtol=1e-7, atol=1e-6)


@settings(deadline=None)
@given(moments(), st.integers(1, 4), st.floats(0, 10))
def test_chebyshev_holds_constants_whatever_the_ridge(times, order, ridge):
    *known, at = times
    assert sum(chebyshev(known, at, order, (times[0], at), ridge=ridge)) == pytest.approx(1.0, abs=1e-6)
    assert chebyshev([0, 1, 2, 3], 5, 2, (0, 9), ridge=1e9) == pytest.approx([0.25] * 4, abs=1e-6)  # the mean
    assert chebyshev([4.0], 4.0, 2, (4, 4)) == [1.0]


def listed(*steps, **options):
    return StaticCache(steps=steps, **options)


def test_what_is_stored_goes_on_in_time():
    """A forecast that is written into is not what later ones are made of."""
    for options, forecasts in (
        (dict(), [0, 1, 1, 1, 1]),
        (dict(predictor="taylor"), [0, 1, 2, 3, 4]),
        (dict(predictor="heun"), [0, 1, 2, 3, 4]),
        (dict(predictor="chebyshev"), [0, 1, 2, 3, 4]),
        (dict(predictor="taylor", reach=1), [0, 1, 2, 1, 1]),
        (dict(predictor="heun", reach=0.55), [0, 1, 2, 3, 1]),  # two of five steps
    ):
        rough = dict(abs=0.1) if options.get("predictor") == "chebyshev" else {}  # its ridge
        for stored in ("residual", "output"):
            driven, means = Driven(listed(1, 1, 0, 0, 0, stored=stored, **options), line), []
            for step in range(5):
                out = driven.forward(step, still(step), "uncond", steps=5)[0]
                means.append(float(out.mean()) - 100)
                out.fill_(float("nan"))
            assert means == pytest.approx(forecasts, **rough)
    held = Driven(listed(1, 1, 0, 0, 1, 0, predictor="heun", reach=1), line)  # a held step is no point of the next
    assert [float(out["cond"].mean()) for out in run_through(held, still, steps=6)] == [0, 1, 2, 1, 4, 5]
    whole = Driven(listed(1, 1, 0, predictor="taylor"), lambda step, branch: (torch.full((1, 2, 3), step),))
    assert run_through(whole, still, steps=3)[2]["cond"].tolist() == [[[1] * 3] * 2]  # whole numbers are repeated


def test_heun_goes_on_from_the_forecast_right_before_the_last_computed_step():
    """On squares, and drawn back after three skipped steps."""
    found = run_through(Driven(listed(1, 1, 0, 0, 0, 0, 0, 1, 0, 0, predictor="heun"), squares), still)
    first = [np.dot(heun([0, 1], [*range(2, at)], at, None), [0, 1]) for at in range(2, 7)]
    then = [np.dot(heun([1, 6, 7], [*range(8, at)], at, 6), [1, first[-1], 49]) for at in (8, 9)]
    assert [float(out["cond"].mean()) for out in found] == pytest.approx([0, 1, *first, 49, *then], rel=1e-5)


def test_the_residual_is_added_to_the_part_of_the_latents_that_it_covers():
    for stored, expected in (("residual", 10.0), ("output", 0.0)):
        driven = Driven(listed(1, 0, stored=stored), line)
        out = run_through(driven, lambda step: torch.full((1, 2, 3), 10.0 * step), steps=2)[1]["cond"]
        assert torch.equal(out, torch.full((1, 2, 3), expected))
    wide = torch.arange(30.0).reshape(1, 5, 6)
    for shape, added in (((1, 2, 6), 1.0), ((1, 2, 7), 0.0), ((1, 2, 1, 6), 0.0)):  # others are not covered: held
        driven = Driven(listed(1, 0), lambda step, branch, shape=shape: (torch.ones(shape),))
        driven.forward(0, wide, steps=2)
        assert torch.equal(driven.forward(1, wide + 1, steps=2)[0], torch.full(shape, 1.0 + added))


FORMS = {
    "object": Transformer2DModelOutput(sample=ONE), "tuple": (ONE, torch.full((1, 4), 2.0)), "list": ([ONE, ONE + 1],),
    "none": (ONE, None), "bfloat16": (ONE.bfloat16(),), "float64": (ONE.double(),), "integers": (ONE.long(),),
}  # fmt: skip


@pytest.mark.parametrize("output", FORMS.values(), ids=FORMS)
def test_outputs_of_every_form(output):
    latents = [ONE.to(torch.utils._pytree.tree_leaves(output)[0].dtype)] * 2
    for predictor, steps in (("taylor", (1, 1, 0)), ("corrected", (1, 1, 0, 1))):
        driven, count = Driven(listed(*steps, predictor=predictor), lambda step, branch: output), len(steps)
        given = [driven.forward(step, latents, steps=count, sigma=1 - step / 4) for step in range(count)]
        assert given[0] is output
        assert type(given[-1]) is type(output)
        for found, expected in zip(*map(torch.utils._pytree.tree_leaves, (given[-1], output)), strict=True):
            assert found is expected if expected is None else torch.equal(found, expected)
            assert expected is None or found.dtype == expected.dtype


def test_chebyshev_s_polynomials_are_laid_over_the_whole_run():
    """It may begin late, and a branch later; one of unknown length ends with the step that runs."""
    for steps in (10, None):
        config = StaticCache(every=100, warmup_steps=5, last_steps=0, predictor="chebyshev")
        driven = Driven(config, lambda step, branch: (ONE * step**2,))
        for step in range(1, 7):
            for branch in ("cond",) if step < 3 else ("cond", "uncond"):
                out = driven.forward(step, still(step), branch, steps=steps)[0]
        weights = chebyshev([3, 4], 6, 1, (1, (steps or 7) - 1))
        assert float(out.mean()) == pytest.approx(np.dot(weights, [9, 16]), rel=1e-5)


# Corrections: what skipped steps were off by is measured by the next computed one, and partly taken off in it.

SIGMAS = (1.0, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1)


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
    assert (DAMPING, SHARE) == (0.2, 0.35)
    followed = [1 + (1 - DAMPING) * (step - 1) for step in range(5)]
    owed = (16 - followed[4]) / 12 * (2 * 0.1 + 6 * 0.2)
    assert outputs(1, 1, 0, 0, 1, 1, 1) == pytest.approx([0, 1, *followed[2:4], 16 + SHARE * owed / 0.2, 25, 36])


def test_the_last_step_goes_down_to_no_noise_and_what_is_stored_is_the_models_own_output():
    missed = 36 - (9 + (1 - DAMPING) * 3 * (9 - 4))
    owed = sum(missed * (at - 3) * (at - 2) / 12 * width for at, width in ((4, 0.2), (5, 0.2)))
    assert outputs(1, 1, 1, 1, 0, 0, 1)[-1] == pytest.approx(36 + SHARE * owed / 0.1)  # not over the .2 before
    held = 16 + (1 - DAMPING) * (16 - 1) / 3  # not the line through the corrected step 4
    assert outputs(1, 1, 0, 0, 1, 0, 0)[5] == pytest.approx(held)


def test_each_branch_is_corrected_by_itself_and_a_reset_forgets():
    steps = (1, 1, 0, 0, 1, 1, 1)
    driven = Driven(StaticCache(predictor="corrected", steps=steps), squares)
    first = outputs(*steps, driven=driven)
    assert first[4] > 16
    assert outputs(*steps, driven=driven, branch="uncond") == pytest.approx([3.0] * 7)  # what was right stays
    driven.handler.reset(), driven.handler.begin_run()
    assert outputs(*steps, driven=driven) == first
    # schedulers of two stages call twice at a noise level: a step of no width is not divided by
    assert np.isfinite(outputs(1, 1, 0, 1, sigmas=(0.9,) * 4)).all()


def test_it_needs_the_noise_level_and_whole_forwards():
    driven = Driven(StaticCache(every=2, predictor="corrected"), line)
    with pytest.raises(ConfigError, match=r"^staticcache\.predictor = 'corrected'.*noise level.*'taylor'$"):
        run_through(driven, still)
    with pytest.raises(ConfigError, match=r"^firstblockcache\.predictor = 'corrected'.*EasyCache"):
        dit_accel.attach(tiny_transformer(), FirstBlockCache(threshold=0.1, predictor="corrected"))
