"""Tuning StaticCache: what is measured, against the run written out; the file; placements; resuming; bad input."""

import json
import tomllib

import dit_accel_eval
import dit_accel_eval.tune.base as base
import numpy as np
import pytest
from dit_accel_eval.runs.loaded import tuning_request
from dit_accel_eval.tune.schedule import Placement, tune_schedule
from dit_accel_pipelines.generation.loading import load_pipeline
from dit_accel_pipelines.generation.request import resolve
from dit_accel_pipelines.generation.solvers import make_scheduler
from typer.testing import CliRunner

import dit_accel
from dit_accel import ConfigError, EasyCache, StaticCache
from dit_accel.cli import installed_commands
from dit_accel.cli.app import app
from dit_accel.cli.method_options import select_methods
from dit_accel.rules.schedule import SkipCosts, grown, searched

PROMPTS = ("a red circle moving right", "a blue square moving up")
STEPS = 7
SMALL = dict(model="wan-plain", num_inference_steps=STEPS, num_frames=5, height=16, width=16)


def request(*methods, prompts=PROMPTS, **changes):
    return tuning_request(prompts=prompts, methods=methods, **{**SMALL, **changes})


def run_of(prompt, *caches):
    """Return the noise levels of an untouched run, and what its solver gets and makes, as the scheduler's steps say."""
    asked = resolve(request(prompts=(prompt,)))[0]
    pipe, seen = load_pipeline(asked), []
    real = pipe.scheduler.step

    def step(model_output, timestep, sample, **options):
        sigma = float(pipe.scheduler.sigmas[pipe.scheduler.step_index or 0])
        made = real(model_output, timestep, sample, **options)
        seen.append((sigma, sample.numpy().copy(), model_output.numpy().copy(), made[0].numpy().copy()))
        return made

    pipe.scheduler.step = step
    with dit_accel.attach(pipe, *caches, preset="none"):
        base.run(pipe, prompt, asked)
    sigmas, x, v, made = (list(one) for one in zip(*seen, strict=True))
    return np.array([*sigmas, 0.0]), np.array([*x, made[-1]]).reshape(STEPS + 1, -1), np.array(v).reshape(STEPS, -1)


def test_the_lists_are_the_best_by_what_the_runs_show(tmp_path):
    found = tune_schedule(request(), tmp_path / "own.toml", computed=4).found
    products, weights = [], []
    skipping = StaticCache(steps=(1, 0, 1, 1, 1, 1, 1), predictor="taylor")
    for prompt in PROMPTS:
        (sigmas, x, v), (_, other, _) = run_of(prompt), run_of(prompt, skipping)
        r = (v - x[:-1]).astype(np.float64)
        products.append(r @ r.T / r.shape[1])
        weights.append(-np.diff(sigmas) * grown(np.sqrt(((x - other) ** 2).mean(1)), 1))
    times = [0, 1, 2, 3, 4, 5, 6, 6]
    costs = SkipCosts(products=np.array(products), weights=np.array(weights), times=times, predictor="taylor")
    expected = searched(costs, 4)
    (one,) = found["placements"]
    assert one["lists"] == {count: list(path) for count, (_, path) in expected.items()}
    assert one["error"] == pytest.approx({count: error for count, (error, _) in expected.items()}, rel=1e-3)
    assert (one["steps"], one["flow_shift"], one["psnr"]) == (STEPS, None, None)
    (config,) = select_methods([], tmp_path / "own.toml", [])
    assert config.predictor == "taylor"
    path = one["lists"][4]
    assert [step for step in range(STEPS) if config.always_computed(step, STEPS)] == path
    assert len(config.filled().skipped_steps(STEPS)) == STEPS - 4
    assert 1 < 20 - len(config.filled().skipped_steps(20)) <= 4  # another number of steps
    text = (tmp_path / "own.toml").read_text()
    assert text.startswith("# Searched by dit-accel tune schedule on wan-plain: 4 of 7 steps, 2 prompts.\n")
    assert tomllib.loads(text)["run"] == {"num_inference_steps": STEPS}
    assert [path.name for path in tmp_path.iterdir()] == ["own.toml"]


def test_placements_are_chosen_by_prompts_of_their_own(tmp_path):
    output = tmp_path / "own.toml"
    tuned = tune_schedule(
        request(StaticCache(predictor="hold", stored="output")), output, computed=3, placement=("4", "5@8")
    )
    first, second = tuned.found["placements"]
    assert {(one["steps"], one["flow_shift"]) for one in (first, second)} == {(4, None), (5, 8.0)}
    assert first["psnr"] > second["psnr"] > 0
    run = tomllib.loads(output.read_text())["run"]
    assert (run["num_inference_steps"], run["solver"]) == (first["steps"], "unipc")
    assert run.get("flow_shift") == first["flow_shift"]
    (config,) = select_methods([], output, [])
    assert (config.predictor, config.stored) == ("hold", "output")
    assert [row[:3] for row in tuned.rows] == [
        (str(one["steps"]), f"{one['flow_shift']:g}" if one["flow_shift"] else "own", "3") for one in (first, second)
    ]
    pipe = load_pipeline(resolve(request())[0])
    shipped, made = pipe.scheduler, []
    for steps, shift, caches in ((first["steps"], first["flow_shift"], [config]), (20, None, [])):
        pipe.scheduler = make_scheduler(shipped, "unipc", shift)
        with dit_accel.attach(pipe, *caches, preset="none"):
            made.append(base.run(pipe, PROMPTS[1], resolve(request(num_inference_steps=steps))[0]).frames / 255.0)
    assert first["psnr"] == pytest.approx(-10 * np.log10(((made[0] - made[1]) ** 2).mean()), abs=1e-3)


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    output, ran, options = tmp_path / "own.toml", [], dict(computed=3, placement=("4", "5"))
    whole = tune_schedule(request(), tmp_path / "whole.toml", **options)
    real = base.run

    def stopped(pipe, prompt, *arguments, **given):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(prompt)
        return real(pipe, prompt, *arguments, **given)

    monkeypatch.setattr(base, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        tune_schedule(request(), output, **options)
    with pytest.raises(ConfigError, match=r"progress.*computed = 3.*2"):
        tune_schedule(request(), output, **{**options, "computed": 2})
    assert not output.exists()
    monkeypatch.setattr(base, "run", lambda *given, **named: ran.append("") or real(*given, **named))
    assert tune_schedule(request(), output, **options).found == whole.found
    assert ran[3:] == [""] * 5  # the second placement's two anew, and the three that choose
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.toml", "whole.toml"]


@pytest.mark.parametrize(
    ("methods", "options", "text"),
    [
        ((), dict(computed=1), r"^tune schedule.*2 to.*7 steps.*computed = 1"),
        ((), dict(computed=8), r"^tune schedule.*2 to.*7 steps.*computed = 8"),
        ((), dict(placement=("9@8", "5")), r"9 steps.*computed = 12"),
        ((), dict(placement=("many",)), r"placement.*30@8.*'many'"),
        ((), dict(placement=("9@-1",)), r"placement.*30@8.*'9@-1'"),
        ((StaticCache(every=2),), {}, r"staticcache\.every = 2"),
        ((StaticCache(branches="uncond"),), {}, r"staticcache\.branches = 'uncond'"),
        ((EasyCache(),), dict(computed=3), r"EasyCache.*StaticCache.*one cache|StaticCache.*EasyCache.*one cache"),
    ],
)
def test_what_can_not_be_searched_is_refused(methods, options, text, tmp_path):
    with pytest.raises(ConfigError, match=text):
        tune_schedule(request(*methods), tmp_path / "own.toml", **options)
    assert not (tmp_path / "own.toml").exists()


def test_one_prompt_can_not_choose(tmp_path):
    with pytest.raises(ConfigError, match=r"2 prompts.*got 1"):
        tune_schedule(request(prompts=PROMPTS[:1]), tmp_path / "own.toml", computed=2, placement=("4", "5"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda pipe: setattr(pipe, "scheduler", _of_betas()), r"wan-plain.*DDIMScheduler.*staticcache\.compute_at"),
        (lambda pipe: setattr(pipe.scheduler, "sigmas", None), None),
    ],
)
def test_a_scheduler_that_tells_no_noise_levels(change, text, tmp_path, monkeypatch):
    if text is None:
        monkeypatch.setattr("dit_accel_pipelines.generation.traced.noise_level", lambda scheduler: None)
        text = r"scheduler.*noise levels.*--placement"
        change = lambda pipe: None  # noqa: E731
    real = base.load_pipeline

    def loaded(asked):
        pipe = real(asked)
        change(pipe)
        return pipe

    monkeypatch.setattr(base, "load_pipeline", loaded)
    with pytest.raises(ConfigError, match=text):
        tune_schedule(request(), tmp_path / "own.toml", computed=3)


def _of_betas():
    from diffusers import DDIMScheduler

    return DDIMScheduler()


def test_an_output_that_can_not_be_written(tmp_path):
    for output in (tmp_path / "own.json", tmp_path / "none" / "own.toml"):
        with pytest.raises(ConfigError, match=r"output.*\.toml.*got"):
            tune_schedule(request(), output, computed=3)


def test_a_placement_is_read():
    assert Placement.read("30@8") == Placement(30, 8.0, "30@8")
    assert Placement.read("24") == Placement(24, None, "24")


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(installed_commands, "commands", lambda: dict(dit_accel_eval.COMMANDS))
    small = ["--model", "wan-plain", "--num-frames", "5", "--height", "16", "--width", "16", "--prompt", PROMPTS[0]]
    usual = ["tune", "schedule", *small, "--num-inference-steps", "5", "--computed", "3"]
    result = CliRunner().invoke(app, [*usual, "--staticcache", "--set", "staticcache.predictor=hold"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("schedule.toml\n")
    assert [line.split()[:3] for line in result.stdout.splitlines() if line.lstrip().startswith("5")] == [
        ["5", "own", "2"], ["5", "own", "3"],
    ]  # fmt: skip
    assert tomllib.loads((tmp_path / "schedule.toml").read_text())["staticcache"]["predictor"] == "hold"
    result = CliRunner().invoke(app, [*usual, "--json"])
    assert json.loads(result.stdout)["computed"] == 3
    result = CliRunner().invoke(app, [*usual[:-1], "9"])
    assert result.exit_code == 2
    assert "computed = 9" in result.stderr
