"""TeaCache and MagCache: each rule against the published one, and whose numbers it takes."""

import dataclasses
import math

import pytest
import torch
from cache_calls import ADAPTER, Driven, line, run_through, still, values_of
from dit_accel_pipelines import ADAPTERS
from dit_accel_pipelines.families.released import PUBLISHED
from hypothesis import given
from hypothesis import strategies as st

from dit_accel import ConfigError, MagCache, TeaCache
from dit_accel.adapters.installed import families
from dit_accel.methods.base import Model
from dit_accel.methods.caches.mag import MagHandler
from dit_accel.rules.caching import resampled, rescaled

POLYNOMIAL = (2.0, 0.5, 0.01)


def signal(transformer, inputs):
    return inputs["hidden_states"] * 2 + 1


@pytest.fixture
def tea(monkeypatch):
    """Drive a TeaCache on a model of some signal."""

    def driven(config, make=signal, **further):
        monkeypatch.setattr("cache_calls.ADAPTER", dataclasses.replace(ADAPTER, signal=make, **further))
        return Driven(config, line)

    return driven


def moving(step):
    torch.manual_seed(step)
    return torch.full((1, 2, 3), 1.0 + 0.1 * step) + 0.05 * torch.randn(1, 2, 3)


def tea_by_hand(threshold, warmup, steps, last=1):
    """The published rule."""
    drawn, total, before = "", 0.0, None
    for step in range(steps):
        now = signal(None, {"hidden_states": moving(step)}).double()
        if step < warmup or step >= steps - last or before is None:
            skip, total = False, 0.0
        else:
            change = float((now - before).abs().mean() / before.abs().mean())
            total += max(POLYNOMIAL[0] * change**2 + POLYNOMIAL[1] * change + POLYNOMIAL[2], 0)
            skip = total < threshold
            total = total if skip else 0.0
        before = now
        drawn += "." if skip else "#"
    return drawn


@pytest.mark.parametrize("warmup", [1, 4])
def test_the_rule_of_teacache(tea, warmup):
    for threshold in (0.0, 0.06, 0.1, 0.3):
        driven = tea(TeaCache(threshold=threshold, warmup_steps=warmup, polynomial=POLYNOMIAL))
        run_through(driven, moving, 14, branches=("cond", "uncond"))
        drawn = tea_by_hand(threshold, warmup, 14)
        assert driven.drawn(steps=14) == driven.drawn("uncond", steps=14) == drawn
        assert threshold != 0.1 or {*drawn[warmup:-1]} == {"#", "."}
    below_0 = tea(TeaCache(threshold=1e-9, polynomial=(-1.0,)))
    run_through(below_0, moving)
    assert below_0.drawn() == "#........#"  # it counts as 0
    assert not rescaled((1.0, 0.0), math.nan) < 1e9  # what is no number stays none


def test_the_signal_is_taken_in_float32_after_a_forced_step_and_before_others(tea):
    half = lambda _, inputs: (60000 - 6000 * inputs["hidden_states"]).half()  # noqa: E731
    driven = tea(TeaCache(threshold=1e9, polynomial=(1.0, 0.0)), half)
    driven.forward(0, still(0)), driven.forward(1, still(1) + 1)
    assert values_of(driven) == pytest.approx([0.1], rel=1e-2)
    order = []
    config = TeaCache(threshold=1e9, warmup_steps=2, polynomial=POLYNOMIAL)
    driven = tea(config, lambda *_: order.append("signal") or torch.ones(3))
    driven.output = lambda *_: order.append("forward") or (torch.ones(1, 2, 3),)
    for step in range(3):
        driven.forward(step, still(step))
    assert order == ["forward", "signal", "forward", "signal", "signal"]


def test_two_transformers_take_a_polynomial_each(tea):
    with pytest.raises(ConfigError, match=r"^teacache.*transformer_2.*teacache\.polynomial_2.*tune teacache$"):
        tea(TeaCache(polynomial=POLYNOMIAL)).forward(0, still(0), transformer="transformer_2")
    driven = tea(TeaCache(threshold=0.5, polynomial=(0.25,), polynomial_2=(0.6,), last_steps=0))
    for step in range(10):
        driven.forward(step, moving(step), transformer="transformer" if step < 5 else "transformer_2")
    assert driven.drawn() == "#.#.######"  # at the threshold it is computed


def test_the_mode_of_five_first_steps_takes_its_own_signal_and_numbers(tea):
    config = TeaCache(use_ret_steps=True, family="wan2.1-1.3b", threshold=1e9)
    driven = tea(config, None, projected_signal=signal)
    assert driven.handler.settings.polynomial == PUBLISHED["teacache_ret"]["wan2.1-1.3b"]["polynomial"]
    run_through(driven, moving)
    assert driven.drawn() == "#####....."
    assert TeaCache(use_ret_steps=True).filled(PUBLISHED["teacache_ret"]["wan2.1-14b"]).threshold == 0.1
    assert tea(TeaCache(family="mochi-1")).handler.settings.threshold == 0.06


def test_a_model_without_a_polynomial_or_a_signal(tea):
    with pytest.raises(ConfigError, match=r"mochi-1.*published.*wan2\.1-i2v"):
        tea(TeaCache(use_ret_steps=True, family="mochi-1"), projected_signal=signal)
    with pytest.raises(ConfigError, match=r"use_ret_steps.*made-up.*a projected_signal$"):
        tea(TeaCache(use_ret_steps=True, family="wan2.1-1.3b"))
    with pytest.raises(ConfigError, match=r"^teacache.*'made-up, 1 layers, 1 heads'.*cogvideox-2b.*teacache\.family$"):
        tea(TeaCache())
    with pytest.raises(ConfigError, match=r"^teacache.*first block.*made-up.*easycache"):
        tea(TeaCache(polynomial=POLYNOMIAL), None)


RATIOS = (1.0, 1.25, 0.98, 0.99, 0.97, 1.02, 0.95, 0.9, 0.85, 0.7)
FREE = dict(warmup_steps=0, max_consecutive=None, ratios=RATIOS)


def mag_by_hand(ratios, threshold, most, warm, never=(), reached=False):
    """The published rule by the ratios of each step: what is computed, where at most so many are skipped in a row.

    In ``warm`` steps it measures nothing, ``never`` are computed though they are measured; ``reached``: as the released
    scripts have it, who skip at the threshold too.
    """
    drawn, ratio, count, error = "", 1.0, 0, 0.0
    for step in range(len(ratios)):
        skip = False
        if step not in warm:
            ratio, count = ratio * ratios[step], count + 1
            error += abs(1 - ratio)
            skip = (error < threshold or (reached and error == threshold)) and count <= most and step not in never
            if not skip:
                ratio, count, error = 1.0, 0, 0.0
        drawn += "." if skip else "#"
    return drawn


CURVES = st.lists(st.floats(0.5, 1.5), min_size=2, max_size=60).map(lambda tail: (1.0, *tail))


@given(CURVES, st.integers(2, 5), st.integers(1, 200), st.floats(0.9, 1.1))
def test_a_resampled_curve_begins_with_one_and_keeps_its_product(ratios, times, steps, ratio):
    """A step of several has the product of their ratios."""
    assert resampled(ratios, len(ratios)) == ratios
    whole = ratios[: len(ratios) // times * times] or (1.0,) * times
    coarse = resampled(whole, len(whole) // times)
    products = [math.prod(whole[at + 1 : at + times + 1]) for at in range(0, len(whole) - times, times)]
    assert coarse == pytest.approx((1.0, *products))
    again = resampled(ratios, steps)
    assert (len(again), again[0]) == (steps, 1)
    assert min(again) > 0
    at = (len(ratios) - 1) / len(ratios) * steps
    if steps > len(ratios) and at == int(at):  # up to the last step that was measured
        assert math.prod(again[: int(at) + 1]) == pytest.approx(math.prod(ratios))
    geometric = resampled((1.0, *[ratio] * (len(ratios) - 1)), steps)
    assert geometric[1:] == pytest.approx([ratio ** (len(ratios) / steps)] * (steps - 1))


@pytest.mark.parametrize(("most", "warmup"), [(1, 0), (2, 2), (4, 3), (100, 0)])
def test_the_rule_of_magcache(most, warmup):
    for threshold in (0.0, 0.02, 0.05, 0.12, 0.25, 1.0):
        driven = Driven(MagCache(threshold=threshold, max_consecutive=most, warmup_steps=warmup, ratios=RATIOS), line)
        run_through(driven, still)
        assert driven.drawn() == mag_by_hand(RATIOS, threshold, most, range(max(warmup, 1)))
        assert driven.handler.estimate(None, 10).forwards == driven.drawn().count(".")


def test_a_run_of_other_length_takes_the_curve_interpolated_and_says_so():
    for steps, notes in ((20, ("magcache: ratios of 10 steps, interpolated to 20",)), (10, ())):
        driven = Driven(MagCache(threshold=0.2, **FREE), line)
        run_through(driven, still, steps=steps)
        assert [text for text in driven.handler.report().lines if "interpolated" in text] == [*notes]
        estimate = driven.handler.estimate(None, steps)
        assert (estimate.notes, estimate.forwards) == (notes, driven.drawn(steps=steps).count("."))
    driven = Driven(MagCache(threshold=0.2, **FREE), line)
    driven.forward(0, still(0), steps=None)
    assert driven.handler.report().lines == ("transformer, cond: #",)
    with pytest.raises(ConfigError, match=r"^magcache.*steps.*easycache"):
        driven.forward(1, still(1), steps=None)


def test_whose_curve_is_taken():
    def settings(recipe=None, **options):
        return Driven(MagCache(**options), line, recipe=recipe).handler.settings

    usual = settings(ratios=RATIOS)
    assert (usual.threshold, usual.max_consecutive, usual.warmup_steps) == (0.12, 4, 0.2)
    recipe = {"threshold": 0.06, "max_consecutive": 2, "ratios": RATIOS}
    filled = settings(recipe, threshold=0.3)
    assert (filled.threshold, filled.max_consecutive, filled.ratios) == (0.3, 2, RATIOS)
    assert (settings(recipe, ratios=(1.0, 0.9)).threshold, settings(recipe).ratios) == (0.06, RATIOS)
    assert settings(family="wan2.1-i2v-14b-720p").ratios[:2] == (1.0, 0.99428)
    assert settings(ratios=RATIOS, measured_on="made-up, 1 layers, 1 heads").ratios == RATIOS
    for options, text in (
        (dict(), r"'made-up, 1 layers, 1 heads'.*wan2\.1-14b.*magcache\.family$"),
        (dict(family="wan2.1-41b"), r"\.family = 'wan2\.1-41b'.*'wan2\.1-14b'"),
        (dict(ratios=RATIOS, measured_on="wan2.1-14b"), r"\.ratios.*'wan2\.1-14b'.*'made-up, 1 "),
        (dict(ratios=RATIOS, recipe={"order": 2}), ".*recipe.*'order'"),
        (dict(ratios=RATIOS, family="wan2.1-14b"), r"\.ratios and magcache\.family = 'wan2\.1-14b'"),
    ):
        with pytest.raises(ConfigError, match=text):
            settings(**options)


def ours(family, steps, switch=None):
    """The steps that the cache computes with a family's recipe; a second transformer takes over at a step."""
    driven = Driven(MagCache(family=family), line)
    driven.install("transformer", *["transformer_2"] * (switch is not None))
    for step in range(steps):
        second = switch is not None and step >= switch
        driven.forward(step, still(step), steps=steps, transformer="transformer_2" if second else "transformer")
    return driven.drawn(steps=steps)


def planned(family, steps, /, **options):
    """What `plan` counts as skipped on a family, and says of it."""
    released = families()[family]
    adapter = next(adapter for adapter in ADAPTERS if released in adapter.families)
    model = Model(adapter=adapter, family=released, heads=released.heads, layers=released.layers)
    saving = MagHandler(MagCache(**options), model).estimate(None, steps)
    return saving.forwards / released.forwards_per_step, saving.notes


SCRIPTS = {
    "wan2.1-14b": (0.12, 4, range(10)),
    "wan2.1-1.3b": (0.12, 2, range(10)),
    "wan2.1-i2v-14b-480p": (0.12, 4, range(8)),
    "wan2.1-i2v-14b-720p": (0.12, 4, range(8)),
    "wan2.2-ti2v-5b": (0.06, 2, range(10)),
    "hunyuan-video": (0.12, 4, range(10)),
    "qwen-image": (0.06, 2, range(10)),
    "flux.1-dev": (0.24, 5, range(3), [11]),  # never skipped
    "flux.1-kontext-dev": (0.05, 4, range(6), [11]),
}


def test_the_steps_of_the_released_scripts():
    for family, (threshold, most, warm, *never) in SCRIPTS.items():
        ratios = PUBLISHED["magcache"][family]["ratios"]
        drawn = mag_by_hand(ratios, threshold, most, warm, *never, reached=True)
        assert not never or drawn != mag_by_hand(ratios, threshold, most, warm, reached=True)
        assert ours(family, len(ratios)) == drawn
        assert planned(family, len(ratios)) == (drawn.count("."), ())
        assert "." in drawn


def test_the_retention_of_each_expert_as_the_scripts_have_it():
    """They count two forwards a step."""
    # from text: floor(.4 x 52) of the first expert's, all up to the .4 x 28 th of the second's
    text = [step for step in range(40) if 2 * step < int(52 * 0.4) or 52 <= 2 * step <= 28 * 0.4 + 52]
    image = [*range(18)]  # the first int(30 + .1 x 50) forwards of all: nothing is skipped in the first expert
    for family, warm, switch, computed in (("wan2.2-a14b", text, 26, 26), ("wan2.2-i2v-a14b", image, 15, 30)):
        drawn = mag_by_hand(PUBLISHED["magcache"][family]["ratios"], 0.06, 2, warm, reached=True)
        assert {drawn[step] for step in warm} == {"#"}
        assert drawn.count("#") == computed
        assert ours(family, 40, switch=switch) == drawn
        note = f"magcache: the second transformer is counted from {switch / 40:g} of the run on"
        assert planned(family, 40) == (drawn.count("."), (note,))
    assert planned("wan2.1-14b", 40, family="wan2.2-a14b")[1] == ()  # which has one transformer
    later = ours("wan2.2-i2v-a14b", 40, switch=30)
    assert "." not in later[:31]  # whenever it takes over: a tenth of its ten steps
