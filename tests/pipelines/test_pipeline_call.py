"""What pipelines are called with: read off diffusers' classes, refused before weights are loaded."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import dit_accel_pipelines.generation.loading as loading
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models import attention_dispatch
from dit_accel_pipelines.generation import dense_attention
from dit_accel_pipelines.generation.generate import frames_of, generate, run
from dit_accel_pipelines.generation.media import write_media
from dit_accel_pipelines.generation.pipeline_call import CallSignature, pipeline_class
from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.request import Request, resolve
from model_folders import model_folder
from PIL import Image

from dit_accel.adapters.model_files import ModelFiles
from dit_accel.errors import ConfigError, UnsupportedModel

PROMPT = "a red circle moving right"


def call_of(name: str) -> CallSignature:
    return CallSignature.of(pipeline_class(ModelFiles(name="m", index={"_class_name": name}, transformer={}, vae={})))


REFUSED = [
    ("FluxPipeline", {"num_frames": 9}, "FluxPipeline takes no num_frames, got 9; leave it out"),
    ("HunyuanVideo15ImageToVideoPipeline", {"image": "a.png", "height": 480}, "takes no height, got 480"),
    ("Flux2Pipeline", {"negative_prompt": "ugly"}, "takes no negative_prompt, got 'ugly'"),
    ("HunyuanVideo15Pipeline", {"guidance_scale": 3.0}, "got 3.0; leave it out: its guidance is set by a guider"),
    ("HunyuanImagePipeline", {"guidance_scale": 3.0}, "set by --arg distilled_guidance_scale=VALUE"),
    ("QwenImage21Pipeline", {"guidance_scale": 3.0}, "its guidance is set by --true-cfg-scale"),
    ("WanImageToVideoPipeline", {}, "starts from an image, got none; give generate --image FILE"),
    ("SkyReelsV2DiffusionForcingVideoToVideoPipeline", {}, "starts from a video, got none; give generate --video"),
    ("Cosmos2VideoToWorldPipeline", {}, "from an image or a video, got none; give generate --image FILE or --video"),
    ("WanAnimatePipeline", {"image": "a"}, "give generate --video pose=FILE and --video face=FILE"),
    ("FluxInpaintPipeline", {"image": "a"}, "starts from mask_image, got none; give generate --image mask=FILE"),
    ("FluxControlPipeline", {}, "starts from control_image, got none; give generate --image FILE"),
    ("FluxControlInpaintPipeline", {"image": "a", "mask_image": "b"}, "give generate --image control=FILE"),
    ("VisualClozePipeline", {}, "takes no prompt, so generate can't run it; call it from Python"),
]


@pytest.mark.parametrize(("name", "given", "message"), REFUSED)
def test_what_is_not_taken_or_missing_is_refused(name: str, given: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as caught:
        call_of(name).check(given)
    assert message in str(caught.value)


TAKEN: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in (
        "Flux2Pipeline", "GlmImagePipeline", "HeliosPipeline", "Cosmos3OmniPipeline", "Kandinsky6TI2VAPipeline",
        "QwenImage21Pipeline", "BriaFibo2Pipeline", "LTXConditionPipeline", "PixArtSigmaPipeline",
        "HunyuanVideo15Pipeline", "MotifVideoPipeline", "HunyuanImagePipeline", "Flux2KleinKVPipeline",
    )),
    ("Flux2Pipeline", {"image": "a"}),
    ("Cosmos2VideoToWorldPipeline", {"video": "a"}),
    ("WanImageToVideoPipeline", {"image": "a", "num_frames": 9, "guidance_scale": 2.0}),
    ("WanVACEPipeline", {"video": "a"}),
]  # fmt: skip


def test_pictures_are_optional_where_the_pipeline_says_so_and_a_class_that_diffusers_does_not_have_is_refused():
    for name, given in TAKEN:
        call_of(name).check(given)
    for name in ("WanPipeline9", ["module", "Custom"], None, "__version__"):
        with pytest.raises(UnsupportedModel, match=r"pipeline class.*diffusers \d"):
            call_of(name)  # type: ignore[arg-type]


def request(folder: Path, **changes: Any) -> Request:
    values: dict[str, Any] = {"prompt": PROMPT, "output": folder / "a.gif"}
    return Request(**{**values, **changes})


def test_defaults_go_only_to_parameters_that_are_there(tmp_path: Path):
    """The family knows frames and sizes; an image pipeline takes no frames, image to video no sizes."""
    write_media(tmp_path / "b.gif", np.zeros((5, 64, 64, 3), np.uint8), fps=8)
    Image.new("RGB", (64, 64)).save(tmp_path / "b.png")
    model = str(model_folder(tmp_path / "v2v", _class_name="WanVideoToVideoPipeline"))
    asked, family, notes, _ = resolve(request(tmp_path, model=model, video=[tmp_path / "b.gif"]))
    assert (family.name, notes, asked.num_frames) == ("wan-plain", [], None)
    assert (asked.height, asked.width, asked.num_inference_steps) == (64, 64, 20)
    model = str(model_folder(tmp_path / "i2v", _class_name="HunyuanVideo15ImageToVideoPipeline"))
    asked, *_ = resolve(request(tmp_path, model=model, image=[tmp_path / "b.png"]))
    assert (asked.height, asked.width, asked.num_frames) == (None, None, 17)


def test_steps_are_counted_by_the_progress_bar(tmp_path: Path, monkeypatch):
    """Pipelines without a callback have one too, and it knows how many steps there really are."""
    said: list[Any] = []
    monkeypatch.setattr(Stages, "stage", lambda self, *what: said.append(what))
    monkeypatch.setattr(Stages, "advance", lambda self: said.append("step"))

    class Pipe:
        def __call__(self, prompt, generator, output_type):
            with self.progress_bar(total=2) as bar:
                bar.set_description("any")
                bar.update()
                bar.update(1)
            for _ in self.progress_bar(torch.tensor([3, 4, 5])):  # as LTX's long clips
                pass
            return SimpleNamespace(frames=np.zeros((1, 2, 4, 6, 3)))

    pipe = Pipe()
    timings = run(pipe, request(tmp_path), stages=Stages(quiet=True)).timings
    assert len(timings.steps) == 5
    assert sum(timings.steps) == pytest.approx(timings.denoise)
    steps = [("denoising", 2), "step", "step", ("decoding",), ("denoising", 3), *["step"] * 3, ("decoding",)]
    assert said == [("encoding the prompt",), *steps]
    assert "progress_bar" not in vars(pipe)


def test_frames_of_every_kind_of_output():
    for output, shape in (
        (SimpleNamespace(frames=np.zeros((2, 5, 4, 6, 3))), (5, 4, 6, 3)),
        (SimpleNamespace(frames=[np.zeros((5, 4, 6, 3))] * 2), (5, 4, 6, 3)),
        (SimpleNamespace(video=np.zeros((5, 4, 6, 3)), sound=None), (5, 4, 6, 3)),
        (SimpleNamespace(images=np.zeros((2, 4, 6, 3))), (1, 4, 6, 3)),
        (SimpleNamespace(image=np.zeros((2, 4, 6, 3))), (1, 4, 6, 3)),
    ):
        assert frames_of(output).shape == shape


def test_a_pipeline_is_placed_as_asked(tmp_path: Path, monkeypatch):
    pipe, on = mock.Mock(), torch.device
    monkeypatch.setattr(loading, "pick_device", on)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda source, dtype, use_safetensors: pipe)
    group = {"exclude_modules": None, "offload_type": "leaf_level"}
    for offload, device, said in (
        ("none", "cpu", mock.call.to(on("cpu"))),
        ("none", "cuda:1", mock.call.to(on("cuda:1"))),
        ("model", "cuda:1", mock.call.enable_model_cpu_offload(device=on("cuda:1"))),
        ("sequential", "cuda:1", mock.call.enable_sequential_cpu_offload(device=on("cuda:1"))),
        ("group", "cuda:1", mock.call.enable_group_offload(onload_device=on("cuda:1"), use_stream=True, **group)),
        ("group", "xpu", mock.call.enable_group_offload(onload_device=on("xpu"), use_stream=False, **group)),
    ):
        pipe.reset_mock()
        assert loading.load_pipeline(request(tmp_path, offload=offload, device=device)) is pipe
        assert pipe.mock_calls[1:] == [said]  # behind the bar's


def test_image_to_video_end_to_end(tmp_path: Path):
    """The embedded model as an image-to-video pipeline: the first frame is the image's."""
    model = model_folder(
        tmp_path / "model", _class_name="WanImageToVideoPipeline", expand_timesteps=True, image_encoder=[None, None],
        image_processor=[None, None],
    )  # fmt: skip
    shown = {}
    for colour in ("red", "blue"):
        image, output = (tmp_path / f"{colour}.{end}" for end in ("png", "gif"))
        Image.new("RGB", (48, 32), colour).save(image)
        small = dict(num_inference_steps=1, num_frames=5, height=32, width=48)
        (written,) = generate([request(tmp_path, output=output, model=str(model), image=[image], **small)])
        record = json.loads((tmp_path / f"{colour}.gif.json").read_text())
        assert record == json.loads(json.dumps(written.record))
        assert (record["image"], record["video"]) == ([str(image)], [])
        with Image.open(output) as video:
            shown[colour] = np.asarray(video.convert("RGB"), dtype=float).mean((0, 1))
    assert shown["red"][0] > shown["red"][2] + 60
    assert shown["blue"][2] > shown["blue"][0] + 60


def test_a_pipeline_whose_latents_have_the_formats_of_its_text_runs_in_half_precision(tmp_path):
    """FLUX's latents are bfloat16 as its text is, and the autoencoder stays float32."""
    pipe = loading.load_pipeline(request(tmp_path, model="flux-tiny", dtype="bfloat16", device="cpu"))
    assert pipe.transformer.dtype is torch.bfloat16
    assert pipe.vae.dtype is torch.float32
    made = run(pipe, request(tmp_path, model="flux-tiny", num_inference_steps=1, height=32, width=32))
    assert made.frames.std() > 1


# Options that the call or the layers take: shift, scales, attention


def test_a_scheduler_without_a_shift_is_refused_before_weights_are_loaded(tmp_path: Path):
    model = model_folder(tmp_path / "m", scheduler=["diffusers", "DDIMScheduler"])
    (model / "scheduler" / "scheduler_config.json").unlink()
    (model / "scheduler" / "scheduler_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"DDIMScheduler .*flow_shift 2"):
        resolve(request(tmp_path, model=str(model), flow_shift=2.0))


def test_a_shift_that_a_pipeline_would_overrule_is_refused(tmp_path: Path):
    model = str(model_folder(tmp_path / "m", _class_name="Flux2Pipeline"))
    asked = Request(prompt="a red circle", output=tmp_path / "a.png", model=model, solver="unipc", flow_shift=2.0)
    with pytest.raises(ConfigError, match=r"Flux2Pipeline .*'unipc' .*flow_shift 2; .*'euler'"):
        resolve(asked)
    assert resolve(dataclasses.replace(asked, solver="euler")).request.flow_shift == 2.0


def test_the_scale_of_a_negative_prompt_wins_over_that_of_guidance(tmp_path: Path):
    asked, *_ = resolve(
        Request(
            prompt="a red circle", output=tmp_path / "a.png", model="flux-tiny", guidance_scale=4.0, true_cfg_scale=2.0
        )
    )
    call = CallSignature.of(type(loading.load_pipeline(asked)))
    assert asked.full_call(call, {})["true_cfg_scale"] == 2.0
    assert dataclasses.replace(asked, true_cfg_scale=None).full_call(call, {})["true_cfg_scale"] == 4.0


def test_an_attention_backend_is_that_of_one_transformer(pipe):
    before = attention_dispatch._AttentionBackendRegistry._active_backend
    dense_attention.use_attention_backend(pipe.transformer, "_native_math")
    chosen = {
        module.processor._attention_backend for module in pipe.transformer.modules() if hasattr(module, "processor")
    }
    assert chosen == {attention_dispatch.AttentionBackendName._NATIVE_MATH}
    assert attention_dispatch._AttentionBackendRegistry._active_backend is before


def test_a_model_whose_layers_call_torch_themselves_takes_no_attention_backend(tmp_path: Path):
    files = type("Files", (), {"transformer": {"_class_name": "PixArtTransformer2DModel", "num_layers": 1}})
    with pytest.raises(ConfigError, match=r"PixArtTransformer2DModel .*'native'"):
        dense_attention.check_attention_backend("native", files, torch.device("cpu"))  # type: ignore[arg-type]
