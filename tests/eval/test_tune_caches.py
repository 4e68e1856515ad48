"""Tuning MagCache and TeaCache: what is measured, against it written out; the files; resuming; bad input."""

import itertools
import json

import dit_accel_eval
import dit_accel_eval.tune.base as base
import numpy as np
import pytest
from dit_accel_eval.runs.loaded import embedded_prompts, tuning_request
from dit_accel_eval.tune.caches import tune_magcache, tune_teacache
from dit_accel_pipelines.families.step_caches import MAGCACHE, TEACACHE
from dit_accel_pipelines.generation.loading import load_pipeline
from dit_accel_pipelines.generation.request import resolve
from some_cases import some
from typer.testing import CliRunner

from dit_accel import ConfigError, LiteAttention, MagCache, TeaCache
from dit_accel.cli import installed_commands
from dit_accel.cli.app import app
from dit_accel.cli.method_options import select_methods

PROMPTS = ("a red circle moving right", "a blue square moving up")
STEPS = 7
TUNERS = {"magcache": tune_magcache, "teacache": tune_teacache}


def request(*methods, prompts=PROMPTS, **changes):
    values = dict(model="wan-plain", num_inference_steps=STEPS, num_frames=9, height=32, width=32, methods=methods)
    return tuning_request(prompts=prompts, **{**values, **changes})


def forwards(prompt, **changes):
    """Return what goes in and comes out of the conditional forwards of an untouched run, and the signals."""
    asked = resolve(request(prompts=(prompt,), **changes))[0]
    pipe, seen = load_pipeline(asked), []

    def note(module, args, kwargs, output):
        time = module.condition_embedder.time_embedder(module.condition_embedder.timesteps_proj(kwargs["timestep"]))
        seen.append((kwargs["hidden_states"].numpy().copy(), output[0].numpy().copy(), time.detach().numpy()))

    pipe.transformer.register_forward_hook(note, with_kwargs=True)
    base.run(pipe, prompt, asked)
    return seen[::2]


def size(array):
    return float(np.abs(array).mean())


@pytest.fixture(scope="module")
def untouched():
    return [forwards(prompt) for prompt in PROMPTS]


def test_ratios_are_those_of_what_is_stored(tmp_path, untouched):
    found = tune_magcache(request(), tmp_path / "mag.toml").found
    sizes = np.array([[size(v - x) for x, v, _ in run] for run in untouched])
    ratios = sizes[:, 1:] / sizes[:, :-1]
    assert found["ratios"] == pytest.approx([1, *np.sqrt(ratios[0] * ratios[1])], abs=2e-5)
    assert found["spread"] == pytest.approx([1, *(ratios.max(0) / ratios.min(0))], abs=2e-5)
    (config,) = select_methods([], tmp_path / "mag.toml", [])
    assert config == MagCache(ratios=found["ratios"], measured_on="wan-plain")
    assert (
        (tmp_path / "mag.toml")
        .read_text()
        .startswith(f"# Measured by dit-accel tune magcache on wan-plain: {STEPS} steps, 2 prompts.\n")
    )
    assert [path.name for path in tmp_path.iterdir()] == ["mag.toml"]


def test_the_output_may_be_what_is_stored(tmp_path, untouched):
    found = tune_magcache(request(MagCache(stored="output", threshold=0.3)), tmp_path / "mag.toml").found
    sizes = np.array([[size(v) for _, v, _ in run] for run in untouched])
    assert found["ratios"][1:] == pytest.approx(np.sqrt(np.prod(sizes[:, 1:] / sizes[:, :-1], 0)), abs=2e-5)
    (config,) = select_methods([], tmp_path / "mag.toml", [])
    assert (config.stored, config.threshold) == ("output", 0.3)


def test_the_polynomial_fits_what_holding_is_off_by(tmp_path, untouched):
    found = tune_teacache(request(), tmp_path / "tea.toml").found
    pairs = [(one, two) for run in untouched for one, two in itertools.pairwise(run)]
    signal = [size(two[2] - one[2]) / size(one[2]) for one, two in pairs]
    off = [size((two[1] - two[0]) - (one[1] - one[0])) / size(one[1]) for one, two in pairs]
    (fit,) = found["fits"]
    assert (fit["transformer"], fit["points"]) == ("transformer", 2 * (STEPS - 1))
    assert (fit["lowest"], fit["highest"]) == pytest.approx((min(signal), max(signal)), rel=1e-4)
    assert np.polyval(fit["polynomial"], signal) == pytest.approx(
        np.polyval(np.polyfit(signal, off, 4), signal), rel=1e-3
    )
    assert 0 < fit["off"] <= fit["spread"]
    (config,) = select_methods([], tmp_path / "tea.toml", [])
    assert config == TeaCache(polynomial=fit["polynomial"], measured_on="wan-plain")


@pytest.mark.parametrize("name", some(TUNERS, "magcache"))
def test_a_run_that_was_stopped_goes_on(name, tmp_path, monkeypatch):
    tune, output, ran = TUNERS[name], tmp_path / "own.toml", []
    whole = tune(request(), tmp_path / "whole.toml")
    real = base.run

    def stopped(pipe, prompt, *arguments, **options):
        if len(ran) == 1:
            raise KeyboardInterrupt
        ran.append(prompt)
        return real(pipe, prompt, *arguments, **options)

    monkeypatch.setattr(base, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        tune(request(), output)
    with pytest.raises(ConfigError, match=r"progress.*seed = 0.*1"):
        tune(request(seed=1), output)
    assert not output.exists()
    ran.insert(0, "")
    monkeypatch.setattr(
        base,
        "run",
        lambda pipe, prompt, *rest, **options: ran.append(prompt) or real(pipe, prompt, *rest, **options),
    )
    assert tune(request(), output).to_dict() == {**whole.to_dict(), "output": str(output)}
    assert ran == ["", *PROMPTS]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.toml", "whole.toml"]


@pytest.mark.parametrize(
    ("name", "methods", "text"),
    [
        (
            "magcache", (MagCache(ratios=(1.0, 0.9)),),
            r"^tune magcache.*got magcache\.ratios = \(1\.0, 0\.9\)",
        ),
        (
            "teacache", (TeaCache(family="mochi-1"),),
            r"^tune teacache.*got teacache\.family = 'mochi-1'",
        ),
    ],
)  # fmt: skip
def test_numbers_that_are_given_are_refused(name, methods, text, tmp_path):
    with pytest.raises(ConfigError, match=text):
        TUNERS[name](request(*methods), tmp_path / "own.toml")


@pytest.mark.parametrize("name", TUNERS)
def test_an_output_that_can_not_be_written(name, tmp_path):
    for output in (tmp_path / "own.json", tmp_path / "none" / "own.toml"):
        with pytest.raises(ConfigError, match=r"output.*\.toml.*got"):
            TUNERS[name](request(), output)
    (tmp_path / "own.toml").mkdir()
    with pytest.raises(ConfigError, match=r"own\.toml .*a folder"):
        TUNERS[name](request(), tmp_path / "own.toml")


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        (1, r"^tune teacache.*steps.*got 1"),
        (5, r"^tune teacache.*5 coefficients.*4 changes.*transformer"),
    ],
)
def test_too_few_steps_for_a_polynomial(steps, text, tmp_path):
    with pytest.raises(ConfigError, match=text):
        tune_teacache(request(num_inference_steps=steps, prompts=PROMPTS[:1]), tmp_path / "own.toml")


def test_another_method_may_be_attached(tmp_path):
    lite = LiteAttention(block_size=16, dense_steps=0, threshold=-1.0)
    alone = tune_magcache(request(prompts=PROMPTS[:1]), tmp_path / "alone.toml").found
    beside = tune_magcache(request(lite, prompts=PROMPTS[:1]), tmp_path / "beside.toml").found
    assert beside["ratios"] != alone["ratios"]
    assert beside["ratios"] == pytest.approx(alone["ratios"], rel=0.1)


@pytest.fixture
def cli(monkeypatch, tmp_path):
    """Invoke the application with this room's commands in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(installed_commands, "commands", lambda: dict(dit_accel_eval.COMMANDS))
    return lambda *arguments: CliRunner().invoke(app, ["tune", *arguments])


@pytest.mark.parametrize("name", TUNERS)
def test_the_command(name, cli, tmp_path):
    small = (
        "--model",
        "wan-plain",
        "--prompt",
        PROMPTS[0],
        "--num-inference-steps",
        "6",
        "--height",
        "32",
        "--width",
        "32",
        "--num-frames",
        "9",
    )
    result = cli(name, *small)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{name}.toml\n")
    assert {"magcache": "largest over smallest", "teacache": "off by"}[name] in result.stdout
    assert (tmp_path / f"{name}.toml").exists()
    result = cli(name, *small, "--json", "-o", "own.toml")
    assert json.loads(result.stdout)["model"] == "wan-plain"
    result = cli(name, "--target-error", "0.1")
    assert result.exit_code == 2
    assert "No such option: --target-error" in result.stderr


def test_prompts_of_its_own_are_none_that_suites_evaluate():
    prompts = embedded_prompts("wan-plain", 4)
    assert len({*prompts}) == 4
    from dit_accel_assets import held_out_prompts

    assert list(prompts) == held_out_prompts("wan-plain", 68)[64:]


@pytest.mark.slow
@pytest.mark.rare
def test_the_committed_numbers_of_the_embedded_model_are_what_the_commands_measure(tmp_path):
    asked = tuning_request(model="wan-plain", prompts=embedded_prompts("wan-plain", 4))
    ratios = tune_magcache(asked, tmp_path / "mag.toml").found["ratios"]
    assert ratios == pytest.approx(MAGCACHE["wan-plain"]["ratios"], abs=1e-4)
    (fit,) = tune_teacache(asked, tmp_path / "tea.toml").found["fits"]
    changes = np.linspace(fit["lowest"], fit["highest"], 20)
    committed = np.polyval(TEACACHE["wan-plain"]["polynomial"], changes)
    assert np.polyval(fit["polynomial"], changes) == pytest.approx(committed, abs=1e-3)
