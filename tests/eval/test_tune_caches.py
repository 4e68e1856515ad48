"""Tuning MagCache and TeaCache: what is measured, against it written out; the files; bad input."""

import itertools

import numpy as np
import pytest
from dit_accel_eval.runs.loaded import embedded_prompts, tuning_request
from dit_accel_eval.tune.caches import tune_magcache, tune_teacache
from dit_accel_pipelines.families.step_caches import MAGCACHE, TEACACHE
from tuning import PROMPTS, conditional_forwards, loaded, one_pipeline, request

from dit_accel import ConfigError, LiteAttention, MagCache, TeaCache
from dit_accel.cli.method_options import select_methods

STEPS = 7
TUNERS = {"magcache": tune_magcache, "teacache": tune_teacache}
pipe = pytest.fixture(one_pipeline, autouse=True)


def asked(*methods, **changes):
    return request(*methods, **{"num_inference_steps": STEPS, **changes})


@pytest.fixture(scope="module")
def untouched():
    """What goes in and comes out of the conditional forwards of untouched runs, and the signals."""
    embedder, every = loaded("wan-plain").transformer.condition_embedder, []
    for prompt in PROMPTS:
        seen = conditional_forwards(asked(prompts=(prompt,)))
        for one in seen:
            one["time"] = embedder.time_embedder(embedder.timesteps_proj(one["kwargs"]["timestep"])).detach()
        every.append([tuple(one[name].numpy() for name in ("x", "v", "time")) for one in seen])
    return every


def size(array):
    return float(np.abs(array).mean())


@pytest.mark.parametrize("stored", ["residual", "output"])
def test_ratios_are_those_of_what_is_stored(tmp_path, untouched, stored):
    found = tune_magcache(asked(MagCache(stored=stored, threshold=0.3)), tmp_path / "mag.toml").found
    sizes = np.array([[size(v - x if stored == "residual" else v) for x, v, _ in run] for run in untouched])
    ratios = sizes[:, 1:] / sizes[:, :-1]
    assert found["ratios"] == pytest.approx([1, *np.sqrt(ratios[0] * ratios[1])], abs=2e-5)
    assert found["spread"] == pytest.approx([1, *(ratios.max(0) / ratios.min(0))], abs=2e-5)
    (config,) = select_methods([], tmp_path / "mag.toml", [])
    assert config == MagCache(ratios=found["ratios"], measured_on="wan-plain", stored=stored, threshold=0.3)
    text = (tmp_path / "mag.toml").read_text()
    assert text.startswith(f"# Measured by dit-accel tune magcache on wan-plain: {STEPS} steps, 2 prompts.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["mag.toml"]


def test_the_polynomial_fits_what_holding_is_off_by(tmp_path, untouched):
    found = tune_teacache(asked(), tmp_path / "tea.toml").found
    pairs = [(one, two) for run in untouched for one, two in itertools.pairwise(run)]
    signal = [size(two[2] - one[2]) / size(one[2]) for one, two in pairs]
    off = [size((two[1] - two[0]) - (one[1] - one[0])) / size(one[1]) for one, two in pairs]
    (fit,) = found["fits"]
    assert (fit["transformer"], fit["points"]) == ("transformer", 2 * (STEPS - 1))
    assert (fit["lowest"], fit["highest"]) == pytest.approx((min(signal), max(signal)), rel=1e-4)
    expected = np.polyval(np.polyfit(signal, off, 4), signal)
    assert np.polyval(fit["polynomial"], signal) == pytest.approx(expected, rel=1e-3)
    assert 0 < fit["off"] <= fit["spread"]
    (config,) = select_methods([], tmp_path / "tea.toml", [])
    assert config == TeaCache(polynomial=fit["polynomial"], measured_on="wan-plain")


def test_numbers_that_are_there_and_too_few_steps_are_refused(tmp_path):
    for name, ask, text in (
        ("magcache", asked(MagCache(ratios=(1.0, 0.9))), r"^tune magcache.*got magcache\.ratios = \(1\.0, 0\.9\)"),
        ("teacache", asked(TeaCache(family="mochi-1")), r"^tune teacache.*got teacache\.family = 'mochi-1'"),
        ("teacache", asked(num_inference_steps=1, prompts=PROMPTS[:1]), r"^tune teacache.*steps.*got 1"),
        ("teacache", asked(num_inference_steps=5, prompts=PROMPTS[:1]), r"5 coefficients.*4 changes.*transformer"),
    ):
        with pytest.raises(ConfigError, match=text):
            TUNERS[name](ask, tmp_path / f"{ask.num_inference_steps}.toml")


def test_another_method_may_be_attached(tmp_path):
    lite = LiteAttention(block_size=16, dense_steps=0, threshold=-1.0)
    sizes = dict(num_frames=9, height=32, width=32, prompts=PROMPTS[:1])
    runs = (tune_magcache(asked(*some, **sizes), tmp_path / f"{len(some)}.toml") for some in ((), (lite,)))
    alone, beside = (one.found["ratios"] for one in runs)
    assert beside != alone
    assert beside == pytest.approx(alone, rel=0.1)


@pytest.mark.slow
@pytest.mark.rare
def test_the_committed_numbers_of_the_embedded_model_are_what_the_commands_measure(tmp_path):
    every = tuning_request(model="wan-plain", prompts=embedded_prompts("wan-plain", 4))
    ratios = tune_magcache(every, tmp_path / "mag.toml").found["ratios"]
    assert ratios == pytest.approx(MAGCACHE["wan-plain"]["ratios"], abs=1e-4)
    (fit,) = tune_teacache(every, tmp_path / "tea.toml").found["fits"]
    changes = np.linspace(fit["lowest"], fit["highest"], 20)
    committed = np.polyval(TEACACHE["wan-plain"]["polynomial"], changes)
    assert np.polyval(fit["polynomial"], changes) == pytest.approx(committed, abs=1e-3)
