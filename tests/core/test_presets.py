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

CACHE = StaticCache(every=2)


def named(level, adapter, family):
    model = Model(adapter=adapter, family=family, heads=family.heads, layers=family.layers)
    return [choice.config.name for choice in preset_methods(level, model).chosen]


@pytest.mark.parametrize(
    ("methods", "options", "names", "said"),
    [
        ((), {}, ["sol", "easycache"], "preset balanced: easycache skips every second step"),
        ((), dict(preset="none"), [], ""),
        ((CACHE,), {}, ["staticcache"], ""),
        ((CACHE,), dict(preset="fast"), ["sol", "staticcache"], "; easycache is left out: EasyCache and StaticCache"),
    ],
)
def test_without_a_method_a_preset_is_attached_named_methods_win_and_nothing_is_printed(
    capfd, methods, options, names, said
):
    with dit_accel.attach(tiny_transformer(), *methods, **options) as attachment:
        assert [handler.name for handler in attachment.engine.handlers] == names
        assert said in attachment.preset if said else attachment.preset == ""
        assert not said or attachment.preset in attachment.report().notes
    assert capfd.readouterr() == ("", "")


def test_the_method_that_a_transformer_refuses_is_left_out_and_the_reason_said(monkeypatch):
    def refuse(self, site):
        raise ConfigError("no cache on a Tuesday")

    monkeypatch.setattr(EasyHandler, "install", refuse)
    with dit_accel.attach(tiny_transformer(), preset="balanced") as attachment:
        assert [handler.name for handler in attachment.engine.handlers] == ["sol"]
        assert "; easycache is left out: no cache on a Tuesday" in attachment.preset
    with pytest.raises(ConfigError, match="Tuesday"):
        dit_accel.attach(tiny_transformer(), EasyCache(), preset="fast")


@pytest.mark.parametrize("steps", [12, 13, 20, 28, 50])
def test_levels_are_a_ladder_of_steps_that_may_be_skipped(steps: int):
    caches = [PRESETS[level][0].config for level in LEVELS]
    assert [cache.threshold for cache in caches] == sorted(cache.threshold for cache in caches)
    bound = [len(cache.skipped_steps(steps)) for cache in caches]
    assert bound == sorted(bound), "each level may skip as much as the one before, or more"
    assert bound[0] < bound[-1]
    for choice in (choice for level in LEVELS for choice in PRESETS[level]):
        assert choice.source.startswith(("measured: ", "published (arXiv "))


@pytest.mark.parametrize("method", [EasyCache(threshold=0.7), SolAttention(beta=9.0)])
def test_named_methods_win(method):
    with dit_accel.attach(tiny_transformer(), method, preset="fast") as attachment:
        (settings,) = [one.settings for one in attachment.engine.handlers if one.name == method.name]
    assert settings.to_dict().items() >= method.to_dict().items()
    with dit_accel.attach(stock_pipeline("FluxPipeline")[0], preset="fast") as attachment:
        assert [one.name for one in attachment.engine.handlers] == ["easycache"]  # pictures: no method for clips


def test_a_family_makes_clips_whatever_it_refuses():
    wan, family = described("wan2.1-1.3b")
    refusing = replace(wan, refused={"ultravico": "its clips have no end"})
    assert named("balanced", refusing, family) == ["easycache", "sol"]


def test_every_preset_can_be_attached_to_every_released_model():
    """At most one method extends an axis; Wan, on which RIFLEx is not advised, gets UltraViCo."""
    for adapter in adapters().values():
        for family in adapter.families:
            for level in LEVELS:
                names = named(level, adapter, family)
                assert ("easycache" in names) == ("easycache" not in adapter.refused), family.name
                assert not {"rope", "ultravico"} <= {*names}, family.name
    assert "ultravico" in named("careful", *described("wan2.1-14b"))


@pytest.mark.parametrize(
    ("methods", "preset", "match"),
    [((), "balance", "'balance'.*'balanced'"), ((UltraViCo(),), "careful", "ultravico.*trained_frames")],
)
def test_an_unknown_preset_and_a_named_method_that_does_not_fit_are_refused(methods, preset, match):
    with pytest.raises(ConfigError, match=match):
        dit_accel.attach(tiny_transformer(), *methods, preset=preset)


@pytest.mark.parametrize("steps", [4, 8, 9])
def test_runs_of_few_steps_are_computed_whole(steps):
    transformer = tiny_transformer(num_layers=1)
    config = EasyCache(threshold=1e9, warmup_steps=0, last_steps=0, min_steps=9)
    with dit_accel.attach(transformer, config) as attachment:
        denoise(transformer, steps, branches=("cond",))
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
        out = denoise(transformer, 2)
        report = attachment.report()
    assert (sum(step.sparse_layers for step in report.steps) > 0) == (least == 80)
    assert any("80 visual tokens, min_tokens = 81" in note for note in report.notes) == (least == 81)
    assert least == 80 or torch.equal(out, denoise(transformer, 2))
