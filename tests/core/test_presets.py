"""Presets: what is attached where no method is named, that named methods win, and the options that they rest on."""

import warnings

import pytest
import tiny_image_pipelines
import torch
from wan_tiny import denoise, tiny_transformer

import dit_accel
from dit_accel import ConfigError, EasyCache, LiteAttention, SolAttention, StaticCache, UltraViCo
from dit_accel.adapters.installed import adapters
from dit_accel.attachment.backends import UnplannedRun
from dit_accel.methods.presets import LEVELS, PRESETS, choices


def attached(model, *methods, **options):
    attachment = dit_accel.attach(model, *methods, **options)
    names = {handler.name: handler.settings for handler in attachment.engine.handlers}
    attachment.detach()
    return names


def test_without_a_method_the_preset_balanced_is_attached_and_said(capsys):
    assert [*attached(tiny_transformer())] == ["sol", "easycache"]  # sizes of no released model: none is longer
    line = capsys.readouterr().err
    assert line.startswith("preset balanced: easycache ")
    assert line.count("\n") == 1
    assert "sol" in line
    assert attached(tiny_transformer(), preset="none") == {}
    assert [*attached(tiny_transformer(), StaticCache(every=2))] == ["staticcache"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("steps", [12, 13, 20, 28, 50])
def test_levels_are_a_ladder_of_steps_that_may_be_skipped(steps: int):
    caches = [attached(tiny_transformer(), preset=level)["easycache"] for level in LEVELS]
    assert [cache.threshold for cache in caches] == sorted(cache.threshold for cache in caches)
    bound = [len(cache.skipped_steps(steps)) for cache in caches]
    assert bound == sorted(bound), "each level may skip as much as the one before, or more"
    assert bound[0] < bound[-1]


def test_named_methods_win():
    named = attached(tiny_transformer(), EasyCache(threshold=0.7), preset="balanced")
    assert named["easycache"].threshold == 0.7
    assert [*attached(tiny_transformer(), StaticCache(every=2), preset="fast")] == ["sol", "staticcache"]
    assert attached(tiny_transformer(), SolAttention(beta=9.0), preset="fast")["sol"].beta == 9.0


def test_pictures_get_no_method_for_clips():
    pipe, _ = tiny_image_pipelines.flux()
    assert [*attached(pipe, preset="fast")] == ["easycache"]


def test_every_preset_can_be_attached_to_every_released_model():
    """At most one method extends an axis; Wan, on which RIFLEx is not advised, gets UltraViCo."""
    for adapter in adapters().values():
        for family in adapter.families:
            model = resolve_family(adapter, family)
            for level in LEVELS:
                names = [choice.config.name for choice in choices(level, model)]
                assert ("easycache" in names) == ("easycache" not in adapter.refused), family.name
                assert not {"rope", "ultravico"} <= {*names}, family.name
    wan = next(adapter for adapter in adapters().values() if adapter.name == "wan")
    family = next(one for one in wan.families if one.name == "wan2.1-14b")
    assert "ultravico" in [one.config.name for one in choices("careful", resolve_family(wan, family))]


def resolve_family(adapter, family):
    from dit_accel.methods.base import Model

    return Model(adapter=adapter, family=family, heads=family.heads, layers=family.layers)


def test_each_choice_names_what_it_rests_on():
    for level in LEVELS:
        for choice in PRESETS[level]:
            assert choice.source.startswith(("measured: ", "published (arXiv "))


def test_an_unknown_preset_is_refused():
    with pytest.raises(ConfigError, match=r"'balance'.*'balanced'"):
        dit_accel.attach(tiny_transformer(), preset="balance")


def test_what_a_compiled_transformer_cannot_have_is_left_out(capsys):
    compiled = torch.compile(tiny_transformer(), backend="eager")
    names = attached(compiled, preset="balanced")
    assert "easycache" in names or not names
    assert capsys.readouterr().err.startswith("preset balanced: ")


@pytest.mark.parametrize("steps", [4, 8, 9])
def test_runs_of_few_steps_are_computed_whole(steps):
    transformer = tiny_transformer()
    config = EasyCache(threshold=1e9, warmup_steps=0, last_steps=0, min_steps=9)
    with dit_accel.attach(transformer, config) as attachment:
        denoise(transformer, steps)
        data = attachment.report().section("easycache").data
    assert (data["reused"] > 0) == (steps == 9)
    assert ({entry["reason"] for entry in data["forwards"]} == {"few steps"}) == (steps < 9)
    assert len(config.skipped_steps(steps)) == (0 if steps < 9 else 8)


@pytest.mark.parametrize("method", [SolAttention, LiteAttention], ids=lambda one: one.name)
@pytest.mark.parametrize("least", [80, 81])
def test_short_sequences_stay_dense_where_that_is_the_users_choice(method, least):
    transformer = tiny_transformer()
    config = method(block_size=16, dense_steps=0, dense_layers=0, min_tokens=least)
    with dit_accel.attach(transformer, config, backend="torch") as attachment, warnings.catch_warnings():
        warnings.simplefilter("error", UnplannedRun)
        plain = denoise(transformer)
        report = attachment.report()
    assert (sum(step.sparse_layers for step in report.steps) > 0) == (least == 80)
    assert (f"{method.name} stays dense over 80 visual tokens, min_tokens = 81" in report.notes) == (least == 81)
    if least == 81:
        assert torch.equal(plain, denoise(transformer))


def test_a_plan_counts_no_saving_below_min_tokens():
    from dit_accel.estimate.estimate import estimate

    wan = next(adapter for adapter in adapters().values() if adapter.name == "wan")
    family = next(one for one in wan.families if one.name == "wan2.1-1.3b")
    at = dict(height=480, width=832, num_frames=81)  # 32,760 visual tokens
    dense = estimate(wan, family, methods=[SolAttention(min_tokens=40_000)], **at)
    sparse = estimate(wan, family, methods=[SolAttention(min_tokens=30_000)], **at)
    assert dense.speedup == pytest.approx(1.0)
    assert sparse.speedup > 1.1


def test_a_named_method_that_does_not_fit_is_refused_beside_a_preset():
    with pytest.raises(ConfigError, match=r"ultravico.*trained_frames"):
        dit_accel.attach(tiny_transformer(), UltraViCo(), preset="careful")
