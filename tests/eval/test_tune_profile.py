"""`tune profile`: attention received, classes of blocks, what it measures on a model, writes and refuses."""

import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from dit_accel_eval.tune.profile import cached_blocks, tune_profile
from dit_accel_eval.tune.profile_watch import CRITERIA, attention_received, foreground_ratio
from dit_accel_pipelines.generation.generate import run
from dit_accel_pipelines.generation.request import resolve
from tuning import PROMPTS, conditional_forwards, loaded, one_pipeline
from tuning import request as request_of
from wan_tiny import tiny_transformer

import dit_accel
from dit_accel import ConfigError, EasyCache
from dit_accel.methods.caches.block_numbers import read_numbers
from dit_accel.methods.caches.profile_file import weights_digest
from dit_accel.methods.caches.profiling import ProfilingCache
from dit_accel.rules.foreground import foreground, predicted

STEPS = 5
pipe = pytest.fixture(one_pipeline, autouse=True)


def request(*methods, **changes):
    sizes = dict(num_inference_steps=STEPS, num_frames=9, height=32, width=32, prompts=PROMPTS[:1])
    return request_of(*methods, **{**sizes, **changes})


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    with pytest.MonkeyPatch.context() as patch:
        for _ in one_pipeline(patch):
            return tune_profile(request(prompts=PROMPTS), folder / "profile.json"), folder


def test_deltas_and_masks_are_those_of_an_untouched_run(profiled, tmp_path):
    found = tune_profile(request(), tmp_path / "own.json")
    seen = conditional_forwards(request())
    entry = found.found["transformers"]["transformer"]
    assert entry["names"] == [f"blocks.{index}" for index in range(6)]
    for index in range(6):
        for step in range(1, STEPS):
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
        assert np.shape(entry["by_step"][criterion]) == (6, STEPS)
    assert all(0 <= x <= 1 for row in entry["by_step"]["attention"] for x in row if x is not None)
    with dit_accel.attach(pipe, ProfilingCache(blocks=str(found.output), every=2)) as attachment:
        run(pipe, PROMPTS[0], resolve(request())[0])
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
    asked = request(model=str(tmp_path / "model"), num_inference_steps=10)
    content = tune_profile(asked, tmp_path / "profile.json", cached=2).found
    assert [*content["transformers"]] == ["transformer", "transformer_2"]
    for model, entry, known in zip(models, content["transformers"].values(), (range(1, 6), range(7, 10)), strict=True):
        assert entry["weights"] == weights_digest(model)
        for row in entry["by_step"]["error"]:
            assert [step for step, value in enumerate(row) if value is not None] == [*known]
    with dit_accel.attach(pipe, ProfilingCache(blocks=str(tmp_path / "profile.json"), every=2)) as attachment:
        run(pipe, PROMPTS[0], resolve(asked)[0])
        assert [*attachment.report().section("profilingcache").data["cached"]] == ["transformer", "transformer_2"]


@pytest.mark.slow
def test_an_image_goes_without_attention(tmp_path):
    sizes = dict(num_frames=None, height=48, width=48, num_inference_steps=4)
    asked = request(model="flux-tiny", prompts=("a green ring on a navy background",), **sizes)
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
            tune_profile(request(*methods), tmp_path / "own.json", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("masked", [False, True])
def test_attention_received_is_the_mean_of_the_columns(masked, monkeypatch):
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 37, 8), torch.randn(2, 2, 37, 8)
    mask = torch.rand(2, 37) > 0.3 if masked else None
    monkeypatch.setattr("dit_accel_eval.tune.profile_watch.SCORES", 4 * 37 * 5)  # chunks of five queries
    logits = q @ k.repeat_interleave(2, 1).mT * 8**-0.5
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
    found = attention_received(q, k, key_mask=mask)
    torch.testing.assert_close(found, logits.softmax(-1).mean((0, 1, 2)))
    assert found.sum() == pytest.approx(1, abs=1e-5)
    assert torch.equal(attention_received(q, k, key_mask=mask, rows=torch.arange(37)), found)


def test_the_ratio_is_of_the_foreground_and_by_frame():
    received = np.array([[4.0, 0.0, 0.0, 0.0], [4.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    foreground = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    assert foreground_ratio(received, foreground) == pytest.approx((0.5 + 1.0) / 2)
    assert np.isnan(foreground_ratio(received, np.zeros_like(foreground)))


def test_classes():
    scores = [0.5, 0.1, 0.9, 0.2, float("nan"), 0.85]
    assert cached_blocks(scores) == ([0, 1, 3], pytest.approx((0.5 + 0.85) / 2))
    assert cached_blocks(scores, count=1) == ([1], pytest.approx(0.15))
    assert cached_blocks(scores, count=5)[0] == [0, 1, 2, 3, 5]
    assert (cached_blocks([]), cached_blocks([0.4, 0.8], count=0)) == (([], 0.0), ([], 0.4))
