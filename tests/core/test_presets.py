"""Presets: what is attached where no method is named, that named methods win, and the options that they rest on."""

import warnings
from dataclasses import replace

import pytest
import torch
from tiny_stock import stock_pipeline
from wan_tiny import denoise, tiny_transformer

import dit_accel
from dit_accel import ConfigError, EasyCache, LiteAttention, SolAttention, StaticCache, UltraViCo
from dit_accel.adapters.installed import adapters, described
from dit_accel.attachment.backends import UnplannedRun
from dit_accel.methods.base import Model
from dit_accel.methods.caches.easy import EasyHandler
from dit_accel.methods.presets import LEVELS, PRESETS, preset_methods


def attached(model, *methods, **options):
    with dit_accel.attach(model, *methods, **options) as attachment:
        return {handler.name: handler.settings for handler in attachment.engine.handlers}


def of(adapter, family):
    return Model(adapter=adapter, family=family, heads=family.heads, layers=family.layers)


def named(level, *family):
    return [choice.config.name for choice in preset_methods(level, of(*family)).chosen]


def test_without_a_method_the_preset_balanced_is_attached_and_nothing_is_printed(capfd):
    with dit_accel.attach(tiny_transformer()) as attachment:
        assert [handler.name for handler in attachment.engine.handlers] == ["sol", "easycache"]
        assert attachment.preset.startswith("preset balanced: easycache skips every second step")
        assert attachment.preset in attachment.report().notes
    for methods, preset in [((), "none"), ((StaticCache(every=2),), None)]:
        with dit_accel.attach(tiny_transformer(), *methods, preset=preset) as attachment:
            assert [handler.name for handler in attachment.engine.handlers] == [one.name for one in methods]
            assert attachment.preset == ""
    assert capfd.readouterr() == ("", "")


def test_the_method_that_a_transformer_refuses_is_left_out_and_the_reason_said(monkeypatch):
    def refuse(self, site):
        raise ConfigError("no cache on a Tuesday")

    monkeypatch.setattr(EasyHandler, "install", refuse)
    with dit_accel.attach(tiny_transformer(), preset="balanced") as attachment:
        assert [handler.name for handler in attachment.engine.handlers] == ["sol"]
        assert "; easycache is left out: no cache on a Tuesday" in attachment.preset
        assert attachment.preset in attachment.report().notes
    with pytest.raises(ConfigError, match="Tuesday"):
        dit_accel.attach(tiny_transformer(), EasyCache(), preset="fast")
    assert dit_accel.attachment_of(tiny_transformer()) is None


@pytest.mark.parametrize("steps", [12, 13, 20, 28, 50])
def test_levels_are_a_ladder_of_steps_that_may_be_skipped(steps: int):
    caches = [PRESETS[level][0].config for level in LEVELS]
    assert [cache.threshold for cache in caches] == sorted(cache.threshold for cache in caches)
    bound = [len(cache.skipped_steps(steps)) for cache in caches]
    assert bound == sorted(bound), "each level may skip as much as the one before, or more"
    assert bound[0] < bound[-1]


def test_named_methods_win_and_what_they_exclude_is_said():
    caching = attached(tiny_transformer(), EasyCache(threshold=0.7), preset="balanced")
    assert caching["easycache"].threshold == 0.7
    assert attached(tiny_transformer(), SolAttention(beta=9.0), preset="fast")["sol"].beta == 9.0
    with dit_accel.attach(tiny_transformer(), StaticCache(every=2), preset="fast") as attachment:
        assert [handler.name for handler in attachment.engine.handlers] == ["sol", "staticcache"]
        assert "; easycache is left out: EasyCache and StaticCache both cache" in attachment.preset


def test_pictures_get_no_method_for_clips():
    assert [*attached(stock_pipeline("FluxPipeline")[0], preset="fast")] == ["easycache"]


def test_a_family_makes_clips_whatever_it_refuses():
    wan, family = described("wan2.1-1.3b")
    assert named("balanced", replace(wan, refused={"ultravico": "its clips have no end"}), family) == [
        "easycache", "sol",
    ]  # fmt: skip


def test_every_preset_can_be_attached_to_every_released_model():
    """At most one method extends an axis; Wan, on which RIFLEx is not advised, gets UltraViCo."""
    for adapter in adapters().values():
        for family in adapter.families:
            for level in LEVELS:
                names = named(level, adapter, family)
                assert ("easycache" in names) == ("easycache" not in adapter.refused), family.name
                assert not {"rope", "ultravico"} <= {*names}, family.name
    assert "ultravico" in named("careful", *described("wan2.1-14b"))


def test_each_choice_names_what_it_rests_on():
    for choice in (choice for level in LEVELS for choice in PRESETS[level]):
        assert choice.source.startswith(("measured: ", "published (arXiv "))


@pytest.mark.parametrize(
    ("methods", "preset", "match"),
    [((), "balance", "'balance'.*'balanced'"), ((UltraViCo(),), "careful", "ultravico.*trained_frames")],
)
def test_an_unknown_preset_and_a_named_method_that_does_not_fit_are_refused(methods, preset, match):
    with pytest.raises(ConfigError, match=match):
        dit_accel.attach(tiny_transformer(), *methods, preset=preset)


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
