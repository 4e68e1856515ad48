"""UltraImage's guided and view mode: a small picture first, which a larger one follows."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from dit_accel_assets import model_path
from dit_accel_pipelines.families.flux import FLUX
from dit_accel_pipelines.generation.larger import prepare_larger
from dit_accel_pipelines.generation.request import Request
from tiny_stock import stock_pipeline
from typer.testing import CliRunner

import dit_accel
from dit_accel import AttachError, ConfigError, EasyCache, UltraImage
from dit_accel.attachment.pipeline_call import _pinned
from dit_accel.cli.app import app
from dit_accel.methods.base import Model
from dit_accel.methods.positions.guide import low_band
from dit_accel.methods.positions.ultraimage import UltraImageHandler
from dit_accel.plan.layout import TokenLayout

FLUX_DEV = FLUX.families[0]

TRAINED = {"trained_height": 2, "trained_width": 2}


def run(name, side, steps=2, **options):
    """Return the pipeline's pictures of a tiny pipeline and what the first stage gave, and the report."""
    pipe, call = stock_pipeline(name)
    made = []
    of = type(pipe).__call__

    class Watched(type(pipe)):
        def __call__(self, **kwargs):
            made.append((kwargs, of(self, **kwargs)))
            return made[-1][1]

    pipe.__class__ = Watched
    call |= {"height": side[0], "width": side[1], "num_inference_steps": steps}
    call["output_type"] = options.pop("output_type", "pt")
    settings = UltraImage(**{**TRAINED, "correct": name != "StableDiffusion3Pipeline", **options})
    with dit_accel.attach(pipe, settings) as attachment:
        out = attachment.call(**call, generator=torch.Generator().manual_seed(0))
        return pipe, out.images, made, attachment.report()


def through(pipe, picture):
    """Return a picture [B, 3, height, width] in [0, 1] after the autoencoder's both ways."""
    frames = picture.unsqueeze(2) if hasattr(pipe.vae.config, "z_dim") else picture
    with torch.no_grad():
        back = pipe.vae.decode(pipe.vae.encode(2 * frames - 1).latent_dist.mode()).sample
    back = back[:, :, 0] if back.dim() == 5 else back
    return ((back + 1) / 2).clamp(0, 1)


@pytest.mark.parametrize("name", ["FluxPipeline", "ChromaPipeline", "QwenImagePipeline", "StableDiffusion3Pipeline"])
def test_a_picture_that_follows_to_the_end_is_the_small_one_enlarged(name):
    pipe, large, made, report = run(name, (96, 128), guided=True, follow_above=0.0, small=4)
    (first, small), (second, _) = made
    assert first["height"] * 4 == first["width"] * 3
    assert (second["height"], second["width"]) == (96, 128)
    wanted = F.interpolate(small.images, size=(96, 128), mode="bicubic", antialias=True).clamp(0, 1)
    assert (large - through(pipe, wanted)).abs().max() < 2e-3
    assert "2 steps took no forward" in report.sections[0].lines[0]


@pytest.mark.parametrize("name", ["FluxPipeline", "ChromaPipeline", "QwenImagePipeline", "StableDiffusion3Pipeline"])
def test_view_mode_keeps_the_small_picture_in_the_middle_alone(name):
    options = {"view": True, "small": 4, "enlarge": "latents", "output_type": "latent"}
    pipe, large, made, report = run(name, (128, 96), follow_above=0.0, **options)
    _, other, _, _ = run(name, (128, 96), follow_above=1.0, **options)
    small = unpacked(pipe, made[0][1].images, made[0][0])
    large, other = (unpacked(pipe, one, made[1][0]) for one in (large, other))
    rows, columns = small.shape[-2:]
    top, left = (large.shape[-2] - rows) // 4 * 2, (large.shape[-1] - columns) // 4 * 2
    middle = large[..., top : top + rows, left : left + columns]
    assert (middle - small).abs().max() < 1e-4 * small.abs().max()
    assert not torch.allclose(other[..., top : top + rows, left : left + columns], small, atol=0.1)
    assert not torch.allclose(large[..., :top, :], other[..., :top, :])
    assert "had the small picture in the middle" in report.sections[0].lines[0]


def unpacked(pipe, latents, call):
    """Return a pipeline's latents as [B, C, height, width]."""
    if latents.dim() == 4:
        return latents
    latents = pipe._unpack_latents(latents, call["height"], call["width"], pipe.vae_scale_factor)
    return latents.flatten(1, -3)


def test_latents_are_enlarged_as_the_transformer_takes_them():
    _, picture, _, _ = run("FluxPipeline", (96, 96), guided=True, follow_above=0.0)
    _, latents, made, _ = run("FluxPipeline", (96, 96), guided=True, follow_above=0.0, enlarge="latents")
    assert made[0][0]["output_type"] == "latent"
    assert latents.shape == picture.shape
    assert torch.isfinite(latents).all()


def test_low_frequencies_are_pulled_below_the_level():
    _, free, _, _ = run("FluxPipeline", (96, 96), guided=True, follow_above=0.9)
    _, pulled, made, report = run("FluxPipeline", (96, 96), guided=True, follow_above=0.9, pull=1.0)
    wanted = F.interpolate(made[0][1].images, size=(96, 96), mode="bicubic", antialias=True)
    assert (pulled - wanted).abs().mean() < (free - wanted).abs().mean()
    assert "pulled to its low frequencies" in str(report)


def test_the_low_band_is_the_mean_of_what_a_small_token_covers():
    values = torch.randn(2, 24, 3)
    low = low_band(values, (4, 6), (2, 3))
    grid = values.unflatten(1, (4, 6))
    assert torch.allclose(
        low.unflatten(1, (4, 6))[:, :2, 4:], grid[:, :2, 4:].mean((1, 2), keepdim=True).expand(-1, 2, 2, -1)
    )
    assert torch.allclose(low_band(low, (4, 6), (2, 3)), low, atol=1e-6)


def test_a_picture_no_larger_than_trained_is_made_at_once():
    _, _, made, _ = run("FluxPipeline", (64, 64), guided=True, trained_height=64, trained_width=64)
    assert len(made) == 1


def test_step_caches_leave_the_steps_that_follow():
    followed = []
    for caches in ((), (EasyCache(threshold=9.0),)):
        pipe, call = stock_pipeline("FluxPipeline")
        call |= {"height": 96, "width": 96, "num_inference_steps": 8}
        with dit_accel.attach(pipe, UltraImage(**TRAINED, guided=True), *caches) as attachment:
            attachment.call(**call)
            sections = {one.method: one for one in attachment.report().sections}
        followed.append(sections["ultraimage"].lines[0])
    assert followed[0] == followed[1]
    assert not followed[0].startswith("0 ")


def test_what_can_not_be_is_refused():
    with pytest.raises(ConfigError, match="both; set one"):
        UltraImage(guided=True, view=True)
    with pytest.raises(ConfigError, match=r"pull = 0\.5 pulls"):
        UltraImage(view=True, pull=0.5)
    with pytest.raises(ConfigError, match="small = 40 tokens"):
        run("FluxPipeline", (96, 96), guided=True, small=40)
    with pytest.raises(ConfigError, match=r"^ultraimage\.guided.*, and DPMSolverMultistepScheduler "):
        run("PixArtSigmaPipeline", (96, 96), guided=True, correct=False)
    pipe, call = stock_pipeline("PixArtSigmaPipeline")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with (
        dit_accel.attach(pipe, UltraImage(**TRAINED, guided=True, correct=False)) as attachment,
        pytest.raises(ConfigError, match=r"Adapter\.flow"),
    ):
        attachment.call(**call | {"height": 96, "width": 96, "num_inference_steps": 1})
    pipe, call = stock_pipeline("FluxPipeline")
    large = {**call, "height": 96, "width": 96, "num_inference_steps": 1}
    with (
        dit_accel.attach(pipe, UltraImage(**TRAINED, guided=True)),
        pytest.raises(ConfigError, match=r"attachment\.call"),
    ):
        pipe(**large)
    attachment = dit_accel.attach(pipe.transformer, UltraImage(**TRAINED, guided=True))
    with attachment, pytest.raises(AttachError, match=r"^call runs.*transformer;"):
        attachment.call(**large)


def test_the_noise_shift_is_held_in_the_large_stage_alone(tmp_path):
    pipe, _ = stock_pipeline("FluxPipeline")
    pipe.vae.enable_tiling = lambda: None
    config = UltraImage(guided=True)
    before = pipe.scheduler.config.max_image_seq_len
    request = Request(prompts=("a kite",), output=tmp_path / "a.png", height=4096, width=4096, methods=(config,))
    assert len(prepare_larger(pipe, request, FLUX_DEV)) == 1
    assert pipe.scheduler.config.max_image_seq_len == before
    handler = UltraImageHandler(config, Model(adapter=FLUX, family=FLUX_DEV, heads=24, layers=57))
    assert handler.small_grid(256, 192) == (64, 48)
    assert "64 x 48 tokens is made first" in str(
        handler.estimate(TokenLayout(frames=1, height=256, width=192), 28).notes
    )
    with _pinned(handler, pipe, (256, 256)):
        assert pipe.scheduler.config.max_image_seq_len == 256 * 256
    assert pipe.scheduler.config.max_image_seq_len == before


def test_generate_makes_both_and_says_so(tmp_path):
    assert model_path("flux-tiny")
    out = tmp_path / "a.png"
    result = CliRunner().invoke(app, [
        "generate", "a red circle", "--model", "flux-tiny", "--num-inference-steps", "2", "--height", "128", "--width",
        "128", "--ultraimage", "--set", "ultraimage.guided=true", "-o", str(out),
    ])  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "took no forward" in " ".join(result.stderr.split())
    record = json.loads((tmp_path / "a.png.json").read_text())
    assert len(record["seconds"]["steps"]) == 4
