"""Larger pictures and longer clips: UltraImage's guided and view mode, the noise shift, and what `generate` says."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from dit_accel_pipelines.families.flux import FLUX
from dit_accel_pipelines.generation.larger import prepare_larger
from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.request import Request, resolve
from tiny_stock import stock_pipeline
from typer.testing import CliRunner

import dit_accel
from dit_accel import AttachError, ConfigError, EasyCache, UltraImage
from dit_accel.attachment.pipeline_call import _pinned
from dit_accel.cli.app import app
from dit_accel.cli.method_options import select_methods
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


NAMES = ["FluxPipeline", "ChromaPipeline", "QwenImagePipeline", "StableDiffusion3Pipeline"]


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_that_follows_to_the_end_is_the_small_one_enlarged(name):
    pipe, large, made, report = run(name, (96, 128), guided=True, follow_above=0.0, small=4)
    (first, small), (second, _) = made
    assert first["height"] * 4 == first["width"] * 3
    assert (second["height"], second["width"]) == (96, 128)
    wanted = F.interpolate(small.images, size=(96, 128), mode="bicubic", antialias=True).clamp(0, 1)
    assert (large - through(pipe, wanted)).abs().max() < 2e-3
    assert "2 steps took no forward" in report.sections[0].lines[0]


@pytest.mark.parametrize("name", NAMES)
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
    assert large[..., :top, :].abs().mean() > 0.1 * small.abs().mean()  # where there is nothing to keep
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
    _, _, made, _ = run("FluxPipeline", (64, 64), guided=True, trained_height=64, trained_width=64)
    assert len(made) == 1  # no larger than trained
    assert latents.shape == picture.shape
    assert torch.isfinite(latents).all()


def test_low_frequencies_are_pulled_below_the_level_and_are_the_mean_of_what_a_small_token_covers():
    _, free, _, _ = run("FluxPipeline", (96, 96), guided=True, follow_above=0.9)
    _, pulled, made, report = run("FluxPipeline", (96, 96), guided=True, follow_above=0.9, pull=1.0)
    wanted = F.interpolate(made[0][1].images, size=(96, 96), mode="bicubic", antialias=True)
    assert (pulled - wanted).abs().mean() < (free - wanted).abs().mean()
    assert "pulled to its low frequencies" in str(report)
    values = torch.randn(2, 24, 3)
    low = low_band(values, (4, 6), (2, 3))
    grid = values.unflatten(1, (4, 6))
    assert torch.allclose(
        low.unflatten(1, (4, 6))[:, :2, 4:], grid[:, :2, 4:].mean((1, 2), keepdim=True).expand(-1, 2, 2, -1)
    )
    assert torch.allclose(low_band(low, (4, 6), (2, 3)), low, atol=1e-6)


def test_step_caches_leave_the_steps_that_follow():
    followed = []
    for caches in ((), (EasyCache(threshold=9.0),)):
        pipe, call = stock_pipeline("FluxPipeline")
        call |= {"height": 96, "width": 96, "num_inference_steps": 6}
        with dit_accel.attach(pipe, UltraImage(**TRAINED, guided=True), *caches) as attachment:
            attachment.call(**call)
            followed.append(attachment.report().section("ultraimage").lines[0])
    assert followed[0] == followed[1]
    assert not followed[0].startswith("0 ")


def test_what_can_not_be_is_refused():
    def refused(match, error=ConfigError):
        return pytest.raises(error, match=match)

    with refused("both; set one"):
        UltraImage(guided=True, view=True)
    with refused(r"pull = 0\.5 pulls"):
        UltraImage(view=True, pull=0.5)
    with refused("small = 40 tokens"):
        run("FluxPipeline", (96, 96), guided=True, small=40)
    with refused(r"^ultraimage\.guided.*, and DPMSolverMultistepScheduler "):
        run("PixArtSigmaPipeline", (96, 96), guided=True, correct=False)
    guided, large = UltraImage(**TRAINED, guided=True), {"height": 96, "width": 96, "num_inference_steps": 1}
    pipe, call = stock_pipeline("PixArtSigmaPipeline")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with dit_accel.attach(pipe, replace(guided, correct=False)) as attachment, refused(r"Adapter\.flow"):
        attachment.call(**call | large)
    pipe, call = stock_pipeline("FluxPipeline")
    with dit_accel.attach(pipe, guided), refused(r"attachment\.call"):
        pipe(**call | large)
    with dit_accel.attach(pipe.transformer, guided) as attachment, refused(r"^call runs.*transformer;", AttachError):
        attachment.call(**call | large)


# Without a small picture: the shift of the noise, and the command


@pytest.fixture
def flux():
    tiled = []
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return SimpleNamespace(scheduler=scheduler, vae=SimpleNamespace(enable_tiling=lambda: tiled.append(1)), tiled=tiled)


def request_of(tmp_path, side, **options):
    return Request(prompt="a kite", output=tmp_path / "a.png", height=side, width=side, **options)


def test_a_larger_picture_is_decoded_in_tiles_at_the_largest_shift(flux, tmp_path):
    before = dict(flux.scheduler.config)
    for side, family in ((2048, FLUX_DEV), (4096, FLUX.families[-1]), (4096, None)):
        assert prepare_larger(flux, request_of(tmp_path, side), family) == []
    assert dict(flux.scheduler.config) == before
    assert not flux.tiled
    notes = prepare_larger(flux, request_of(tmp_path, 4096), FLUX_DEV)
    assert len(flux.tiled) == 1
    assert len(notes) == 2
    assert "held at that of 4096 tokens: along its line 65536" in notes[1]
    config = flux.scheduler.config
    shift = calculate_shift(
        256 * 256, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    assert shift == pytest.approx(config.max_shift)


def test_the_noise_shift_is_held_in_the_large_stage_alone(flux, tmp_path):
    config = UltraImage(guided=True)
    before = flux.scheduler.config.max_image_seq_len
    assert len(prepare_larger(flux, request_of(tmp_path, 4096, methods=(config,)), FLUX_DEV)) == 1
    assert flux.scheduler.config.max_image_seq_len == before
    handler = UltraImageHandler(config, Model(adapter=FLUX, family=FLUX_DEV, heads=24, layers=57))
    assert handler.small_grid(256, 192) == (64, 48)
    saving = handler.estimate(TokenLayout(frames=1, height=256, width=192), 28)
    assert "64 x 48 tokens is made first" in str(saving.notes)
    with _pinned(handler, flux, (256, 128)):
        assert flux.scheduler.config.max_image_seq_len == 256 * 128
    assert flux.scheduler.config.max_image_seq_len == before


# What the command says beyond the trained size

SMALL = ["--model", "wan-plain", "--num-inference-steps", "1", "--height", "32", "--width", "32", "--num-frames"]
LARGER = ["--model", "flux-tiny", "--height", "112", "--width", "128", "--num-inference-steps", "2", "--ultraimage"]
RUNS = [
    ([*SMALL, "33", "--ultravico"], "ultravico changes nothing: 17 latent frames, trained on 17"),
    ([*SMALL, "33", "--ultravico"], "attention calls: 12 dense, 0 sparse"),
    ([*SMALL, "37", "--ultravico"], "ultravico: 19 latent frames, 1.12 times the trained 17"),
    ([*SMALL, "37", "--ultravico"], "attention calls: 0 dense, 12 sparse"),
    ([*SMALL, "37", "--rope", "--set", "rope.kind=riflex"], "kind riflex: 19 tokens along frames, trained on 17"),
    ([*SMALL, "37", "--lvsa", "--set", "lvsa.window=2"], "lvsa: 19 latent frames, trained on 17; each sees 5 around"),
    (LARGER, "ultraimage: 14 x 16 tokens, trained on 12 x 12; positions corrected"),
    (LARGER, "heads as measured in the first step"),
    ([*LARGER, "--set", "ultraimage.guided=true"], "took no forward"),
]
BEYOND = "34 latent frames are 2.00 times the 17 that wan-plain was trained on, beyond which clips repeat themselves or"


def test_methods_for_larger_outputs_say_in_the_report_what_they_did(tmp_path: Path):
    made: dict[str, str] = {}
    for arguments, line in RUNS:
        key = " ".join(arguments)
        if key not in made:
            result = CliRunner().invoke(app, ["generate", "a red circle", *arguments, "-o", str(tmp_path / "a.png")])
            assert result.exit_code == 0, result.stderr
            made[key] = " ".join(result.stderr.split())
            record = json.loads((tmp_path / "a.png.json").read_text())
            assert "--ultravico" not in arguments or "trained_frames" in json.dumps(record)
        assert line in made[key]
        assert "beyond which" not in made[key]


def warnings_of(tmp_path: Path, *flags: str, **options) -> list[str]:
    methods = tuple(select_methods(flags, None, ()))
    options = {"model": "wan-plain", **options}
    return resolve(Request(prompt="a red circle", output=tmp_path / "a.mp4", methods=methods, **options)).warnings


def test_sizes_beyond_the_trained_one_are_told(tmp_path: Path):
    assert warnings_of(tmp_path, num_frames=67) == [f"{BEYOND} fall apart; attach --ultravico or --lvsa or --rope"]
    assert len(warnings_of(tmp_path, "radial", num_frames=67)) == 1
    for flag in ("rope", "lvsa", "ultravico"):
        assert not warnings_of(tmp_path, flag, num_frames=67)
    assert not warnings_of(tmp_path, num_frames=33)
    (large,) = warnings_of(tmp_path, model="flux-tiny", height=144, width=144)
    assert large.startswith("18 rows of tokens are 1.50 times the 12 that flux-tiny was trained on, beyond which pict")
    assert large.endswith("attach --ultraimage or --rope")
    assert not warnings_of(tmp_path, "ultraimage", model="flux-tiny", height=144, width=144)
    assert warnings_of(tmp_path, num_frames=511)
    with pytest.raises(ConfigError, match=r"wan.*256 tokens.*frames, got 257"):
        warnings_of(tmp_path, num_frames=513)


def test_they_are_warned_of_before_anything_is_made_also_when_quiet(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("dit_accel_pipelines.generation.generate.load_pipeline", lambda request: 1 / 0)
    arguments = ["generate", "a red circle", *SMALL, "67", "-o", str(tmp_path / "a.mp4")]
    for flags in ([], ["--quiet"]):
        result = CliRunner().invoke(app, [*arguments, *flags])
        lines = [line for line in result.stderr.splitlines() if not line.startswith("error: ")]
        assert [line[: len(BEYOND) + 9] for line in lines if line.startswith("warning: ")] == [f"warning: {BEYOND}"]
        assert len(lines) == 2 - len(flags)  # a note that no method is attached
    Stages(silent=True).warn("too long")  # as all but one of several processes
    assert not capsys.readouterr().err
