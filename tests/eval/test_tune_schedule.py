"""`tune schedule`: costs of gaps and lists against all of them; `tune period`: curves whose make is known."""

import itertools
import json
import tomllib

import dit_accel_eval.tune.base as base
import numpy as np
import pytest
import torch
from cache_calls import Driven, run_through, still
from diffusers import DDIMScheduler
from dit_accel_eval.runs.loaded import tuning_request
from dit_accel_eval.tune.period import harmonics, logits_of, spectrum, tune_period
from dit_accel_eval.tune.schedule import Placement, SkipCosts, best_lists, grown, searched, tune_schedule
from dit_accel_pipelines.generation.request import resolve
from dit_accel_pipelines.generation.solvers import make_scheduler
from hypothesis import given
from hypothesis import strategies as st
from one_layer import context_of, random_call
from tuning import PROMPTS, loaded, one_pipeline
from tuning import request as request_of
from typer.testing import CliRunner

import dit_accel
from dit_accel import ConfigError, EasyCache, RadialAttention, StaticCache, UltraViCo
from dit_accel.attachment.layers import PlannedCall
from dit_accel.cli.app import app
from dit_accel.cli.method_options import select_methods
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan
from dit_accel.rules.rotary_frequencies import frequencies

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
        base.run(pipe, asked)
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


@pytest.mark.slow
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
            made.append(
                base.run(pipe, resolve(request(prompts=PROMPTS[1:], num_inference_steps=steps))[0]).frames / 255.0
            )
    assert first["psnr"] == pytest.approx(-10 * np.log10(((made[0] - made[1]) ** 2).mean()), abs=1e-3)


def test_what_can_not_be_searched_is_refused(tmp_path, pipe, monkeypatch):
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
    assert Placement.read("30@8") == Placement(30, 8.0, "30@8")
    assert Placement.read("24") == Placement(24, None, "24")
    monkeypatch.setattr("dit_accel_eval.tune.schedule.noise_level", lambda scheduler: None)
    with pytest.raises(ConfigError, match=r"scheduler.*noise levels.*--placement"):
        tune_schedule(request(), tmp_path / "own.toml", computed=3)
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ConfigError, match=r"wan-plain.*DDIMScheduler.*staticcache\.compute_at"):
        tune_schedule(request(), tmp_path / "own.toml", computed=3)
    assert not (tmp_path / "own.toml").exists()


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


LAYOUT = TokenLayout(frames=6, height=2, width=3, text_before=2, text_after=1)
SMALL = dict(height=32, width=32, num_inference_steps=1)


def test_logits_are_means_by_frames():
    torch.manual_seed(0)
    call = random_call(LAYOUT)
    logits = logits_of(PlannedCall(plan=AttentionPlan(), context=context_of(LAYOUT), call=call, out=call.v))
    q, k = (x[:, :, 2:38].reshape(2, 2, 6, 6, 8) for x in (call.q, call.k))
    expected = torch.stack([(q[:, :, f] * k[:, :, g]).sum(-1).mean() for f in range(6) for g in range(6)]) * 8**-0.5
    torch.testing.assert_close(logits.flatten(), expected.double(), atol=1e-5, rtol=1e-5)


def test_it_writes_and_prints(tmp_path):
    out = tmp_path / "wan.toml"
    flags = ["--height", "32", "--width", "32", "--num-inference-steps", "1", "-o", str(out)]
    result = CliRunner().invoke(
        app, ["tune", "period", "--model", "wan-plain", "--prompt", "a red circle", *flags, "--json"]
    )
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["frames"] == 34  # twice the trained length
    assert len(found["found"]["periods"]) == 6
    assert sum(found["found"]["amplitudes"]) == pytest.approx(1)
    assert [path.name for path in tmp_path.iterdir()] == ["wan.toml"]
    assert len(found["curve"]) == 34
    table = tomllib.loads(out.read_text())["ultravico"]
    assert table["trained_frames"] == 17
    assert ("period" in table) == (found["found"]["share"] > 0.5)
    UltraViCo(**{name: value for name, value in table.items() if name != "name"})
    assert "attention" in out.read_text().splitlines()[1]


def test_what_can_not_be_measured_is_refused(tmp_path):
    for options, message in (
        (dict(methods=(RadialAttention(),)), "tune period.*got --radial"),
        (dict(model="flux-tiny"), r"rotary positions.*flux"),
    ):
        with pytest.raises(ConfigError, match=message):
            tune_period(tuning_request(prompts=("a red circle",), **SMALL, **options), tmp_path / "a.toml")


HUNYUAN, COGVIDEOX, WAN = ((16, 256.0), 33), ((16, 1e4), 13), ((44, 1e4), 21)


def curve_of(own, amplitudes, frames):
    return 0.3 + np.cos(np.outer(np.arange(frames), own)) @ amplitudes


def test_families_of_the_published_models():
    assert harmonics(frequencies(*HUNYUAN[0]), 3) == (0, 1, 2, 3)  # 50.3 and its halves
    assert harmonics(frequencies(*COGVIDEOX[0]), 1) == (0, 1)  # 3.16 counts as 3
    assert harmonics(frequencies(*WAN[0]), 3) == (3,)  # 22.1 alone
    assert harmonics(np.array([0.1, 1.05, 2.15, 2.51]), 0) == (0, 3)  # 10.5 and 21.5 are out of step
    assert harmonics(np.array([0.1, 0.316, 0.95]), 0) == (0, 1)


def test_a_harmonic_model_repeats_and_an_inharmonic_one_does_not():
    own = frequencies(*HUNYUAN[0])
    found = spectrum(curve_of(own, np.array([0.2, 0.2, 0.3, 0.5, 0.1, 0.1, 0.0, 0.0]), 100), own)
    assert (found.period, found.gamma) == (pytest.approx(50.27, abs=0.01), 4.0)
    assert found.share > 0.75
    cog = frequencies(*COGVIDEOX[0])
    found = spectrum(curve_of(cog, np.array([0.3, 0.5, 0.1, 0.1, 0, 0, 0, 0]), 52), cog)
    assert (found.period, found.gamma) == (pytest.approx(19.87, abs=0.01), 1.0)
    wan = frequencies(*WAN[0])
    found = spectrum(curve_of(wan, np.array([0.3, 0.25, 0.25, 0.32, 0.2] + [0.0] * 17), 63), wan)
    assert found.period is None
    assert found.gamma is None


@given(
    amplitudes=st.lists(st.floats(0.05, 1), min_size=4, max_size=4), constant=st.floats(-5, 5),
    frames=st.integers(60, 120),
)  # fmt: skip
def test_the_fit_finds_what_a_curve_is_made_of(amplitudes, constant, frames):
    own = frequencies(16, 256.0)[:4]
    found = spectrum(constant + curve_of(own, np.array(amplitudes), frames), own)
    assert np.array(found.amplitudes) == pytest.approx(np.array(amplitudes) / sum(amplitudes), abs=1e-3)
    assert found.error < 1e-2
    assert sum(found.amplitudes) == pytest.approx(1)


def test_what_is_too_slow_to_be_told_from_a_constant_is_no_part():
    """Amplitudes such as those of wan-tiny: of 18 frames seven of its twelve frequencies see less than a quarter."""
    own = frequencies(24, 1e4)
    amplitudes = np.array([0.56, 1.05, 0.08, 0.08, 0.05, 0.03, 0.02, 0.06, 0.03, 0.03, 0.02, 0.07])
    found = spectrum(curve_of(own, amplitudes, 18), own)
    assert (found.period, found.gamma) == (pytest.approx(13.54, abs=0.01), 1.0)
    assert found.amplitudes[5:] == (0.0,) * 7


def test_the_error_is_what_the_fit_leaves_and_a_constant_curve_has_no_period():
    found = spectrum(np.full(30, 0.7), frequencies(16, 256.0))
    assert found.period is None
    assert set(found.amplitudes) == {0.0}
    own = frequencies(16, 256.0)[:2]
    noise = np.random.default_rng(0).normal(size=200)
    found = spectrum(curve_of(own, np.array([0.0, 0.0]), 200) + noise, own)
    assert 0.9 < found.error <= 1
    assert spectrum(curve_of(own, np.array([0.5, 0.5]), 200), own).error < 1e-6
