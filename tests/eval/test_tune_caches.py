"""Tuning MagCache, TeaCache (`tune magcache`) and ProfilingCache: what is measured, written and refused."""

import itertools
import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from dit_accel_eval.runs.loaded import embedded_prompts, tuning_request
from dit_accel_eval.tune.caches import tune_magcache, tune_teacache
from dit_accel_eval.tune.profile import CRITERIA, attention_received, cached_blocks, foreground_ratio, tune_profile
from dit_accel_pipelines.families.released import PUBLISHED
from dit_accel_pipelines.generation.generate import run
from dit_accel_pipelines.generation.request import resolve
from tuning import PROMPTS, conditional_forwards, loaded, one_pipeline, request
from wan_tiny import tiny_transformer

import dit_accel
from dit_accel import ConfigError, EasyCache, LiteAttention, MagCache, TeaCache
from dit_accel.cli.method_options import select_methods
from dit_accel.methods.caches.block_numbers import read_numbers
from dit_accel.methods.caches.profile_file import weights_digest
from dit_accel.methods.caches.profiling import ProfilingCache
from dit_accel.rules.foreground import foreground, predicted

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
    assert ratios == pytest.approx(PUBLISHED["magcache"]["wan-plain"]["ratios"], abs=1e-4)
    (fit,) = tune_teacache(every, tmp_path / "tea.toml").found["fits"]
    changes = np.linspace(fit["lowest"], fit["highest"], 20)
    committed = np.polyval(PUBLISHED["teacache"]["wan-plain"]["polynomial"], changes)
    assert np.polyval(fit["polynomial"], changes) == pytest.approx(committed, abs=1e-3)


FEW = 5


def few(*methods, **changes):
    sizes = dict(num_inference_steps=FEW, num_frames=9, height=32, width=32, prompts=PROMPTS[:1])
    return request(*methods, **{**sizes, **changes})


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    with pytest.MonkeyPatch.context() as patch:
        for _ in one_pipeline(patch):
            return tune_profile(few(prompts=PROMPTS), folder / "profile.json"), folder


def test_deltas_and_masks_are_those_of_an_untouched_run(profiled, tmp_path):
    found = tune_profile(few(), tmp_path / "own.json")
    seen = conditional_forwards(few())
    entry = found.found["transformers"]["transformer"]
    assert entry["names"] == [f"blocks.{index}" for index in range(6)]
    for index in range(6):
        for step in range(1, FEW):
            now, then = (after - before for before, after in (seen[at]["blocks"][index] for at in (step, step - 1)))
            change = (now - then).abs().mean()
            assert entry["by_step"]["delta"][index][step] == pytest.approx(float(change / now.abs().mean()), rel=1e-3)
            whole = seen[step]["blocks"][-1][1].abs().mean()
            assert entry["by_step"]["error"][index][step] == pytest.approx(float(change / whole), rel=1e-3)
    shares = [float(foreground(predicted(one["x"], one["v"], one["sigma"], (5, 4, 4))).float().mean()) for one in seen]
    assert found.found["runs"][0]["foreground"] == pytest.approx(shares, abs=0.03)  # a token at the threshold
    assert entry["scores"]["delta"] == pytest.approx([np.mean(row[1:]) for row in entry["by_step"]["delta"]])


def test_what_is_written_is_read_by_profiling_cache(profiled, pipe):
    found, folder = profiled
    assert [path.name for path in folder.iterdir()] == ["profile.json"]
    assert found.remarks[0].startswith("transformer: blocks ")
    assert [row[:2] for row in found.rows] == [("transformer", str(block)) for block in range(6)]
    content = json.loads((folder / "profile.json").read_text())
    entry = content["transformers"]["transformer"]
    assert (content["model"], content["settings"]["prompts"]) == ("wan-plain", [*PROMPTS])
    assert {"torch", "diffusers", "dit-accel"} == {*content["versions"]}
    assert [run["prompt"] for run in content["runs"]] == [*PROMPTS]
    for criterion in CRITERIA:
        assert np.shape(entry["by_step"][criterion]) == (6, FEW)
    assert all(0 <= x <= 1 for row in entry["by_step"]["attention"] for x in row if x is not None)
    with dit_accel.attach(pipe, ProfilingCache(blocks=str(folder / "profile.json"), every=2)) as attachment:
        run(pipe, resolve(few())[0])
        section = attachment.report().section("profilingcache")
    assert [*read_numbers(section.data["cached"]["transformer"], "x")] == entry["cached"]
    assert section.data["computed_blocks"] < 1


def test_both_experts_of_wan_2_2_are_measured(tmp_path):
    """What is measured of the second expert begins at its second step; ProfilingCache reads both lists."""
    parts = dict(loaded("wan-plain").components)
    models = [tiny_transformer(seed, text_dim=parts["transformer"].config.text_dim) for seed in (0, 5)]
    parts |= dict(zip(("transformer", "transformer_2"), models, strict=True))
    pipe = WanPipeline(**{**parts, "scheduler": FlowMatchEulerDiscreteScheduler(shift=2.0)}, boundary_ratio=0.6)
    pipe.save_pretrained(tmp_path / "model")
    asked = few(model=str(tmp_path / "model"), num_inference_steps=10)
    content = tune_profile(asked, tmp_path / "profile.json", cached=2).found
    assert [*content["transformers"]] == ["transformer", "transformer_2"]
    for model, entry, known in zip(models, content["transformers"].values(), (range(1, 6), range(7, 10)), strict=True):
        assert entry["weights"] == weights_digest(model)
        for row in entry["by_step"]["error"]:
            assert [step for step, value in enumerate(row) if value is not None] == [*known]
    with dit_accel.attach(pipe, ProfilingCache(blocks=str(tmp_path / "profile.json"), every=2)) as attachment:
        run(pipe, resolve(asked)[0])
        assert [*attachment.report().section("profilingcache").data["cached"]] == ["transformer", "transformer_2"]


@pytest.mark.slow
def test_an_image_goes_without_attention(tmp_path):
    sizes = dict(num_frames=None, height=48, width=48, num_inference_steps=4)
    asked = few(model="flux-tiny", prompts=("a green ring on a navy background",), **sizes)
    entry = tune_profile(asked, tmp_path / "own.json", cached=4).found["transformers"]["transformer"]
    kinds = [name.partition(".")[0] for name in entry["names"]]
    assert kinds == ["transformer_blocks"] * 4 + ["single_transformer_blocks"] * 8
    assert entry["scores"]["attention"] == [None] * 12
    assert all(score > 0 for name in ("delta", "error") for score in entry["scores"][name])
    assert len(entry["cached"]) == 4
    with pytest.raises(ConfigError, match=r"an image.*--criterion"):
        tune_profile(asked, tmp_path / "two.json", criterion="attention")


def test_what_is_refused_before_anything_runs(tmp_path):
    for methods, options, text in (
        ((), dict(criterion="delt"), r"criterion 'delt'.*'delta'\?"),
        ((), dict(cached=0), r"^tune profile.*cached.*>= 1, got 0"),
        ((), dict(cached=7), r"^tune profile.*cached = 7.*6 blocks"),
        ((EasyCache(),), {}, r"^tune profile.*easycache"),
    ):
        with pytest.raises(ConfigError, match=text):
            tune_profile(few(*methods), tmp_path / "own.json", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("masked", [False, True])
def test_attention_received_is_the_mean_of_the_columns(masked, monkeypatch):
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 37, 8), torch.randn(2, 2, 37, 8)
    mask = torch.rand(2, 37) > 0.3 if masked else None
    monkeypatch.setattr("dit_accel_eval.tune.profile.SCORES", 4 * 37 * 5)  # chunks of five queries
    logits = q @ k.repeat_interleave(2, 1).mT * 8**-0.5
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
    found = attention_received(q, k, key_mask=mask)
    torch.testing.assert_close(found, logits.softmax(-1).mean((0, 1, 2)))
    assert found.sum() == pytest.approx(1, abs=1e-5)
    assert torch.equal(attention_received(q, k, key_mask=mask, rows=torch.arange(37)), found)


def test_classes_and_the_ratio_of_the_foreground_by_frame():
    scores = [0.5, 0.1, 0.9, 0.2, float("nan"), 0.85]
    assert cached_blocks(scores) == ([0, 1, 3], pytest.approx((0.5 + 0.85) / 2))
    assert cached_blocks(scores, count=1) == ([1], pytest.approx(0.15))
    assert cached_blocks(scores, count=5)[0] == [0, 1, 2, 3, 5]
    assert (cached_blocks([]), cached_blocks([0.4, 0.8], count=0)) == (([], 0.0), ([], 0.4))
    received = np.array([[4.0, 0.0, 0.0, 0.0], [4.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    foreground = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    assert foreground_ratio(received, foreground) == pytest.approx((0.5 + 1.0) / 2)
    assert np.isnan(foreground_ratio(received, np.zeros_like(foreground)))
