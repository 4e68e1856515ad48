"""TeaCache: the rule on made-up signals, whose polynomial it takes, and what it refuses."""

import dataclasses
import math

import pytest
import torch
from cache_calls import ADAPTER, Driven, line, run_through, still
from dit_accel_pipelines.families.step_caches import TEACACHE_RET

from dit_accel import ConfigError, TeaCache

POLYNOMIAL = (2.0, 0.5, 0.01)


def signal(transformer, inputs):
    return inputs["hidden_states"] * 2 + 1


def driven(monkeypatch, config, make=signal, **options):
    monkeypatch.setattr("cache_calls.ADAPTER", _with(make))
    return Driven(config, line, **options)


def _with(make):
    return dataclasses.replace(ADAPTER, signal=make)


def latents(step):
    torch.manual_seed(step)
    return torch.full((1, 2, 3), 1.0 + 0.1 * step) + 0.05 * torch.randn(1, 2, 3)


def written_out(threshold, warmup, steps, last=1):
    """The published rule."""
    drawn, total, before = "", 0.0, None
    for step in range(steps):
        now = signal(None, {"hidden_states": latents(step)}).double()
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


@pytest.mark.parametrize("threshold", [0.0, 0.03, 0.06, 0.1, 0.3])
@pytest.mark.parametrize("warmup", [1, 4])
def test_the_rule(monkeypatch, threshold, warmup):
    made = driven(monkeypatch, TeaCache(threshold=threshold, warmup_steps=warmup, polynomial=POLYNOMIAL))
    run_through(made, latents, steps=14)
    assert made.drawn(steps=14) == written_out(threshold, warmup, 14)


def test_the_rule_skips_some_and_computes_some():
    assert {*written_out(0.1, 1, 14)[1:-1]} == {"#", "."}


def test_all_branches_follow_the_first(monkeypatch):
    made = driven(monkeypatch, TeaCache(threshold=0.1, polynomial=POLYNOMIAL))
    run_through(made, latents, branches=("cond", "uncond"))
    assert made.drawn("cond") == made.drawn("uncond")
    assert "." in made.drawn()
    assert made.handler.report().data["threshold"] == 0.1


def test_a_polynomial_below_0_counts_as_0(monkeypatch):
    made = driven(monkeypatch, TeaCache(threshold=1e-9, polynomial=(-1.0,)))
    run_through(made, latents)
    assert made.drawn() == "#........#"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_computed(monkeypatch, bad):
    made = driven(monkeypatch, TeaCache(threshold=1e9, polynomial=POLYNOMIAL), lambda *_: torch.full((2, 3), bad))
    run_through(made, latents)
    assert made.drawn() == "#" * 10


def test_the_change_is_taken_in_float32(monkeypatch):
    made = driven(
        monkeypatch, TeaCache(threshold=1e9, polynomial=(1.0, 0.0)),
        lambda _, inputs: (60000 - 6000 * inputs["hidden_states"]).half(),
    )  # fmt: skip
    made.forward(0, still(0))
    made.forward(1, still(1) + 1)
    assert made.handler.report().data["forwards"][1]["value"] == pytest.approx(0.1, rel=1e-2)


def test_the_signal_is_taken_after_a_forced_step_and_before_others(monkeypatch):
    order = []
    made = driven(
        monkeypatch, TeaCache(threshold=1e9, warmup_steps=2, polynomial=POLYNOMIAL),
        lambda *_: order.append("signal") or torch.ones(3),
    )  # fmt: skip
    made.output = lambda *_: order.append("forward") or (torch.ones(1, 2, 3),)
    for step in range(3):
        made.forward(step, still(step))
    assert order == ["forward", "signal", "forward", "signal", "signal"]


def test_two_transformers_take_a_polynomial_each(monkeypatch):
    with pytest.raises(
        ConfigError,
        match=r"^teacache.*transformer_2.*teacache\.polynomial_2.*tune teacache$",
    ):
        driven(monkeypatch, TeaCache(polynomial=POLYNOMIAL)).forward(0, still(0), transformer="transformer_2")
    made = driven(monkeypatch, TeaCache(threshold=0.5, polynomial=(0.2,), polynomial_2=(0.6,), last_steps=0))
    for step in range(10):
        made.forward(step, latents(step), transformer="transformer" if step < 5 else "transformer_2")
    assert made.drawn() == "#..#.#####"


def test_the_mode_of_five_first_steps_takes_its_own_signal_and_numbers(monkeypatch):
    config = TeaCache(use_ret_steps=True, family="wan2.1-1.3b", threshold=1e9)
    monkeypatch.setattr("cache_calls.ADAPTER", dataclasses.replace(ADAPTER, signal=None, projected_signal=signal))
    made = Driven(config, line)
    assert made.handler.settings.polynomial == TEACACHE_RET["wan2.1-1.3b"]["polynomial"]
    run_through(made, latents)
    assert made.drawn() == "#####....."
    assert TeaCache(use_ret_steps=True).filled(TEACACHE_RET["wan2.1-14b"]).threshold == 0.1
    with pytest.raises(ConfigError, match=r"mochi-1.*published.*wan2\.1-i2v"):
        Driven(TeaCache(use_ret_steps=True, family="mochi-1"), line)
    with pytest.raises(ConfigError, match=r"use_ret_steps.*made-up.*a projected_signal$"):
        driven(monkeypatch, config)


def test_a_model_without_a_polynomial_or_a_signal(monkeypatch):
    with pytest.raises(
        ConfigError,
        match=r"^teacache.*'made-up, 1 layers, 1 heads'.*cogvideox-2b, .*tune teacache.*teacache\.family$",
    ):
        driven(monkeypatch, TeaCache())
    with pytest.raises(
        ConfigError,
        match=r"^teacache.*first block.*made-up.*easycache",
    ):
        driven(monkeypatch, TeaCache(polynomial=POLYNOMIAL), None)
    made = driven(monkeypatch, TeaCache(family="mochi-1"))
    assert made.handler.settings.threshold == 0.06


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(threshold=-1.0), r"^teacache\.threshold.*got -1\.0"),
        (dict(polynomial=()), r"^teacache\.polynomial.*got \[\]"),
        (
            dict(polynomial_2=(1.0,)),
            r"^teacache\.polynomial_2 is set",
        ),
    ],
)
def test_options_out_of_range(options, text):
    with pytest.raises(ConfigError, match=text):
        TeaCache(**options)
