"""Tuning StaticCache: what is measured, against the run written out; the file; placements; bad input."""

import tomllib

import dit_accel_eval.tune.base as base
import numpy as np
import pytest
from diffusers import DDIMScheduler
from dit_accel_eval.tune.schedule import Placement, tune_schedule
from dit_accel_eval.tune.skip_costs import SkipCosts, grown, searched
from dit_accel_pipelines.generation.request import resolve
from dit_accel_pipelines.generation.solvers import make_scheduler
from tuning import PROMPTS, loaded, one_pipeline
from tuning import request as request_of

import dit_accel
from dit_accel import ConfigError, EasyCache, StaticCache
from dit_accel.cli.method_options import select_methods

STEPS = 7
pipe = pytest.fixture(one_pipeline, autouse=True)


def request(*methods, **changes):
    return request_of(*methods, **{"num_inference_steps": STEPS, **changes})


def run_of(prompt, *caches):
    """Return the noise levels of an untouched run, and what its solver gets and makes, as the scheduler's steps say."""
    asked = resolve(request(prompts=(prompt,)))[0]
    pipe, seen = loaded("wan-plain"), []
    real = pipe.scheduler.step

    def step(model_output, timestep, sample, **options):
        sigma = float(pipe.scheduler.sigmas[pipe.scheduler.step_index or 0])
        made = real(model_output, timestep, sample, **options)
        seen.append((sigma, sample.numpy().copy(), model_output.numpy().copy(), made[0].numpy().copy()))
        return made

    pipe.scheduler.step = step
    with dit_accel.attach(pipe, *caches, preset="none"):
        base.run(pipe, prompt, asked)
    del pipe.scheduler.step
    sigmas, x, v, made = (list(one) for one in zip(*seen, strict=True))
    return np.array([*sigmas, 0.0]), np.array([*x, made[-1]]).reshape(STEPS + 1, -1), np.array(v).reshape(STEPS, -1)


def test_the_lists_are_the_best_by_what_the_runs_show(tmp_path):
    tuned = tune_schedule(request(), tmp_path / "own.toml", computed=4)
    found = tuned.found
    assert [row[:3] for row in tuned.rows] == [(str(STEPS), "own", str(count)) for count in (2, 3, 4)]
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


def test_placements_are_chosen_by_prompts_of_their_own(tmp_path, pipe):
    output, settled_scheduler = tmp_path / "own.toml", pipe.scheduler
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
    shipped, made = settled_scheduler, []
    for steps, shift, caches in ((first["steps"], first["flow_shift"], [config]), (20, None, [])):
        pipe.scheduler = make_scheduler(shipped, "unipc", shift)
        with dit_accel.attach(pipe, *caches, preset="none"):
            made.append(base.run(pipe, PROMPTS[1], resolve(request(num_inference_steps=steps))[0]).frames / 255.0)
    assert first["psnr"] == pytest.approx(-10 * np.log10(((made[0] - made[1]) ** 2).mean()), abs=1e-3)


def test_what_can_not_be_searched_is_refused(tmp_path):
    for methods, options, text in (
        ((), dict(computed=1), r"^tune schedule.*2 to.*7 steps.*computed = 1"),
        ((), dict(computed=8), r"^tune schedule.*2 to.*7 steps.*computed = 8"),
        ((), dict(placement=("9@8", "5")), r"9 steps.*computed = 12"),
        ((), dict(placement=("many",)), r"placement.*30@8.*'many'"),
        ((), dict(placement=("9@-1",)), r"placement.*30@8.*'9@-1'"),
        ((StaticCache(every=2),), {}, r"staticcache\.every = 2"),
        ((StaticCache(branches="uncond"),), {}, r"staticcache\.branches = 'uncond'"),
        ((EasyCache(),), dict(computed=3), r"EasyCache.*StaticCache.*one cache|StaticCache.*EasyCache.*one cache"),
    ):
        with pytest.raises(ConfigError, match=text):
            tune_schedule(request(*methods), tmp_path / "own.toml", **options)
    with pytest.raises(ConfigError, match=r"2 prompts.*got 1"):
        tune_schedule(request(prompts=PROMPTS[:1]), tmp_path / "own.toml", computed=2, placement=("4", "5"))
    assert not (tmp_path / "own.toml").exists()
    assert Placement.read("30@8") == Placement(30, 8.0, "30@8")
    assert Placement.read("24") == Placement(24, None, "24")


def test_a_scheduler_that_tells_no_noise_levels_is_refused(tmp_path, pipe, monkeypatch):
    monkeypatch.setattr("dit_accel_pipelines.generation.traced.noise_level", lambda scheduler: None)
    with pytest.raises(ConfigError, match=r"scheduler.*noise levels.*--placement"):
        tune_schedule(request(), tmp_path / "own.toml", computed=3)
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ConfigError, match=r"wan-plain.*DDIMScheduler.*staticcache\.compute_at"):
        tune_schedule(request(), tmp_path / "own.toml", computed=3)
