"""The packaged model: loads offline, round-trips, is small, reconstructs held-out clips and follows prompts."""

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from dit_accel_assets import checker, clips, model_path, vocabulary


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    torch.set_num_threads(1)
    pipe = WanPipeline.from_pretrained(model_path("wan-plain"), torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_size_is_at_most_25_mb():
    assert sum(file.stat().st_size for file in model_path("wan-plain").rglob("*") if file.is_file()) <= 25_000_000


def test_the_tokenizer_knows_exactly_the_vocabulary(pipe):
    known = set(pipe.tokenizer.get_vocab()) - {"<pad>", "</s>", "<unk>"}
    assert known == set(vocabulary("wan-plain"))
    tokens = pipe.tokenizer("A red Circle, moving up-left.").input_ids
    assert pipe.tokenizer.convert_ids_to_tokens(tokens) == ["a", "red", "circle", "moving", "up-left", "</s>"]


def test_saving_and_loading_gives_the_same_clip(pipe, tmp_path):
    def run(pipeline: WanPipeline) -> np.ndarray:
        generator = torch.Generator().manual_seed(3)
        return pipeline(
            "a red circle moving right", height=64, width=64, num_frames=5, num_inference_steps=2, generator=generator
        ).frames

    pipe.save_pretrained(tmp_path)
    again = WanPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32, local_files_only=True)
    again.set_progress_bar_config(disable=True)
    assert np.allclose(run(pipe), run(again), atol=1e-4)  # where the weights lie in memory moves the last bits


@pytest.mark.parametrize("frames", [17, 33])
def test_the_autoencoder_reconstructs_held_out_clips(pipe, frames):
    for seed in range(2):
        video = clips.clip_of(seed, frames=frames, held_out=True)[2]
        x = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad():
            y = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample
        psnr = -10 * torch.log10(((x - y) / 2).pow(2).mean()).item()
        assert psnr >= 27.0, (seed, psnr)


def test_latents_are_normalised(pipe):
    mean = torch.tensor(pipe.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(pipe.vae.config.latents_std).view(1, -1, 1, 1, 1)
    videos = np.stack([clips.clip_of(seed)[2] for seed in range(4)])
    x = torch.from_numpy(videos).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        latents = (pipe.vae.encode(x).latent_dist.mode() - mean) / std
    assert latents.mean().abs() < 0.3
    assert 0.6 < latents.std() < 1.5


@pytest.mark.slow
def test_generated_clips_have_the_colour_asked_for(pipe):
    pairs = [clips.clip_of(seed, frames=1, held_out=True)[:2] for seed in range(4)]
    videos = pipe(
        [prompt for prompt, _ in pairs],
        height=64,
        width=64,
        num_frames=17,
        num_inference_steps=20,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(seed) for seed in range(4)],
    ).frames
    right = [checker.check_clip(video).color == scene.color for video, (_, scene) in zip(videos, pairs, strict=True)]
    assert sum(right) >= 3
