"""Searched schedules: costs of gaps against the engine's forecasts, lists against all of them, the file, bad input."""

import itertools
import tomllib

import dit_accel_eval.tune.base as base
import numpy as np
import pytest
import torch
from cache_calls import Driven, run_through, still
from diffusers import DDIMScheduler
from dit_accel_eval.tune.schedule import Placement, tune_schedule
from dit_accel_eval.tune.skip_costs import SkipCosts, best_lists, grown, searched
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


LENGTH = 9
PREDICTORS = [("hold", 1), ("taylor", 1), ("taylor", 2), ("heun", 1), ("chebyshev", 1)]
LISTS = [(0,), (0, 3), (0, 1, 4, 5), (0, 2, 3, 6), (0, 2, 4, 7)]


def made_up(seed, prompts=2, size=6):
    """Return what a made-up run stores, [P, N, size], and the products of its steps."""
    stored = np.random.default_rng(seed).normal(size=(prompts, LENGTH, size)).cumsum(1)
    return stored, np.einsum("pid,pjd->pij", stored, stored) / size


def costs_of(products, predictor="taylor", order=1, weights=None):
    times = [float(step) for step in range(LENGTH)] + [LENGTH - 1.0]
    weights = np.ones(LENGTH) if weights is None else weights
    weights = np.broadcast_to(weights, (len(products), LENGTH))
    return SkipCosts(products=products, weights=weights, times=times, predictor=predictor, order=order)


def gaps(path):
    return zip([path[: i + 1] for i in range(len(path))], [*path[1:], LENGTH], strict=True)


def test_forecasts_are_the_engines():
    stored, products = made_up(0, prompts=1)
    values = torch.tensor(stored[0])
    for predictor, order in PREDICTORS:
        costs = costs_of(products, predictor, order)
        for path in LISTS:
            steps = tuple(int(step in path) for step in range(LENGTH))
            listed = StaticCache(steps=steps, predictor=predictor, order=order, stored="output")
            driven = Driven(listed, lambda step, branch: (values[step].reshape(1, 2, 3),))
            outputs = [out["cond"].reshape(-1).numpy() for out in run_through(driven, still, steps=LENGTH)]
            for so_far, upto in gaps(path):
                expected = np.array(outputs[so_far[-1] + 1 : upto]).reshape(-1, stored.shape[2])
                np.testing.assert_allclose(costs.forecasts(so_far, upto) @ stored[0], expected, rtol=1e-6, atol=1e-9)


def test_a_gap_costs_the_square_of_its_summed_weighted_errors():
    for predictor, order in PREDICTORS:
        stored, products = made_up(1)
        weights = np.random.default_rng(2).uniform(0.1, 1, (2, LENGTH))
        costs = costs_of(products, predictor, order, weights)
        for path in LISTS:
            for so_far, upto in gaps(path):
                skipped = slice(so_far[-1] + 1, upto)
                off = costs.forecasts(so_far, upto) @ stored - stored[:, skipped]
                moved = (weights[:, skipped, None] * off).sum(1)
                assert costs(so_far, upto) == pytest.approx((moved**2).mean(), abs=1e-12)
            assert costs.of_list(path).mean() == pytest.approx(total(costs, path))


def total(costs, path):
    return sum(costs(so_far, upto) for so_far, upto in gaps(path))


def test_the_best_list_of_each_length_is_the_best_of_all():
    for predictor in ("hold", "taylor"):
        costs = costs_of(made_up(2)[1], predictor, 1, np.linspace(2, 1, LENGTH))
        found = best_lists(costs, LENGTH, LENGTH)
        assert [*found] == [*range(1, LENGTH + 1)]
        for count, (cost, path) in found.items():
            every = [(0, *rest) for rest in itertools.combinations(range(1, LENGTH), count - 1)]
            best = min(total(costs, one) for one in every)
            assert cost == pytest.approx(best, abs=1e-12)
            assert total(costs, path) == pytest.approx(best, abs=1e-12)
            assert (len(path), path[0]) == (count, 0)
        assert found[LENGTH] == (0.0, tuple(range(LENGTH)))


def test_hard_prompts_count_no_more_than_easy_ones():
    products, weights = made_up(5, prompts=3)[1], np.random.default_rng(6).uniform(0.1, 1, (3, LENGTH))
    costs = costs_of(products, weights=weights)
    found, harder = searched(costs, 4), products * np.array([1.0, 1e4, 1.0])[:, None, None]
    others = searched(costs_of(harder, weights=weights), 4)
    assert [path for _, path in others.values()] == [path for _, path in found.values()]
    every = [(0, *rest) for rest in itertools.combinations(range(1, LENGTH), 3)]
    errors = {path: np.log(costs.of_list(path)).mean() / 2 for path in every}
    assert np.log(found[4][0]) == pytest.approx(errors[found[4][1]])
    assert errors[found[4][1]] <= sorted(errors.values())[2]


def test_growth_is_that_of_the_two_runs_from_where_they_have_settled():
    moved = [0, 0, 9, 5, 2, 2, 4, 8]  # step 1 was skipped
    np.testing.assert_allclose(grown(moved, 1), [4, 4, 4, 4, 4, 2, 1])
    np.testing.assert_allclose(grown([0.0] * 5, 1), np.ones(4))
