"""One share of a run: a number of steps, or a share below 1, is rounded and checked alike in every method."""

import math
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_stock import stock_pipeline

import dit_accel
from dit_accel import ConfigError, StaticCache
from dit_accel.methods.attention.dfa import DFA
from dit_accel.methods.attention.sparse import SparseConfig
from dit_accel.methods.caches.cache_config import StepCacheConfig
from dit_accel.methods.registry import methods
from dit_accel.rules.steps import is_short, steps_of, whole_steps, window

HUNDREDTHS = st.integers(1, 99)
COUNTS = st.integers(1, 1000)

ENDS = {
    name: config
    for name, config in methods().items()
    if issubclass(config, (SparseConfig, StepCacheConfig, DFA))
}  # fmt: skip


def ends_of(config: type) -> tuple[str, str]:
    """The options of a method that count a run's first and last steps."""
    return ("dense_steps", "dense_last_steps") if issubclass(config, SparseConfig) else ("warmup_steps", "last_steps")


def kept(config: type, first: int | float, last: int | float, count: int | None) -> list[int]:
    """The steps of a run that a method leaves alone at its ends; of one of unknown length, whether the first is."""
    before, after = ends_of(config)
    settings, steps = config(**{before: first, after: last}), range(count or 1)
    if issubclass(config, SparseConfig):
        settings = settings.filled({"dense_layers": 0}).filled()
        return [step for step in steps if settings.is_dense(step, count, 10**6, 0.0)]
    if issubclass(config, DFA):
        return [step for step in steps if settings.at_an_end(step, count)]
    computed = [StepCacheConfig.always_computed(settings, step, count) for step in steps]
    return [step for step, why in enumerate(computed) if why in ("first steps", "last steps")]


def test_every_method_with_such_options_is_here():
    named = {
        name
        for name, config in methods().items()
        if {"dense_steps", "warmup_steps", "last_steps", "dense_last_steps"} & set(config.__dataclass_fields__)
    }
    assert named == set(ENDS)
    assert len(ENDS) >= 12


@given(HUNDREDTHS, COUNTS)
def test_hundredths_are_taken_as_they_are_written(hundredths, count):
    exact = math.ceil(Fraction(hundredths, 100) * count)
    assert steps_of(hundredths / 100, count) == exact
    assert whole_steps(hundredths / 100, count) == exact


@given(st.floats(0, 1), COUNTS)
def test_a_share_is_rounded_up(share, count):
    exact = Fraction(Decimal(share)) * count
    assert 0 <= steps_of(share, count) <= count
    assert -1e-9 <= steps_of(share, count) - exact < 1 or steps_of(share, count) == math.ceil(exact)


def test_all_methods_round_alike():
    for config in ENDS.values():
        for share, count, steps in ((0.28, 25, 7), (0.28, 50, 14), (0.07, 100, 7), (0.55, 100, 55)):
            assert kept(config, share, 0, count) == list(range(steps))
            assert kept(config, 0, share, count) == list(range(count - steps, count))
        assert kept(config, 2, 3, 8) == [0, 1, 5, 6, 7]
        assert kept(config, 1, 1.0, 4) == [0, 3]
        assert kept(config, 0, 0, 4) == []
        assert kept(config, 9, 0, 4) == [0, 1, 2, 3]


def test_shares_and_last_steps_of_a_run_of_unknown_length_are_refused():
    for name, config in ENDS.items():
        before, after = ends_of(config)
        for first, last in ((0.5, 0), (0, 1), (0, 0.5), (3, 2)):
            option, value = (after, last) if last else (before, first)
            with pytest.raises(ConfigError, match=rf"^{name}\.{option} = {value} "):
                kept(config, first, last, None)


def test_whole_first_steps_alone_need_no_count():
    assert dit_accel.RadialAttention(dense_steps=2, dense_last_steps=0, dense_layers=0).filled().is_dense(1, None, 0)
    assert not DFA(warmup_steps=2, last_steps=0).at_an_end(2, None)


@given(st.integers(0, 98), st.integers(1, 100), COUNTS)
def test_windows_by_exact_fractions(start, length, count):
    stop = min(start + length, 100)
    low, high = Fraction(start, 100), Fraction(stop, 100)
    inside = [step for step in range(count) if low <= Fraction(step, count) < high]
    found = list(window(start / 100, stop / 100, count))
    if inside:
        assert found == inside
    else:
        assert found == [min(math.ceil(low * count), count - 1)]
    assert is_short(start / 100, stop / 100, count) == ((high - low) * count < 1)
    assert inside or is_short(start / 100, stop / 100, count)


def slg_steps_of_diffusers(count, start, stop):
    """The steps in which diffusers' own Stable Diffusion 3 pipeline skips layers, on a transformer that gives zeros."""
    pipe, call = stock_pipeline("StableDiffusion3Pipeline")
    pipe.set_progress_bar_config(disable=True)
    seen = []

    def forward(hidden_states, *args, skip_layers=None, **kwargs):
        seen.append(skip_layers is not None)
        return (torch.zeros_like(hidden_states),)

    pipe.transformer.forward = forward
    guidance = dict(skip_guidance_layers=[1], skip_layer_guidance_start=start, skip_layer_guidance_stop=stop)
    pipe(**{**call, "num_inference_steps": count, "output_type": "latent", "guidance_scale": 4.0}, **guidance)
    steps, index = [], -1
    for skips in seen:
        index += not skips
        steps += [index] * skips
    assert index == count - 1
    return steps


def test_the_published_window_of_slg_is_that_of_diffusers():
    """But for a step right on the start, which is in, and diffusers leaves it out."""
    config = dit_accel.SLG(layers="L1").filled({})
    assert (config.start, config.stop) == (0.01, 0.2)
    for count in (6, 7, 8, 11, 20, 28, 50, 99):
        assert list(config.steps(count)) == slg_steps_of_diffusers(count, 0.01, 0.2)
    for start, count, first in ((0.0, 10, 0), (0.2, 10, 2), (0.01, 100, 1)):
        steps = list(dit_accel.SLG(layers="L1", start=start, stop=0.5).steps(count))
        assert steps == [first, *slg_steps_of_diffusers(count, start, 0.5)]


def test_a_transformer_that_is_alone_warms_up_from_the_first_step():
    config = StaticCache(every=100, warmup_steps=2, last_steps=0).filled({})
    assert [config.always_computed(step, 10) for step in range(4)] == ["first steps", "first steps", None, None]
