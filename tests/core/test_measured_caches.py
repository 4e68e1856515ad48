"""EasyCache and SeaCache: each rule against the published one, written out or diffusers' own."""

import math
from functools import partial

import pytest
import torch
from cache_calls import Driven, line, run_through, values_of
from diffusers.hooks import sea_cache as upstream
from diffusers.hooks.sea_cache import SeaCacheConfig

from dit_accel import ConfigError, EasyCache, SeaCache
from dit_accel.adapters.adapter import latents_grid
from dit_accel.adapters.noise import share_of_noise
from dit_accel.methods.caches.easy import mean_size
from dit_accel.methods.caches.sea import filtered, on_grid
from dit_accel.plan.layout import TokenLayout
from dit_accel.rules.forecast import taylor

GENERATOR = torch.Generator().manual_seed(0)
WALK = [torch.randn(1, 4, 3, generator=GENERATOR).cumsum(0) for _ in range(20)]
for _index in range(1, 20):
    WALK[_index] = WALK[_index - 1] + 0.05 * WALK[_index]


def sines(step, branch):
    return (torch.sin(WALK[step]) + (branch != "cond"),)


def easy_by_hand(threshold, warmup, steps):
    """The published rule, step by step; returns what is computed, what is added up, and the outputs."""
    drawn, sums, outputs = "", [], []
    x_old = v_old = rate = residual = x_computed = None
    total = 0.0
    for step in range(steps):
        x = WALK[step]
        skip = False
        if warmup <= step < steps - 1 and rate is not None:
            total += float(rate * (x - x_old).abs().mean() / v_old.abs().mean())
            sums.append(total)
            skip = total < threshold
        if skip:
            outputs.append(x + residual)
        else:
            v, total = torch.sin(x), 0.0
            if v_old is not None:
                rate = (v - v_old).abs().mean() / (x - x_computed).abs().mean()
            v_old, x_computed, residual = v, x, v - x
            outputs.append(v)
        x_old = x
        drawn += "." if skip else "#"
    return drawn, sums, outputs


@pytest.mark.parametrize("threshold", [0.05, 0.1, 0.3])
def test_the_rule_of_easycache(threshold):
    drawn, sums, outputs = easy_by_hand(threshold, 4, 20)
    driven = Driven(EasyCache(threshold=threshold, warmup_steps=4), sines)
    out = run_through(driven, lambda step: WALK[step], 20)
    assert driven.drawn(steps=20) == drawn
    assert 0 < drawn.count(".") < 16
    assert values_of(driven) == pytest.approx(sums)
    for found, expected in zip(out, outputs, strict=True):
        torch.testing.assert_close(found["cond"], expected)


def easy_error_by_hand(threshold, warmup, steps, place):
    """The rule of ``error``, step by step: what is computed, and what each forecast may be off by."""
    drawn, expected, known, rate = "", [], [], None
    for step in range(steps):
        size = lambda at, points: math.prod(place(at) - place(one) for one in points[-2:]) ** 0.8  # noqa: E731
        value = None if rate is None else rate * size(step, known)
        must = step < warmup or step == steps - 1
        if value is not None and not must:
            expected.append(value)
        if not must and value is not None and value < threshold:
            drawn += "."
            continue
        if known and size(step, known):  # else a forecast is right there
            x, v = WALK[step], torch.sin(WALK[step])
            residuals = [torch.sin(WALK[at]) - WALK[at] for at in known[-2:]]
            weights = taylor(known[-2:], step, 1)
            forecast = x + sum(weight * value for weight, value in zip(weights, residuals, strict=True))
            rate = float((v - forecast).abs().mean() / v.abs().mean()) / size(step, known)
        known.append(step)
        drawn += "#"
    return drawn, expected


def flow(step):
    """A scheduler that calls twice at the third level."""
    return 1 - (step - (step > 2)) / 20


def test_the_rule_of_a_bounded_error():
    for noise, sigma, place in (
        ("none", lambda step: None, lambda step: step),
        ("flow", flow, lambda step: math.log((1 - flow(step)) / flow(step)) if step else -7.0),
        ("exploding", lambda step: 20 * flow(step), lambda step: -math.log(20 * flow(step))),
    ):
        for error in (0.05, 0.2):
            drawn, values = easy_error_by_hand(error, 4, 20, place)
            driven = Driven(EasyCache(error=error, warmup_steps=4, predictor="taylor"), sines)
            for step in range(20):
                for branch in ("cond", "uncond"):
                    driven.forward(step, WALK[step], branch, steps=20, sigma=sigma(step), noise=noise)
            assert driven.drawn(steps=20) == driven.drawn("uncond", steps=20) == drawn
            assert 0 < drawn.count(".") < 16
            assert values_of(driven) == pytest.approx(values, rel=1e-4)
            assert driven.handler.report().data["threshold"] == error
            assert driven.handler.state_bytes() == 2 * 2 * 12 * 4 + 2 * 4  # two residuals of two branches, two numbers
    assert Driven(EasyCache(error=0.1), line, recipe={"threshold": 0.2}).handler.threshold() == 0.1


@pytest.mark.parametrize("options", [dict(threshold=1e9), dict(error=1e9)])
def test_what_is_no_number_is_computed_by_easycache(options):
    frozen = Driven(EasyCache(**options, warmup_steps=2), lambda step, branch: (torch.zeros(1, 4, 3),))
    run_through(frozen, lambda step: 0 * WALK[0], 8)  # 0 / 0
    assert frozen.drawn(steps=8) == "########"
    assert "not a number" in {entry["reason"] for entry in frozen.handler.report().data["forwards"]}
    sizes = [1.0, 1.01, 1.02, math.inf, *[1.0] * 4]
    broken = Driven(EasyCache(**options, warmup_steps=4), lambda step, branch: (torch.full((1, 4, 3), sizes[step]),))
    run_through(broken, lambda step: WALK[step], 8)
    assert broken.drawn(steps=8)[:6] == "######"  # until two numbers were computed in a row


def test_sizes_are_means_of_absolute_values_in_float32():
    ones = torch.full((64, 65), -1.0, dtype=torch.bfloat16)
    assert mean_size(ones) == 1  # a sum of 4160 in bfloat16 is off
    assert mean_size(torch.tensor([1.0, -3.0], dtype=torch.float64)).dtype == torch.float64
    assert mean_size(torch.tensor([1.0, -3.0])) == 2


STEPS = 14


def sigma(step: int) -> float:
    return 1 - step / STEPS


def picture(step: int) -> torch.Tensor:
    """Latents on the way from noise to a smooth picture."""
    torch.manual_seed(1)
    noise = torch.randn(1, 2, 3, 6, 5)
    clean = torch.linspace(-2, 2, 6)[:, None] * torch.linspace(0, 1, 5)
    return (1 - sigma(step)) * clean.expand_as(noise) + sigma(step) * noise


def run_sea(driven: Driven, latents=picture, level=sigma) -> str:
    for step in range(STEPS):
        driven.forward(step, latents(step), steps=STEPS, sigma=level(step))
    return driven.drawn(steps=STEPS)


def by_upstream(**options) -> str:
    """The steps that diffusers' own rule computes."""
    config = SeaCacheConfig(**options)
    shared, state, drawn = upstream.SeaCacheSharedState(), upstream.SeaCacheContextState(), ""
    for step in range(STEPS):
        about = upstream._SeaCacheForwardMetadata(step, sigma(step), STEPS, list(picture(step)))
        computes = shared.resolve_gate(state, about, upstream._build_indicator(config, about), config)
        state.consecutive_cached = 0 if computes else state.consecutive_cached + 1
        drawn += "#" if computes else "."
    return drawn


def test_the_filter_is_the_one_of_diffusers():
    assert share_of_noise(3.0, "exploding") == 0.75  # latents (clean + 3 noise) / sqrt(10)
    x = torch.randn(3, 5, 8, 7)
    for level in (0.0, 0.02, 0.5, 0.97, 1.0):
        for power in (1.0, 3.0):
            expected = upstream._apply_sea_filter(x, level, power)
            torch.testing.assert_close(filtered(x, (0, 1, 2), level, power), expected, rtol=1e-4, atol=1e-5)
            moved = filtered(x.movedim(-1, 0)[None], (2, 3, 4), level, power)[0].movedim(0, -1)
            torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 0.15, 0.3, 0.6])
def test_the_rule_of_seacache_is_the_one_of_diffusers(threshold):
    for ours, theirs in ((2, 2), (None, 0)):
        drawn = run_sea(Driven(SeaCache(threshold=threshold, max_consecutive=ours or STEPS), line))
        assert drawn == by_upstream(threshold=threshold, max_consecutive_cached=theirs)
        assert ("." in drawn) == (threshold > 0)
    assert run_sea(Driven(SeaCache(), line)) == by_upstream()  # unset options too


def test_every_kind_of_latents_is_filtered_along_its_own_axes():
    for shape, grid, expected in (
        ((1, 2, 3, 6, 5), latents_grid, (2, 3, 4)),
        ((1, 3, 2, 6, 5), partial(latents_grid, frames_axis=1, text="before"), (1, 3, 4)),
        ((1, 3, 6, 5, 2), partial(latents_grid, frames_axis=1, channels_last=True), (1, 2, 3)),
        ((1, 2, 6, 5), partial(latents_grid, frames_axis=None), (2, 3)),
        ((1, 90, 2), lambda config, inputs: (3, 6, 5, 0, 0), (1, 2, 3)),
        ((1, 91, 2), lambda config, inputs: (3, 6, 5, 0, 1), (1,)),
    ):
        x = torch.randn(shape)
        laid, axes = on_grid(x, TokenLayout(frames=3, height=6, width=5), grid)
        assert axes == expected
        assert torch.equal(laid.reshape(shape), x)
        assert len(axes) < 3 or [laid.shape[axis] for axis in axes] == [3, 6, 5]


def test_seacache_needs_numbers_and_the_noise_level():
    assert run_sea(Driven(SeaCache(threshold=1e9), line), lambda step: picture(step) * math.nan) == "#" * STEPS
    with pytest.raises(ConfigError, match=r"^seacache.*noise level.*easycache"):
        run_sea(Driven(SeaCache(), line), level=lambda step: None)
