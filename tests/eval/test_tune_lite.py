"""`tune lite`, the search of thresholds and what they bound; `tune heads`, the greedy search and what it ranks by."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from dit_accel_eval.runs.loaded import embedded_prompts
from dit_accel_eval.tune.heads import HeadSelection, cost, objective_of, search, tune_heads
from dit_accel_eval.tune.lite import CLOSE, HIGHEST, LOWEST, NEAR, Tuner, combine, error_of, search_level, tune_lite
from dit_accel_pipelines.generation.generate import run
from hypothesis import given, settings
from hypothesis import strategies as st
from one_layer import OneLayer
from tuning import PROMPTS, SMALL, one_pipeline, tune
from tuning import request as request_of
from wan_tiny import denoise, tiny_transformer

import dit_accel
from dit_accel import ConfigError, LiteAttention, RadialAttention, SoftPAG
from dit_accel.adapters.adapter import Adapter
from dit_accel.methods.attention.lite.thresholds import read_thresholds
from dit_accel.methods.base import Model
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.tiling import Tiling

LITE = LiteAttention(block_size=16, dense_steps=0)


pipe = pytest.fixture(one_pipeline)


def request(*methods, **changes):
    sizes = dict(num_inference_steps=4, num_frames=9, height=32, width=32, guidance_scale=1.0, prompts=PROMPTS[:1])
    return request_of(*methods, **{**sizes, **changes})


@given(
    steps=st.lists(st.tuples(st.floats(LOWEST, HIGHEST), st.floats(0, 0.3)), max_size=12),
    target=st.floats(0.001, 0.5),
    start=st.floats(-25, 1),
)
@settings(max_examples=200, deadline=None)
def test_the_level_found_is_within_the_target_and_the_next_is_not(steps, target, start):
    """Errors rise in steps, as whole tiles go."""
    asked = []

    def error_at(level: float) -> float:
        assert LOWEST <= level <= HIGHEST
        asked.append(level)
        return sum(rise for place, rise in steps if place <= level)

    level = search_level(error_at, target, start)
    assert len(asked) <= 25
    if level == -math.inf:
        assert error_at(LOWEST) > target
        return
    assert error_at(level) <= target
    assert level == HIGHEST or error_at(level) >= NEAR * target or error_at(min(level + CLOSE, HIGHEST)) > target


class Stage(OneLayer):
    """One attention layer and one handler, told its step by hand."""

    def __init__(self, handler) -> None:
        super().__init__(handler, steps=6, tokens_first=True)

    def at(self, step: int, q, k, v) -> torch.Tensor:
        return self.call(q, k, v, TokenLayout(frames=2, height=8, width=12), step=step)


@pytest.mark.parametrize("criterion", ["maxgap", "mass"])
def test_votes_stay_under_the_target_and_the_figures_are_what_is_measured(criterion):
    """On unchanged inputs: each call differs from the one before by what its votes were said to add."""
    adapter = Adapter(name="any", transformers=(), self_attention=())
    model = Model(adapter=adapter, family=None, heads=2, layers=1, tiling=Tiling(16))
    tuner = Tuner(LiteAttention(dense_steps=0, criterion=criterion), model, 0.05)
    stage = Stage(tuner)
    q, k, v = (torch.randn(1, 192, 2, 8, dtype=torch.float64) for _ in range(3))
    outs = [stage.at(step, 3 * q, k, v) for step in range(6)]
    assert [found["step"] for found in tuner.found] == [0, 1, 2, 3, 4]  # nobody would read the last call's votes
    for found, before, after in zip(tuner.found, outs, outs[1:], strict=False):
        assert 0 < found["added"] <= 0.05
        assert error_of(after, before) == pytest.approx(found["added"], rel=1e-4)
        assert error_of(before, outs[0]) == pytest.approx(found["dense"], rel=1e-3, abs=1e-6)
    kept = [found["kept"] for found in tuner.found]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] < 1
    assert tuner.found[-1]["dense"] > tuner.found[1]["added"]  # errors add up, which the target alone does not show


def test_the_lowest_threshold_of_prompts_and_branches_is_written_and_errors_are_relative_to_the_reference():
    reference, other = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])
    assert (error_of(other, reference), error_of(reference, reference)) == (pytest.approx(1 / 7), 0)

    def found(threshold: float, step: int, layer: int = 0) -> dict:
        return {"transformer": "transformer", "layer": layer, "step": step, "threshold": threshold}

    calls = [found(-3.0, 1), found(-5.0, 1), found(-2.0, 2), found(-4.0, 1), found(-2.5, 2), found(-1.0, 2, layer=1)]
    table = combine(calls, {"transformer": 2}, 4, "m", "maxgap", 0.01)
    none = -math.inf
    assert table.thresholds == {"transformer": ((none, -5.0, -2.5, none), (none, none, -1.0, none))}
    assert (table.model, table.num_inference_steps, table.target_error) == ("m", 4, 0.01)


@pytest.mark.slow
def test_a_run_with_the_file_is_the_run_that_was_tuned(tmp_path: Path, pipe):
    asked = request(LITE)
    tuned = tune_lite(asked, tmp_path / "lite.toml", target_error=0.05)
    assert read_thresholds(tmp_path / "lite.toml").model == tuned.found["model"] == "wan-plain"
    assert [path.name for path in tmp_path.iterdir()] == ["lite.toml"]
    rows = tuned.found["steps"]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["added"] <= 0.05 for row in rows)
    assert rows[0]["dense"] < 1e-5
    assert rows[2]["dense"] > rows[1]["dense"] > 0
    dense = run(pipe, asked)
    config = LiteAttention(block_size=16, dense_steps=0, thresholds_file=str(tmp_path / "lite.toml"))
    with dit_accel.attach(pipe, config) as attachment:
        made = run(pipe, asked)
        densities = [step.density for step in attachment.report().steps]
    assert densities[0] == 1.0
    assert densities[1:] == pytest.approx([row["kept"] for row in rows], abs=0.01)
    assert densities[-1] < 0.95
    difference = torch.from_numpy(made.frames).double() - torch.from_numpy(dense.frames).double()
    psnr = 20 * math.log10(255 / float(difference.square().mean().sqrt()))
    assert tuned.found["prompts"][0]["psnr"] == pytest.approx(psnr, abs=1.0)


def test_it_tunes_inside_another_methods_tiles(tmp_path: Path, pipe):
    radial = RadialAttention(block_size=16, decay_factor=0.2, near="half", dense_steps=0, dense_layers=0)
    asked = request(radial, LiteAttention(dense_steps=0), num_inference_steps=3)
    tuned = tune_lite(asked, tmp_path / "lite.toml", target_error=0.05)
    assert max(row["kept"] for row in tuned.found["steps"]) < 0.9


def test_settings_that_make_no_sense(tmp_path):
    for config, options, text in (
        (LiteAttention(threshold=-5.0), {}, r"tune lite.*got lite\.threshold = -5\.0"),
        (LiteAttention(target_density=0.5), {}, r"got lite\.target_density = 0\.5"),
        (LiteAttention(criterion="budget"), {}, r"lite\.criterion 'maxgap'.*'mass', got 'budget'"),
        (LITE, {"target_error": 0.0}, r"target_error.*0 and 1, got 0\.0"),
    ):
        with pytest.raises(ConfigError, match=text):
            tune_lite(request(config), tmp_path / "lite.toml", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("steps", "options"), [(1, []), (3, ["dense_steps=2"]), (2, ["dense_layers=6"]), (2, ["dense_above_sigma=0.0001"])]
)
def test_nothing_to_tune_is_an_error(tmp_path, monkeypatch, pipe, steps, options):
    monkeypatch.chdir(tmp_path)
    result = tune("lite", *SMALL, "--num-inference-steps", steps, *(f"--set=lite.{option}" for option in options))
    assert result.exit_code == 2
    assert f"tune lite has nothing to tune, got num_inference_steps = {steps}: " in result.stderr
    assert "ask for more steps, or fewer dense ones: --set lite.dense_steps=0" in result.stderr
    assert not list(tmp_path.iterdir())


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
    names = heads(1, 3)
    values = dict.fromkeys(names, 1.0)
    found = search(names, additive(values), prompts=1, rounds=9, per_round=2)
    assert [(one, head) for one, head, _ in found] == [(1, "L0H0"), (1, "L0H1"), (2, "L0H2")]
    assert [head for _, head, _ in search(names, additive(values), prompts=1, rounds=1, per_round=9)] == names
    assert cost(3, 9, 2, 1) == 3 + 1


def one_step(*methods):
    return request_of(*methods, prompts=embedded_prompts("wan-plain", 1), num_inference_steps=1)


def test_a_search_writes_heads_and_keeps_what_was_judged_for_further_rounds(tmp_path, pipe, monkeypatch):
    judged = []
    worth = lambda runs, config, judges, trial: judged.append(trial) or [float(trial[0][0][1]) + len(trial[0])]  # noqa: E731
    monkeypatch.setattr("dit_accel_eval.tune.heads._judged", worth)
    output = tmp_path / "heads.json"
    options = dict(objective="objective:brightness", rounds=1, per_round=2)
    found = tune_heads(one_step(), output, **options)
    assert found.found["clips"] == len(judged) == 30 == cost(30, 1, 2, 1)
    assert found.found["heads"] == ["L5H0", "L5H1"] == json.loads(output.read_text())["heads"]
    assert SoftPAG(heads=str(output)).heads == str(output)
    assert tune_heads(one_step(), output, **options).found == found.found
    assert len(judged) == 30
    assert tune_heads(one_step(), output, **{**options, "rounds": 2}).found["heads"][2:] == ["L5H2", "L5H3"]
    assert len(judged) == 58
    with pytest.raises(ConfigError, match=r"heads\.json\.progress.*objective = .*finish"):
        tune_heads(one_step(), output, **{**options, "objective": "sharpness"})
    assert cost(576, 1, 24, 20) == 11520  # the paper's general search


def test_bad_options_are_refused_and_heads_that_pass_no_threshold_are_not_written(tmp_path, pipe, monkeypatch):
    for options, text in (
        (dict(rounds=0), "rounds >= 1, got 0"),
        (dict(objective="harmonic: sharpness, sharpnes"), r"objective 'sharpnes'.*'sharpness'"),
        (dict(objective="threshold: checker, sharpness"), r"threshold: A, B >= 20.*got 'threshold: checker, sharpn"),
        (dict(objective="sharpnes"), r"objective 'sharpnes'.*'sharpness'.*module:function"),
        (dict(objective="nowhere:f"), r"objective nowhere:f .*module named 'nowhere'"),
        (dict(objective="objective:f"), r"objective objective:f .*'f'"),
        (dict(objective="objective:broken"), r"objective.*nan.*\('L0H0',\)"),
    ):
        with pytest.raises(ConfigError, match=text):
            tune_heads(one_step(), tmp_path / "heads.json", **options)
    with pytest.raises(ConfigError, match=r"got softpag\.heads = 'L1'"):
        tune_heads(one_step(SoftPAG(heads="L1")), tmp_path / "heads.json")
    with pytest.raises(ConfigError, match=r"objective 'checker'.*embedded models"):
        objective_of("checker", None)
    with pytest.raises(ConfigError, match=r"objective 'checker'.*'a red circle'"):
        objective_of("checker", "wan-plain")(np.zeros((5, 64, 64, 3), np.float32), "a red circle")
    monkeypatch.setattr("dit_accel_eval.tune.heads._judged", lambda runs, config, judges, trial: [1.0, 2.0])
    with pytest.raises(ConfigError, match=r"passes.*>= 1e9'"):
        tune_heads(one_step(), tmp_path / "heads.json", objective="threshold: sharpness, objective:brightness >= 1e9")
    assert not (tmp_path / "heads.json").exists()


def test_means_are_taken_before_they_are_combined_and_what_says_nothing_is_refused():
    harmonic = HeadSelection.of("harmonic: one, two")
    assert harmonic.objectives == ("one", "two")
    assert harmonic.worth([[1.0, 30.0], [3.0, 10.0]]) == pytest.approx(2 / (1 / 2 + 1 / 20))
    published = HeadSelection.of("threshold: clip, pick >= 20, aesthetic >= 6")
    assert published.worth([[0.3, 19.0, 7.0], [0.1, 21.0, 5.0]]) == pytest.approx(0.2)
    assert published.worth([[0.9, 19.0, 7.0], [0.9, 20.9, 7.0]]) == -math.inf
    wrong = ("harmonic: one", "harmonic: one, two >= 3", "threshold: one >= 2, two >= 3", "threshold: one, two")
    for text in (*wrong, "threshold: one, two >= many", "harmonic: , one", "harmonic:"):
        with pytest.raises(ConfigError, match=rf"'harmonic: A, B'.*got '{text}'"):
            HeadSelection.of(text)
    with pytest.raises(ConfigError, match=r"got -1, 2 for one, two;"):
        HeadSelection.of("harmonic: one, two").worth([[-1.0, 2.0]])
