"""MagCache: the rule, what it knows before the run, curves of other lengths, and whose curve it takes."""

import pytest
import torch
from cache_calls import ADAPTER, Driven, line, run_through, still
from dit_accel_pipelines import ADAPTERS
from dit_accel_pipelines.families.step_caches import MAGCACHE

from dit_accel import ConfigError, MagCache
from dit_accel.adapters.installed import families
from dit_accel.methods.base import Model
from dit_accel.methods.caches.mag import MagHandler

RATIOS = (1.0, 1.1, 0.98, 0.99, 0.97, 1.02, 0.95, 0.9, 0.85, 0.7)
FREE = dict(warmup_steps=0, max_consecutive=None, ratios=RATIOS)


def written_out(threshold, most, warmup, ratios):
    """The published rule."""
    drawn, ratio, count, error = "", 1.0, 0, 0.0
    for step in range(len(ratios)):
        skip = False
        if step >= max(warmup, 1):
            ratio, count = ratio * ratios[step], count + 1
            error += abs(1 - ratio)
            skip = error < threshold and count <= most
        if not skip:
            ratio, count, error = 1.0, 0, 0.0
        drawn += "." if skip else "#"
    return drawn


@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.05, 0.12, 0.3, 1.0])
@pytest.mark.parametrize(("most", "warmup"), [(1, 0), (2, 2), (4, 3), (100, 0)])
def test_the_rule(threshold, most, warmup):
    driven = Driven(MagCache(threshold=threshold, max_consecutive=most, warmup_steps=warmup, ratios=RATIOS), line)
    run_through(driven, still)
    assert driven.drawn() == written_out(threshold, most, warmup, RATIOS)
    assert driven.handler.estimate(None, 10).forwards == driven.drawn().count(".")


def test_the_usual_options():
    settings = Driven(MagCache(ratios=RATIOS), line).handler.settings
    assert (settings.threshold, settings.max_consecutive, settings.warmup_steps) == (0.12, 4, 0.2)


def test_it_never_waits_for_the_device(monkeypatch):
    for name in ("item", "tolist", "__bool__", "__float__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} waits for the device"))
    driven = Driven(MagCache(**FREE, predictor="taylor"), line)
    run_through(driven, still)
    assert "." in driven.drawn()


def test_a_run_of_other_length_takes_the_curve_interpolated_and_says_so():
    driven = Driven(MagCache(threshold=0.2, **FREE), line)
    run_through(driven, still, steps=20)
    assert driven.drawn(steps=20).count(".") > 10
    note = "magcache: ratios of 10 steps, interpolated to 20"
    assert driven.handler.report().lines[-1] == note
    assert driven.handler.estimate(None, 20).notes == (note,)
    assert driven.handler.estimate(None, 20).forwards == driven.drawn(steps=20).count(".")
    driven = Driven(MagCache(threshold=0.2, **FREE), line)
    run_through(driven, still)
    assert not any("interpolated" in text for text in driven.handler.report().lines)
    assert driven.handler.estimate(None, 10).notes == ()


def test_a_recipe_gives_what_is_unset():
    recipe = {"threshold": 0.06, "max_consecutive": 2, "ratios": RATIOS}
    settings = Driven(MagCache(threshold=0.3), line, recipe=recipe).handler.settings
    assert (settings.threshold, settings.max_consecutive, settings.ratios) == (0.3, 2, RATIOS)
    own = Driven(MagCache(ratios=(1.0, 0.9)), line, recipe=recipe).handler.settings
    assert (own.threshold, own.ratios) == (0.06, (1.0, 0.9))


def test_the_curve_of_a_released_model_by_name():
    settings = Driven(MagCache(family="wan2.1-i2v-14b-720p"), line).handler.settings
    assert settings.ratios is not None
    assert len(settings.ratios) == 40
    assert settings.ratios[1] == 0.99428


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(threshold=-0.1), r"^magcache\.threshold.*got -0\.1"),
        (dict(ratios=(0.9, 1.0)), r"^magcache\.ratios.*got \[0\.9, 1\.0\]"),
        (dict(ratios=()), r"^magcache\.ratios.*got \[\]"),
        (dict(ratios=(1.0, -0.1)), r"^magcache\.ratios.*got -0\.1"),
        (
            dict(measured_on="wan2.1-14b"),
            r"^magcache\.measured_on = 'wan2\.1-14b'.*none.*magcache\.family",
        ),
    ],
)
def test_options_out_of_range(options, text):
    with pytest.raises(ConfigError, match=text):
        MagCache(**options)


def test_a_model_without_a_curve():
    with pytest.raises(
        ConfigError,
        match=r"^magcache.*'made-up, 1 layers, 1 heads'.*hunyuan-video.*wan2\.1-14b.*tune magcache.*magcache\.family$",
    ):
        Driven(MagCache(), line)
    with pytest.raises(ConfigError, match=r"^magcache\.family = 'wan2\.1-41b'.*ratios.*'wan2\.1-14b'"):
        Driven(MagCache(family="wan2.1-41b"), line)
    with pytest.raises(
        ConfigError,
        match=r"^magcache\.ratios.*'wan2\.1-14b'.*'made-up, 1 layers, 1 heads'.*tune magcache$",
    ):
        Driven(MagCache(ratios=RATIOS, measured_on="wan2.1-14b"), line)
    assert isinstance(
        Driven(MagCache(ratios=RATIOS, measured_on="made-up, 1 layers, 1 heads"), line).handler, MagHandler
    )


def test_two_sources_of_a_curve():
    with pytest.raises(
        ConfigError,
        match=r"^magcache\.ratios and magcache\.family = 'wan2\.1-14b'",
    ):
        Driven(MagCache(ratios=RATIOS, family="wan2.1-14b"), line)


def test_a_run_of_unknown_length():
    driven = Driven(MagCache(threshold=0.2, **FREE), line)
    driven.forward(0, still(0), steps=None)
    with pytest.raises(ConfigError, match=r"^magcache.*steps.*easycache"):
        driven.forward(1, still(1), steps=None)


def released(family, options, warm, never=()):
    """The steps that a released script computes (#) and skips (.), by its rule and its settings of a family.

    Args:
        family: whose ratios.
        options: threshold and K as the script sets them.
        warm: the steps before which, or in which, it measures nothing.
        never: the steps that it computes though they are measured.
    """
    ratios, (threshold, most) = MAGCACHE[family]["ratios"], options
    drawn, ratio, count, error = "", 1.0, 0, 0.0
    for step in range(len(ratios)):
        skip = False
        if step not in warm:
            ratio, count = ratio * ratios[step], count + 1
            error += abs(1 - ratio)
            skip = error <= threshold and count <= most and step not in never
            if not skip:
                ratio, count, error = 1.0, 0, 0.0
        drawn += "." if skip else "#"
    return drawn


def ours(family, steps, switch=None):
    """The same of the cache with the family's recipe; a second transformer takes over at a step."""
    driven = Driven(MagCache(family=family), line)
    driven.install("transformer", *["transformer_2"] * (switch is not None))
    for step in range(steps):
        second = switch is not None and step >= switch
        driven.forward(step, still(step), steps=steps, transformer="transformer_2" if second else "transformer")
    return driven.drawn(steps=steps)


def planned(family, steps):
    """Steps that `plan` counts as skipped on a family."""
    released = families()[family]
    adapter = next(adapter for adapter in ADAPTERS if released in adapter.families)
    model = Model(adapter=adapter, family=released, heads=released.heads, layers=released.layers)
    return MagHandler(MagCache(), model).estimate(None, steps).forwards / released.forwards_per_step


@pytest.mark.parametrize(
    ("family", "options", "share"),
    [
        ("wan2.1-14b", (0.12, 4), 0.2),
        ("wan2.1-1.3b", (0.12, 2), 0.2),
        ("wan2.1-i2v-14b-480p", (0.12, 4), 0.2),
        ("wan2.1-i2v-14b-720p", (0.12, 4), 0.2),
        ("wan2.2-ti2v-5b", (0.06, 2), 0.2),
        ("hunyuan-video", (0.12, 4), 0.2),
        ("qwen-image", (0.06, 2), 0.2),
    ],
)
def test_a_warm_up_of_the_run_as_the_scripts_have_it(family, options, share):
    steps = len(MAGCACHE[family]["ratios"])
    drawn = released(family, options, range(int(share * steps)))
    assert ours(family, steps) == drawn
    assert planned(family, steps) == drawn.count(".") > 0


@pytest.mark.parametrize(
    ("family", "options", "share"), [("flux.1-dev", (0.24, 5), 0.1), ("flux.1-kontext-dev", (0.05, 4), 0.2)]
)
def test_the_step_that_the_scripts_of_flux_never_skip(family, options, share):
    drawn = released(family, options, range(int(share * 28 + 0.5)), never=[11])
    assert drawn != released(family, options, range(int(share * 28 + 0.5)))
    assert ours(family, 28) == drawn
    assert planned(family, 28) == drawn.count(".") > 0


def test_the_retention_of_each_expert_as_the_script_has_it_from_text():
    """Two forwards a step: floor(.4 x 52) of the first expert's, all up to the .4 x 28 th of the second's."""
    warm = [step for step in range(40) if 2 * step < int(52 * 0.4) or 52 <= 2 * step <= 28 * 0.4 + 52]
    drawn = released("wan2.2-a14b", (0.06, 2), warm)
    assert (drawn[:10], drawn[26:32], drawn.count("#")) == ("#" * 10, "#" * 6, 26)
    assert ours("wan2.2-a14b", 40, switch=26) == drawn
    assert planned("wan2.2-a14b", 40) == drawn.count(".")


def test_an_expert_in_which_nothing_is_skipped_as_the_script_has_it_from_an_image():
    drawn = released("wan2.2-i2v-a14b", (0.06, 2), [step for step in range(40) if 2 * step < int(30 + 50 * 0.1)])
    assert (drawn[:18], drawn.count("#")) == ("#" * 18, 30)
    assert ours("wan2.2-i2v-a14b", 40, switch=15) == drawn
    assert planned("wan2.2-i2v-a14b", 40) == drawn.count(".")
    later = ours("wan2.2-i2v-a14b", 40, switch=30)
    assert "." not in later[:31]  # whenever it takes over: a tenth of its ten steps
    # the script counts forwards, two a step: 35 of them end the unconditional branch's warm-up a step earlier
    other = released("wan2.2-i2v-a14b", (0.06, 2), [step for step in range(40) if 2 * step + 1 < int(30 + 50 * 0.1)])
    assert (other[:18], other.count("#")) == ("#" * 17 + ".", 29)


def test_the_plan_says_when_the_second_expert_is_counted_from():
    released = families()["wan2.2-a14b"]
    model = Model(adapter=ADAPTER, family=released, heads=40, layers=40)
    notes = MagHandler(MagCache(family="wan2.2-a14b"), model).estimate(None, 40).notes
    assert notes == ("magcache: the second transformer is counted from 0.65 of the run on",)


def test_the_estimate_speaks_of_a_switch_only_where_there_are_two_experts():
    released = families()["wan2.1-1.3b"]
    adapter = next(one for one in ADAPTERS if released in one.families)
    model = Model(adapter=adapter, family=released, heads=12, layers=30, config={})
    assert MagHandler(MagCache(), model).estimate(None, 50).notes == ()
