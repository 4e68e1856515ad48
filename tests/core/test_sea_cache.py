"""SeaCache: the filter and the rule are diffusers' own, along the axes of every kind of latents; what it refuses."""

import math
from functools import partial

import pytest
import torch
from cache_calls import Driven, line
from diffusers.hooks import sea_cache as upstream
from diffusers.hooks.sea_cache import SeaCacheConfig

from dit_accel import ConfigError, SeaCache
from dit_accel.adapters.adapter import latents_grid
from dit_accel.adapters.noise import share_of_noise
from dit_accel.methods.caches.sea import filtered, on_grid
from dit_accel.plan.layout import TokenLayout

STEPS = 14


def sigma(step: int) -> float:
    return 1 - step / STEPS


def latents(step: int) -> torch.Tensor:
    """Latents on the way from noise to a smooth picture."""
    torch.manual_seed(1)
    noise = torch.randn(1, 2, 3, 6, 5)
    clean = torch.linspace(-2, 2, 6)[:, None] * torch.linspace(0, 1, 5)
    return (1 - sigma(step)) * clean.expand_as(noise) + sigma(step) * noise


def run(made: Driven, given=latents, told=sigma) -> str:
    for step in range(STEPS):
        made.forward(step, given(step), steps=STEPS, sigma=told(step))
    return made.drawn(steps=STEPS)


def by_upstream(**options) -> str:
    """The steps that diffusers' own rule computes."""
    config = SeaCacheConfig(**options)
    shared, state, drawn = upstream.SeaCacheSharedState(), upstream.SeaCacheContextState(), ""
    for step in range(STEPS):
        about = upstream._SeaCacheForwardMetadata(step, sigma(step), STEPS, list(latents(step)))
        computes = shared.resolve_gate(state, about, upstream._build_indicator(config, about), config)
        state.consecutive_cached = 0 if computes else state.consecutive_cached + 1
        drawn += "#" if computes else "."
    return drawn


@pytest.mark.parametrize("level", [0.0, 0.02, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("power", [1.0, 3.0])
def test_the_filter_is_the_one_of_diffusers(level, power):
    x = torch.randn(3, 5, 8, 7)
    expected = upstream._apply_sea_filter(x, level, power)
    torch.testing.assert_close(filtered(x, (0, 1, 2), level, power), expected, rtol=1e-4, atol=1e-5)
    moved = filtered(x.movedim(-1, 0)[None], (2, 3, 4), level, power)[0].movedim(0, -1)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 0.15, 0.3, 0.6])
@pytest.mark.parametrize(("ours", "theirs"), [(2, 2), (None, 0)])
def test_the_rule_is_the_one_of_diffusers(threshold, ours, theirs):
    found = run(Driven(SeaCache(threshold=threshold, max_consecutive=ours or STEPS), line))
    assert found == by_upstream(threshold=threshold, max_consecutive_cached=theirs)
    assert ("." in found) == (threshold > 0)


def test_unset_options_are_those_of_diffusers():
    assert run(Driven(SeaCache(), line)) == by_upstream()


@pytest.mark.parametrize(
    ("shape", "grid", "expected"),
    [
        ((1, 2, 3, 6, 5), latents_grid, (2, 3, 4)),
        ((1, 3, 2, 6, 5), partial(latents_grid, frames_axis=1, text="before"), (1, 3, 4)),
        ((1, 3, 6, 5, 2), partial(latents_grid, frames_axis=1, channels_last=True), (1, 2, 3)),
        ((1, 2, 6, 5), partial(latents_grid, frames_axis=None), (2, 3)),
        ((1, 90, 2), lambda config, inputs: (3, 6, 5, 0, 0), (1, 2, 3)),
        ((1, 91, 2), lambda config, inputs: (3, 6, 5, 0, 1), (1,)),
    ],
    ids=["video", "frames first", "channels last", "image", "packed", "packed with more"],
)
def test_every_kind_of_latents_is_filtered_along_its_own_axes(shape, grid, expected):
    x = torch.randn(shape)
    found, axes = on_grid(x, TokenLayout(frames=3, height=6, width=5), grid)
    assert axes == expected
    assert torch.equal(found.reshape(shape), x)
    if len(axes) == 3:
        assert [found.shape[axis] for axis in axes] == [3, 6, 5]


@pytest.mark.parametrize("over_signal", [0.05, 0.7, 3.0, 157.0])
def test_noise_over_signal_is_filtered_by_the_amplitudes_it_stands_for(over_signal):
    """Latents a x + b n, a = 1 / sqrt(1 + s^2) and b = s a, as DPM-Solver and Euler hand them to a model of betas."""
    x, gain = torch.randn(1, 2, 6, 5), torch.ones(())
    a = (1 + over_signal**2) ** -0.5
    b = over_signal * a
    for size in (6, 5):
        along = a / (a**2 + b**2 * torch.fft.fftfreq(size).abs() ** 3)
        gain = gain.unsqueeze(-1) * along
    expected = torch.fft.ifftn(torch.fft.fftn(x, dim=(2, 3)) * gain / gain.mean(), dim=(2, 3)).real
    share = share_of_noise(over_signal, "exploding")
    torch.testing.assert_close(filtered(x, (2, 3), share, 3.0), expected, rtol=1e-4, atol=1e-5)


def test_packed_latents_are_measured_as_unpacked_ones():
    layout = TokenLayout(frames=3, height=6, width=5)
    x = latents(4)
    packed, axes = on_grid(x.flatten(2).mT, layout, None)
    whole = filtered(x, (2, 3, 4), 0.4, 3.0)
    torch.testing.assert_close(filtered(packed, axes, 0.4, 3.0).flatten(1, 3).mT.reshape(x.shape), whole)


def test_what_is_no_number_is_computed():
    assert run(Driven(SeaCache(threshold=1e9), line), lambda step: latents(step) * math.nan) == "#" * STEPS


def test_a_run_that_does_not_tell_its_noise_level_is_refused():
    with pytest.raises(ConfigError, match=r"^seacache.*noise level.*easycache"):
        run(Driven(SeaCache(), line), told=lambda step: None)
    with pytest.raises(ConfigError, match=r"^seacache\.power.*got 0"):
        SeaCache(power=0)
