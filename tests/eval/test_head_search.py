"""HeadHunter: the greedy search by itself, on a tiny model with planted heads, and as a command."""

import json

import numpy as np
import pytest
import torch
from dit_accel_assets import held_out_prompts
from dit_accel_eval.runs.loaded import tuning_request
from dit_accel_eval.tune import heads as module
from dit_accel_eval.tune.head_search import Rung, cost, kept_after, rungs_of, search
from dit_accel_eval.tune.heads import tune_heads
from dit_accel_eval.tune.objectives import objective_of
from typer.testing import CliRunner
from wan_tiny import denoise, tiny_transformer

import dit_accel
from dit_accel import ConfigError, SoftPAG
from dit_accel.cli.app import app

ALL = (Rung(prompts=1, steps=4),)


def heads(layers, count=2):
    return [f"L{layer}H{head}" for layer in range(layers) for head in range(count)]


@pytest.mark.parametrize("planted", [("L0H1", "L2H0"), ("L0H0", "L1H1", "L3H0", "L3H1")])
def test_planted_heads_are_recovered(planted):
    """The target is what the planted set makes of a tiny model; the objective, how near another set comes to it."""
    transformer = tiny_transformer(num_layers=4)
    seen = []

    def made(chosen):
        with dit_accel.attach(transformer, SoftPAG(heads=chosen, u=1.0, scale=1.0)):
            return denoise(transformer, steps=2, branches=("cond",))

    target = made(planted)

    def evaluate(chosen, prompt, steps):
        seen.append(frozenset(chosen))
        return -float((made(chosen) - target).square().mean())

    found = search(heads(4), evaluate, ALL, rounds=len(planted), per_round=1)
    assert {head for one in found for head in one.heads} == set(planted)
    assert len(seen) == len(set(seen)) <= cost(8, len(planted), 1, ALL)[0]
    every = 2**8 if len(planted) > 2 else 8 * 7 // 2
    assert len(seen) < every


def additive(values, log=None):
    def evaluate(chosen, prompt, steps):
        if log is not None:
            log.append((frozenset(chosen), prompt, steps))
        return sum(values[head] for head in chosen) + 0.001 * prompt

    return evaluate


def test_no_set_is_judged_twice_and_selected_heads_are_not_judged_again():
    names, log = heads(3), []
    values = dict(zip(names, [0.1, 0.5, 0.3, 0.3, 0.9, 0.2], strict=True))
    rungs = rungs_of(prompts=4, steps=16, halvings=2)
    assert rungs == (Rung(prompts=1, steps=4), Rung(prompts=2, steps=8), Rung(prompts=4, steps=16))
    found = search(names, additive(values, log), rungs, rounds=2, per_round=2)
    assert [one.heads for one in found] == [("L2H0", "L0H1"), ("L1H0", "L1H1")]  # equal ones in their order
    assert len(log) == len(set(log))
    assert len(log) <= cost(6, 2, 2, rungs)[0]
    assert all(len(chosen) in (1, 3) for chosen, _, _ in log)


def test_ends_where_no_head_is_left():
    names = heads(1, 3)
    values = dict.fromkeys(names, 1.0)
    found = search(names, additive(values), ALL, rounds=9, per_round=2)
    assert [one.heads for one in found] == [("L0H0", "L0H1"), ("L0H2",)]
    assert search(names, additive(values), ALL, rounds=1, per_round=9)[0].heads == tuple(names)


def test_the_order_of_judging_has_no_influence():
    names = heads(4)
    values = {head: float(np.cos(7 * at)) for at, head in enumerate(names)}
    one = search(names, additive(values), ALL, rounds=3, per_round=1)
    back = search(names[::-1], additive(values), ALL, rounds=3, per_round=1)
    assert [found.heads for found in one] == [found.heads for found in back]


def test_halving_costs_less():
    full, halved = cost(576, 1, 24, rungs_of(20, 20, 0)), cost(576, 1, 24, rungs_of(20, 20, 2))
    assert full == (11520, 230400)  # the paper's general search
    assert halved[1] < full[1] / 2
    assert [kept_after(9, rung, 3, 2) for rung in range(3)] == [5, 5, 2]


@pytest.fixture
def request_of(tmp_path):
    def make(**changes):
        options = dict(
            model="wan-plain",
            prompts=tuple(held_out_prompts("wan-plain", 65)[64:]),
            num_inference_steps=2,
            num_frames=5,
            height=32,
            width=32,
        )
        return tuning_request(**{**options, **changes})

    return make


@pytest.mark.slow
def test_a_search_writes_heads_goes_on_and_generates_nothing_twice(request_of, tmp_path, monkeypatch):
    output, made = tmp_path / "heads.json", []
    original = module.run

    def run(*arguments, **options):
        if len(made) == stop[0]:
            raise KeyboardInterrupt
        made.append(arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(module, "run", run)
    options = dict(objective="objective:brightness", rounds=1, per_round=2, halvings=0)
    stop = [7]
    with pytest.raises(KeyboardInterrupt):
        tune_heads(request_of(), output, **options)
    assert not output.exists()
    stop = [10**6]
    found = tune_heads(request_of(), output, **options)
    assert found.clips == 30
    assert len(made) == 30 + 2 * 3  # the sheet shows three prompts without and with
    lines = [json.loads(line) for line in (tmp_path / "heads.jsonl").read_text().splitlines()]
    scores = {line["heads"][0]: line["score"] for line in lines[1:]}
    best = sorted(scores, key=lambda head: -scores[head])[:2]
    assert list(found.heads) == best == json.loads(output.read_text())["heads"]
    assert found.sheet.stat().st_size > 1000
    assert found.to_dict()["heads"] == best
    assert SoftPAG(heads=str(output)).heads == str(output)
    with pytest.raises(ConfigError, match=r"heads\.jsonl.*objective = .*finish"):
        tune_heads(request_of(), output, **{**options, "objective": "sharpness"})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(rounds=0), "rounds >= 1, got 0"),
        (dict(halvings=-1), "halvings >= 0, got -1"),
        (dict(objective="pikscore"), r"objective 'pikscore'.*'pickscore'.*module:function"),
        (
            dict(objective="clip=/nowhere"),
            r"objective 'clip'.*'/nowhere'",
        ),
        (
            dict(objective="clip="),
            "objective 'clip='",
        ),
        (dict(objective="nowhere:f"), r"objective nowhere:f .*module named 'nowhere'"),
        (dict(objective="objective:f"), r"objective objective:f .*'f'"),
        (dict(objective="objective:broken"), r"objective:broken.*nan.*\('L0H0',\)"),
    ],
)
def test_bad_options_are_refused(request_of, tmp_path, options, text):
    with pytest.raises(ConfigError, match=text):
        tune_heads(request_of(), tmp_path / "heads.json", **{"halvings": 0, **options})


def test_heads_that_are_named_and_other_outputs_are_refused(request_of, tmp_path):
    with pytest.raises(ConfigError, match=r"got softpag\.heads = 'L1'"):
        tune_heads(request_of(methods=(SoftPAG(heads="L1"),)), tmp_path / "heads.json")
    with pytest.raises(ConfigError, match=r"\.json.*got .*heads\.toml"):
        tune_heads(request_of(), tmp_path / "heads.toml")
    with pytest.raises(ConfigError, match=r"objective 'checker'.*embedded models"):
        objective_of("checker", None)
    with pytest.raises(ConfigError, match=r"objective 'checker'.*'a red circle'"):
        objective_of("checker", "wan-plain")(np.zeros((5, 64, 64, 3), np.float32), "a red circle")


def test_each_command_has_options_of_its_own():
    told = CliRunner().invoke(app, ["tune", "lite", "--rounds", "2"])
    assert told.exit_code == 2
    assert "No such option: --rounds" in told.stderr
    assert "No such option: --metric" in CliRunner().invoke(app, ["tune", "heads", "--metric", "l2"]).stderr
    helped = CliRunner().invoke(app, ["tune", "heads", "--help"])
    assert helped.exit_code == 0
    assert all(option in helped.stdout for option in ("--rounds", "--num-frames", "--softpag"))
    assert "--target-error" not in helped.stdout


def test_sharpness_is_an_objective():
    still = torch.zeros(2, 8, 8, 3).numpy()
    assert objective_of("sharpness", None)(still, "") == 0.0
