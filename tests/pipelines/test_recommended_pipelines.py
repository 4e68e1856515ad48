"""What is recommended for a loaded pipeline: its own weights, and what was tuned on it."""

import torch
from diffusers import DiffusionPipeline
from dit_accel_assets import model_path

import dit_accel
from dit_accel.estimate import tuned


def test_a_loaded_pipeline_is_recommended_as_its_family_is_with_what_was_tuned_on_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pipe = DiffusionPipeline.from_pretrained(model_path("wan-plain"), dtype=torch.bfloat16)
    found, named = dit_accel.recommend(pipe), dit_accel.recommend("wan-plain")
    assert [*found.settings] == [*named.settings]
    count = sum(weight.numel() for weight in pipe.transformer.parameters())
    assert 2 * count < found.weight_bytes < 2.1 * count  # diffusers keeps a few of Wan's in float32
    assert found.weight_bytes > named.weight_bytes
    assert str(found) in str(dit_accel.describe(pipe))
    result = tuned.TunedResult(
        model="wan-plain", height=64, width=64, num_frames=17, num_inference_steps=20, metric="psnr", quality=30.5,
        speedup=2.0, prompts=6,
    )  # fmt: skip
    text = tuned.tuned_text([dit_accel.EasyCache(threshold=0.1)], {"num_inference_steps": 16}, result, "cached 16")
    tuned.keep_tuned("mine.toml", text, "wan-plain")
    assert dit_accel.recommend(pipe).settings[0].name == "mine"
