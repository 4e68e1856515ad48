"""Tiny pipelines around Wan's transformers and those made of them; prompts come as embeddings."""

from typing import Any

import diffusers
import tiny_video_models as models
import torch
from PIL import Image
from tiny_models import WAN
from tiny_video_pipelines import EULER, _build, _prompts, _wan_vae
from wan_tiny import TINY, sharp_transformer

SIZE = dict(height=64, width=64, num_frames=17, num_inference_steps=4)
Made = tuple[Any, dict[str, Any]]
COLORS = ((90, 40, 10), (10, 40, 90), (60, 90, 30))


def picture(height: int = 64, width: int = 64, color: tuple[int, int, int] = COLORS[0]) -> Image.Image:
    """A picture of one color, with a square of another in it."""
    made = Image.new("RGB", (width, height), color)
    made.paste((200, 180, 20), (width // 4, height // 4, width // 2, height // 2))
    return made


def video(frames: int = 17, height: int = 64, width: int = 64) -> list[Image.Image]:
    """Frames that differ."""
    return [picture(height, width, COLORS[index % len(COLORS)]) for index in range(frames)]


def _wan(cls: type, config: dict[str, Any] | None = None, parts: dict[str, Any] | None = None, **call: Any) -> Made:
    latents = 12 if config is None else config["out_channels"]
    model = sharp_transformer() if config is None else _build(diffusers.WanTransformer3DModel, config)
    pipe = cls(
        **{"tokenizer": None, "text_encoder": None, "vae": _wan_vae(latents), "scheduler": EULER(shift=3.0)}
        | {"transformer": model} | (parts or {})
    )  # fmt: skip
    return pipe, {**SIZE, "guidance_scale": 3.0, **_prompts(6, 64), **call}


def _seeing(made: Made) -> Made:
    """Every picture has the same features."""
    made[0].encode_image = lambda *args: torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(4))
    return made


def wan() -> Made:
    return _wan(diffusers.WanPipeline)


def wan_two_experts() -> Made:
    """Wan 2.2 A14B: another transformer takes over below a noise level."""
    return _wan(diffusers.WanPipeline, parts={"transformer_2": sharp_transformer(5), "boundary_ratio": 0.8})


def wan_video_to_video() -> Made:
    made = _wan(diffusers.WanVideoToVideoPipeline, video=video(), strength=1.0)
    del made[1]["num_frames"]
    return made


def wan_image_to_video() -> Made:
    """Wan 2.1: the picture's features join the text."""
    config = dict(WAN[1].config, in_channels=12 + 4 + 12, out_channels=12)
    parts = {"image_encoder": None, "image_processor": None}
    return _seeing(_wan(diffusers.WanImageToVideoPipeline, config, parts, image=picture(), **_prompts(512, 64)))


def wan_first_last_frame() -> Made:
    """From a first frame to a last one."""
    config = {**TINY, "in_channels": 12 + 4 + 12}
    return _wan(
        diffusers.WanImageToVideoPipeline, config, {"image_encoder": None, "image_processor": None}, image=picture(),
        last_image=picture(color=COLORS[1]),
    )  # fmt: skip


def wan_image_to_video_22() -> Made:
    """Wan 2.2 TI2V: every token has its own timestep."""
    parts = {"expand_timesteps": True, "image_encoder": None, "image_processor": None}
    return _wan(diffusers.WanImageToVideoPipeline, None, parts, image=picture())


def wan_vace() -> Made:
    config = {**TINY, "vace_layers": [0, 2], "vace_in_channels": 12 * 2 + 64}
    transformer = _build(diffusers.WanVACETransformer3DModel, config)
    mask = [Image.new("L", (64, 64), 255 * (index > 4)) for index in range(17)]
    return _wan(diffusers.WanVACEPipeline, parts={"transformer": transformer}, video=video(), mask=mask)


def wan_vace_two_experts() -> Made:
    pipe, call = wan_vace()
    pipe.register_modules(transformer_2=_build(diffusers.WanVACETransformer3DModel, dict(pipe.transformer.config)))
    pipe.register_to_config(boundary_ratio=0.8)
    return pipe, call


def wan_image_two_experts() -> Made:
    pipe, call = wan_first_last_frame()
    pipe.register_modules(transformer_2=_build(diffusers.WanTransformer3DModel, dict(pipe.transformer.config)))
    pipe.register_to_config(boundary_ratio=0.8)
    return pipe, call


def lucy_edit() -> Made:
    return _wan(diffusers.LucyEditPipeline, {**TINY, "in_channels": 24}, video=video())


def chrono_edit() -> Made:
    config = dict(WAN[3].config, in_channels=12 + 4 + 12, out_channels=12, image_dim=24, added_kv_proj_dim=36)
    transformer = _build(diffusers.ChronoEditTransformer3DModel, config)
    parts = {"transformer": transformer, "image_encoder": None, "image_processor": None}
    return _seeing(_wan(diffusers.ChronoEditPipeline, parts=parts, image=picture(), **_prompts(512, 64)))


def _skyreels(cls: type, config: dict[str, Any], parts: dict[str, Any] | None = None, **call: Any) -> Made:
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = cls(
        tokenizer=None, text_encoder=None, vae=_wan_vae(16), scheduler=scheduler,
        transformer=_build(diffusers.SkyReelsV2Transformer3DModel, {**config, "out_channels": 16}), **(parts or {}),
    )  # fmt: skip
    return pipe, dict(SIZE, guidance_scale=3.0, **_prompts(width=64)) | call


def skyreels_image_to_video() -> Made:
    config = dict(WAN[1].config, in_channels=16 + 4 + 16)
    parts = {"image_encoder": None, "image_processor": None}
    return _seeing(
        _skyreels(diffusers.SkyReelsV2ImageToVideoPipeline, config, parts, image=picture(), **_prompts(512, 64))
    )


def skyreels_forced_image_to_video() -> Made:
    return _skyreels(
        diffusers.SkyReelsV2DiffusionForcingImageToVideoPipeline, dict(models.SKYREELS[1].config), image=picture(),
        base_num_frames=17, prompt=None,
    )  # fmt: skip


def skyreels_forced_video_to_video() -> Made:
    return _skyreels(
        diffusers.SkyReelsV2DiffusionForcingVideoToVideoPipeline, dict(models.SKYREELS[1].config), video=video(9),
        base_num_frames=17, overlap_history=5, num_frames=21, prompt=None,
    )  # fmt: skip
