"""Tuning LiteAttention: the search, what it bounds, the file it writes, resuming, and bad input."""

import json
import math
from pathlib import Path

import dit_accel_eval
import dit_accel_eval.tune.base as base
import pytest
import torch
from dit_accel_eval.runs.loaded import tuning_request
from dit_accel_eval.tune.base import Runs
from dit_accel_eval.tune.lite import (
    Tuner,
    combine,
    error_of,
    threshold_of,
    tune_lite,
    tuning,
)
from dit_accel_pipelines.generation.generate import run
from dit_accel_pipelines.generation.loading import load_pipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from one_layer import OneLayer
from typer.testing import CliRunner

import dit_accel
from dit_accel import ConfigError, DeltaAttention, LiteAttention, RadialAttention, SparseD
from dit_accel.adapters.adapter import Adapter
from dit_accel.cli import installed_commands
from dit_accel.cli.app import app
from dit_accel.methods.attention.lite.thresholds import read_thresholds
from dit_accel.methods.base import Model
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.tiling import Tiling
from dit_accel.rules.threshold_search import CLOSE, HIGHEST, LOWEST, NEAR, search_level

PROMPTS = ("a red circle moving right", "a blue square moving up")
LITE = LiteAttention(block_size=16, dense_steps=0)


def request(*methods, prompts=PROMPTS[:1], **changes):
    values = dict(
        model="wan-plain", num_inference_steps=4, num_frames=9, height=32, width=32, guidance_scale=1.0, methods=methods
    )
    return tuning_request(prompts=prompts, **{**values, **changes})


# The search


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


def test_errors_are_relative_to_the_reference():
    reference, found = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])
    assert error_of(found, reference) == pytest.approx(1 / 7)
    assert error_of(reference, reference) == 0


def test_thresholds_of_levels():
    assert threshold_of("maxgap", -3.5) == -3.5
    assert threshold_of("maxgap", -math.inf) == -math.inf
    assert threshold_of("mass", -3.0) == 0.125
    assert 0 < threshold_of("mass", -math.inf) < 1e-11


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


def test_the_lowest_threshold_of_prompts_and_branches_is_written():
    def found(threshold: float, step: int, layer: int = 0) -> dict:
        return {"transformer": "transformer", "layer": layer, "step": step, "threshold": threshold}

    calls = [found(-3.0, 1), found(-5.0, 1), found(-2.0, 2), found(-4.0, 1), found(-2.5, 2), found(-1.0, 2, layer=1)]
    table = combine(calls, {"transformer": 2}, 4, "m", "maxgap", 0.01)
    none = -math.inf
    assert table.thresholds == {"transformer": ((none, -5.0, -2.5, none), (none, none, -1.0, none))}
    assert (table.model, table.num_inference_steps, table.target_error) == ("m", 4, 0.01)


# On the embedded model


@pytest.mark.slow
def test_a_run_with_the_file_is_the_run_that_was_tuned(tmp_path: Path):
    asked = request(LITE)
    tuned = tune_lite(asked, tmp_path / "lite.toml", target_error=0.05)
    assert read_thresholds(tuned.output).model == tuned.found["model"] == "wan-plain"
    assert [path.name for path in tmp_path.iterdir()] == ["lite.toml"]
    rows = tuned.found["steps"]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["added"] <= 0.05 for row in rows)
    assert rows[0]["dense"] < 1e-5
    assert rows[2]["dense"] > rows[1]["dense"] > 0
    pipe = load_pipeline(asked)
    dense = run(pipe, PROMPTS[0], asked)
    config = LiteAttention(block_size=16, dense_steps=0, thresholds_file=str(tuned.output))
    with dit_accel.attach(pipe, config) as attachment:
        made = run(pipe, PROMPTS[0], asked)
        densities = [step.density for step in attachment.report().steps]
    assert densities[0] == 1.0
    assert densities[1:] == pytest.approx([row["kept"] for row in rows], abs=0.01)
    assert densities[-1] < 0.95
    difference = torch.from_numpy(made.frames).double() - torch.from_numpy(dense.frames).double()
    psnr = 20 * math.log10(255 / float(difference.square().mean().sqrt()))
    assert tuned.found["prompts"][0]["psnr"] == pytest.approx(psnr, abs=1.0)


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch):
    asked = request(LITE, prompts=PROMPTS, num_inference_steps=3)
    whole = tune_lite(asked, tmp_path / "whole.toml", target_error=0.05)
    ran: list[str] = []

    def stopping(pipe, prompt, *args, **options):
        if prompt == PROMPTS[1] and PROMPTS[0] in ran:
            raise KeyboardInterrupt
        ran.append(prompt)
        return run(pipe, prompt, *args, **options)

    monkeypatch.setattr(base, "run", stopping)
    with pytest.raises(KeyboardInterrupt):
        tune_lite(asked, tmp_path / "lite.toml", target_error=0.05)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lite.toml.progress.json", "whole.toml"]
    ran.clear()
    monkeypatch.setattr(base, "run", lambda pipe, prompt, *a, **o: ran.append(prompt) or run(pipe, prompt, *a, **o))
    tuned = tune_lite(asked, tmp_path / "lite.toml", target_error=0.05)
    assert ran == [PROMPTS[1]] * 2
    assert read_thresholds(tuned.output) == read_thresholds(whole.output)
    assert tuned.found == whole.found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lite.toml", "whole.toml"]


def test_it_tunes_inside_another_methods_tiles(tmp_path: Path):
    radial = RadialAttention(block_size=16, decay_factor=0.2, near="half", dense_steps=0, dense_layers=0)
    asked = request(radial, LiteAttention(dense_steps=0), num_inference_steps=3)
    tuned = tune_lite(asked, tmp_path / "lite.toml", target_error=0.05)
    assert max(row["kept"] for row in tuned.found["steps"]) < 0.9


def test_who_works_with_lite_works_with_the_tuner(tmp_path):
    with tuning(Runs(request(LITE, DeltaAttention()), tmp_path / "a.toml", ".toml", None), 0.05) as (attachment, tuner):
        handlers = attachment.engine.handlers
        assert [handler.name for handler in handlers] == ["lite", "delta"]
        assert handlers[0] is tuner
        assert handlers[1].restorers == (tuner,)


# Bad input


@pytest.mark.parametrize(
    ("methods", "options", "text"),
    [
        ((LiteAttention(threshold=-5.0),), {}, r"tune lite.*got lite\.threshold = -5\.0"),
        ((LiteAttention(target_density=0.5),), {}, r"got lite\.target_density = 0\.5"),
        ((LiteAttention(criterion="budget"),), {}, r"lite\.criterion 'maxgap'.*'mass', got 'budget'"),
        ((LITE,), {"target_error": 0.0}, r"target_error.*0 and 1, got 0\.0"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, methods, options, text):
    with pytest.raises(ConfigError, match=text):
        tune_lite(request(*methods), tmp_path / "lite.toml", **options)
    assert not list(tmp_path.iterdir())


def test_a_file_that_can_not_be_written(tmp_path):
    for output in (tmp_path / "lite.json", tmp_path / "none" / "lite.toml"):
        with pytest.raises(ConfigError, match=r"output.*\.toml.*got"):
            tune_lite(request(LITE), output)
    (tmp_path / "lite.toml.progress.json").mkdir()
    with pytest.raises(ConfigError, match=r"progress file .*a folder"):
        tune_lite(request(LITE), tmp_path / "lite.toml")
    (tmp_path / "lite.toml").mkdir()
    with pytest.raises(ConfigError, match=r"output .*lite\.toml .*a folder"):
        tune_lite(request(LITE), tmp_path / "lite.toml")


def test_progress_of_another_run_or_none_at_all_is_refused(tmp_path):
    asked, progress = request(LITE), tmp_path / "lite.toml.progress.json"
    Runs(asked, tmp_path / "lite.toml", ".toml", None, target_error=0.05).add({"calls": []})
    with pytest.raises(ConfigError, match=r"progress.*target_error = 0\.05.*0\.01"):
        tune_lite(asked, tmp_path / "lite.toml")
    for text in ("{", '{"version": 9, "settings": {}, "prompts": []}', "[]", json.dumps({"version": 1})):
        progress.write_text(text)
        with pytest.raises(ConfigError, match=r"tuning progress.*release"):
            tune_lite(asked, tmp_path / "lite.toml")


@pytest.fixture
def cli(monkeypatch, tmp_path):
    """Invoke the application with this room's commands in a folder of its own."""
    monkeypatch.chdir(tmp_path)  # a refusal that is missing would write lite.toml where the tests run
    monkeypatch.setattr(installed_commands, "commands", lambda: dict(dit_accel_eval.COMMANDS))
    return lambda *arguments: CliRunner().invoke(app, ["tune", *arguments])


@pytest.mark.slow
def test_the_command_tunes_and_tells(tmp_path, cli):
    output = tmp_path / "lite.toml"
    sizes = ["--num-frames", "9", "--height", "32", "--width", "32", "--num-inference-steps", "3"]
    lite = ["--set", "lite.block_size=16", "--set", "lite.dense_steps=0", "--target-error", "0.05"]
    result = cli("lite", "--prompt", PROMPTS[0], *sizes, *lite, "-o", str(output))
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{output}\nstep  threshold  tiles kept  error added  error to dense\n")
    assert f"dB to the dense run: {PROMPTS[0]}" in result.stderr
    result = cli("lite", "--prompt", PROMPTS[0], *sizes, *lite, "-o", str(output), "--json")
    told = json.loads(result.stdout)
    assert (told["output"], told["criterion"], told["num_inference_steps"]) == (str(output), "maxgap", 3)
    assert [row["step"] for row in told["steps"]] == [0, 1]
    assert told["prompts"][0]["prompt"] == PROMPTS[0]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["radial"], "tune has no command 'radial'; known: heads, lite"),
        (["lite", "--prompt", "a", "--prompt-file", "b"], "tune takes --prompt or --prompt-file, got both"),
        (["lite", "--model", "wan-tny"], "'wan-tny' is no embedded model; did you mean 'wan-tiny'"),
        (["lite", "--model", "some/model"], "tune has no prompts of its own for some/model; give some with --prompt"),
        (["lite", "--prompt", "an ostrich"], "ostrich"),
        (["lite", "--set", "lite.threshold=-3"], "tune lite finds the thresholds itself, got lite.threshold = -3"),
        (["lite", "--dtype", "int4"], "there is no dtype 'int4'"),
    ],
)
def test_bad_commands_are_one_line_and_exit_code_2(cli, arguments, text, tmp_path):
    result = cli(*arguments)
    assert result.exit_code == 2
    assert text in " ".join(result.stderr.split())
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


SMALL = ["--num-frames", "9", "--height", "32", "--width", "32", "--prompt", PROMPTS[0]]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--num-inference-steps", "1"], 1),
        (["--num-inference-steps", "3", "--set", "lite.dense_steps=2"], 3),
        (["--num-inference-steps", "2", "--set", "lite.dense_layers=6"], 2),
        (["--num-inference-steps", "2", "--set", "lite.dense_above_sigma=0.0001"], 2),
    ],
)
def test_nothing_to_tune_is_an_error(cli, tmp_path, options, steps):
    result = cli("lite", *SMALL, *options)
    assert result.exit_code == 2
    assert f"tune lite has nothing to tune, got num_inference_steps = {steps}: " in result.stderr
    assert "ask for more steps, or fewer dense ones: --set lite.dense_steps=0" in result.stderr
    assert not list(tmp_path.iterdir())


def test_methods_are_switched_by_their_names():
    from dit_accel.cli.method_options import select_methods

    switched = select_methods(["delta", "sparsed", "lite"], None, [])
    assert [method.name for method in switched] == ["delta", "sparsed", "lite"]
    assert isinstance(switched[1], SparseD)
