"""HeadHunter: the greedy search by itself, what heads are ranked by, on a tiny model, and as a command."""

import json
import math

import numpy as np
import pytest
from dit_accel_eval.runs.loaded import embedded_prompts
from dit_accel_eval.tune.heads import cost, search, tune_heads
from dit_accel_eval.tune.objectives import HeadSelection, objective_of
from tuning import one_pipeline
from tuning import request as request_of
from wan_tiny import denoise, tiny_transformer

import dit_accel
from dit_accel import ConfigError, SoftPAG

pipe = pytest.fixture(one_pipeline)


def heads(layers, count=2):
    return [f"L{layer}H{head}" for layer in range(layers) for head in range(count)]


def test_planted_heads_are_recovered():
    """The target is what the planted set makes of a tiny model; the objective, how near another set comes to it."""
    planted = ("L0H0", "L1H1", "L3H0", "L3H1")
    transformer = tiny_transformer(num_layers=4)
    seen = []

    def made(chosen):
        with dit_accel.attach(transformer, SoftPAG(heads=chosen, u=1.0, scale=1.0)):
            return denoise(transformer, steps=2, branches=("cond",))

    target = made(planted)

    def evaluate(jobs):
        seen.extend(frozenset(chosen) for chosen, _ in jobs)
        return [-float((made(chosen) - target).square().mean()) for chosen, _ in jobs]

    found = search(heads(4), evaluate, prompts=1, rounds=len(planted), per_round=1)
    assert {head for _, head, _ in found} == set(planted)
    assert len(seen) == len(set(seen)) <= cost(8, len(planted), 1, 1) < 2**8


def additive(values, log=None):
    def evaluate(jobs):
        if log is not None:
            log.extend((frozenset(chosen), prompt) for chosen, prompt in jobs)
        return [sum(values[head] for head in chosen) + 0.001 * prompt for chosen, prompt in jobs]

    return evaluate


def test_several_objectives_select_by_their_harmonic_mean_or_by_one_where_others_are_passed():
    names = heads(2)
    values = dict(zip(names, [(9.0, 1.0), (4.0, 4.0), (8.0, 2.0), (1.0, 9.0)], strict=True))
    options = dict(prompts=1, rounds=1, per_round=3)

    def evaluate(jobs):
        return [values[chosen[0]] for chosen, _ in jobs]

    found = search(names, evaluate, **options, worth=HeadSelection.of("harmonic: a, b").worth)
    assert [(head, round(score, 3)) for _, head, score in found] == [("L0H1", 4.0), ("L1H0", 3.2), ("L0H0", 1.8)]
    found = search(names, evaluate, **options, worth=HeadSelection.of("threshold: a, b >= 2").worth)
    assert [head for _, head, _ in found] == ["L1H0", "L0H1", "L1H1"]
    found = search(names, evaluate, **options, worth=HeadSelection.of("threshold: a, b >= 4").worth)
    assert [head for _, head, _ in found] == ["L0H1", "L1H1"]


def test_no_set_is_judged_twice_and_selected_heads_are_not_judged_again():
    names, log = heads(3), []
    values = dict(zip(names, [0.1, 0.5, 0.3, 0.3, 0.9, 0.2], strict=True))
    found = search(names, additive(values, log), prompts=4, rounds=2, per_round=2)
    assert [(one, head) for one, head, _ in found] == [(1, "L2H0"), (1, "L0H1"), (2, "L1H0"), (2, "L1H1")]
    assert [score for *_, score in found] == pytest.approx([0.9015, 0.5015, 1.7015, 1.7015])  # equal in their order
    assert len(log) == len(set(log)) == cost(6, 2, 2, 4) == 4 * (6 + 4)
    assert all(len(chosen) in (1, 3) for chosen, _ in log)


def test_ends_where_no_head_is_left():
    names = heads(1, 3)
    values = dict.fromkeys(names, 1.0)
    found = search(names, additive(values), prompts=1, rounds=9, per_round=2)
    assert [(one, head) for one, head, _ in found] == [(1, "L0H0"), (1, "L0H1"), (2, "L0H2")]
    assert [head for _, head, _ in search(names, additive(values), prompts=1, rounds=1, per_round=9)] == names
    assert cost(3, 9, 2, 1) == 3 + 1


def request(*methods):
    return request_of(*methods, prompts=embedded_prompts("wan-plain", 1), num_inference_steps=1)


def test_a_search_writes_heads_and_keeps_what_was_judged_for_further_rounds(tmp_path, pipe, monkeypatch):
    judged = []
    worth = lambda runs, config, judges, trial: judged.append(trial) or [float(trial[0][0][1]) + len(trial[0])]  # noqa: E731
    monkeypatch.setattr("dit_accel_eval.tune.heads._judged", worth)
    output = tmp_path / "heads.json"
    options = dict(objective="objective:brightness", rounds=1, per_round=2)
    found = tune_heads(request(), output, **options)
    assert found.found["clips"] == len(judged) == 30 == cost(30, 1, 2, 1)
    assert found.found["heads"] == ["L5H0", "L5H1"] == json.loads(output.read_text())["heads"]
    assert SoftPAG(heads=str(output)).heads == str(output)
    assert tune_heads(request(), output, **options).found == found.found
    assert len(judged) == 30
    assert tune_heads(request(), output, **{**options, "rounds": 2}).found["heads"][2:] == ["L5H2", "L5H3"]
    assert len(judged) == 58
    with pytest.raises(ConfigError, match=r"heads\.json\.progress.*objective = .*finish"):
        tune_heads(request(), output, **{**options, "objective": "sharpness"})
    assert cost(576, 1, 24, 20) == 11520  # the paper's general search


def test_bad_options_are_refused(tmp_path, pipe):
    for options, text in (
        (dict(rounds=0), "rounds >= 1, got 0"),
        (dict(objective="harmonic: sharpness, sharpnes"), r"objective 'sharpnes'.*'sharpness'"),
        (
            dict(objective="threshold: checker, sharpness"),
            r"threshold: A, B >= 20.*got 'threshold: checker, sharpness'",
        ),
        (dict(objective="sharpnes"), r"objective 'sharpnes'.*'sharpness'.*module:function"),
        (dict(objective="nowhere:f"), r"objective nowhere:f .*module named 'nowhere'"),
        (dict(objective="objective:f"), r"objective objective:f .*'f'"),
        (dict(objective="objective:broken"), r"objective.*nan.*\('L0H0',\)"),
    ):
        with pytest.raises(ConfigError, match=text):
            tune_heads(request(), tmp_path / "heads.json", **options)
    with pytest.raises(ConfigError, match=r"got softpag\.heads = 'L1'"):
        tune_heads(request(SoftPAG(heads="L1")), tmp_path / "heads.json")
    with pytest.raises(ConfigError, match=r"objective 'checker'.*embedded models"):
        objective_of("checker", None)
    with pytest.raises(ConfigError, match=r"objective 'checker'.*'a red circle'"):
        objective_of("checker", "wan-plain")(np.zeros((5, 64, 64, 3), np.float32), "a red circle")


def test_heads_that_pass_no_threshold_are_not_written(tmp_path, pipe, monkeypatch):
    monkeypatch.setattr("dit_accel_eval.tune.heads._judged", lambda runs, config, judges, trial: [1.0, 2.0])
    with pytest.raises(ConfigError, match=r"passes.*>= 1e9'"):
        tune_heads(request(), tmp_path / "heads.json", objective="threshold: sharpness, objective:brightness >= 1e9")
    assert not (tmp_path / "heads.json").exists()


def test_means_are_taken_before_they_are_combined():
    harmonic = HeadSelection.of("harmonic: one, two")
    assert harmonic.objectives == ("one", "two")
    assert harmonic.worth([[1.0, 30.0], [3.0, 10.0]]) == pytest.approx(2 / (1 / 2 + 1 / 20))
    published = HeadSelection.of("threshold: clip, pick >= 20, aesthetic >= 6")
    assert published.worth([[0.3, 19.0, 7.0], [0.1, 21.0, 5.0]]) == pytest.approx(0.2)
    assert published.worth([[0.9, 19.0, 7.0], [0.9, 20.9, 7.0]]) == -math.inf


def test_what_says_nothing_is_refused():
    for text in (
        "harmonic: one",
        "harmonic: one, two >= 3",
        "threshold: one >= 2, two >= 3",
        "threshold: one, two",
        "threshold: one, two >= many",
        "harmonic: , one",
        "harmonic:",
    ):
        with pytest.raises(ConfigError, match=rf"'harmonic: A, B'.*got '{text}'"):
            HeadSelection.of(text)


def test_no_harmonic_mean_of_what_is_not_above_0():
    with pytest.raises(ConfigError, match=r"got -1, 2 for one, two;"):
        HeadSelection.of("harmonic: one, two").worth([[-1.0, 2.0]])
