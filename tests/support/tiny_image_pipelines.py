"""Tiny image pipelines of diffusers' own classes around the tiny transformers; prompts come as embeddings."""

import inspect
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import diffusers
import tiny_image_models as tiny
import torch
from PIL import Image
from tiny_models import FLUX, FLUX_KIN_TINY, QWEN_IMAGE

SIZE = dict(height=128, width=160, num_inference_steps=3, output_type="latent")
Made = tuple[Any, dict[str, Any]]


def build(cls: type, config: dict[str, Any]) -> Any:
    """Build a tiny model; all-zero weights of an untrained model get values, as in the checks."""
    torch.manual_seed(0)
    model: Any = cls(**config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def vae(channels: int, **options: Any) -> Any:
    config = dict(
        latent_channels=channels, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **options,
    )  # fmt: skip
    return build(diffusers.AutoencoderKL, config)


def flow(**options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def assemble(cls: type, *, scheduler: Any, **parts: Any) -> Any:
    """Assemble a pipeline; encoders and tokenizers that are not given are None."""
    asked = inspect.signature(cls.__init__).parameters
    needed = [name for name, value in asked.items() if value.default is value.empty and name not in ("self", "kwargs")]
    pipe: Any = cls(**{**dict.fromkeys(needed), "scheduler": scheduler, **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(*shape: int, names: tuple[str, str] = ("prompt_embeds", "negative_prompt_embeds")) -> dict[str, Any]:
    torch.manual_seed(1)
    return {name: torch.randn(1, *(shape or (6, 16))) for name in names}


def masks(positive: str, negative: str, tokens: int = 6, dtype: torch.dtype = torch.bool) -> dict[str, Any]:
    mask = torch.arange(tokens)[None] < tokens - 1
    return {positive: mask.to(dtype), negative: (mask.roll(1) & mask).to(dtype)}


def picture(height: int = 128, width: int = 160) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.rand(1, 3, height, width)


def _flux(cls: type, channels: int = 4, **call: Any) -> Made:
    config = dict(FLUX[0].config, in_channels=channels, out_channels=4)
    pipe = assemble(
        cls, transformer=build(diffusers.FluxTransformer2DModel, config), vae=vae(1, shift_factor=0.1),
        scheduler=flow(),
    )  # fmt: skip
    prompt = dict(prompt_embeds=prompts()["prompt_embeds"], pooled_prompt_embeds=torch.randn(1, 8))
    return pipe, dict(SIZE, **prompt, **call)


def flux() -> Made:
    return _flux(diffusers.FluxPipeline, output_type="pt")


def flux_img2img() -> Made:
    return _flux(diffusers.FluxImg2ImgPipeline, image=picture(), strength=1.0)


def flux_fill() -> Made:
    mask = (torch.arange(160)[None, None, None] > 80).float().expand(1, 1, 128, 160)
    return _flux(diffusers.FluxFillPipeline, channels=4 + 4 + 256, image=picture(), mask_image=mask)


def flux_control() -> Made:
    return _flux(diffusers.FluxControlPipeline, channels=8, control_image=picture())


def flux_kontext() -> Made:
    return _flux(diffusers.FluxKontextPipeline, image=picture(32, 48), max_area=128 * 160, _auto_resize=False)


def flux_kin() -> Made:
    config = {**FLUX_KIN_TINY, "in_channels": 4, "out_channels": 4}
    del config["pooled_projection_dim"]
    pipe = assemble(
        diffusers.OvisImagePipeline, transformer=build(diffusers.OvisImageTransformer2DModel, config),
        vae=vae(1, shift_factor=0.1), scheduler=flow(),
    )  # fmt: skip
    return pipe, dict(SIZE, negative_prompt=None, **prompts())


def flux2_vae(channels: int = 1) -> Any:
    config = dict(
        latent_channels=channels, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    return build(diffusers.AutoencoderKLFlux2, config)


def _flux2(cls: type, **call: Any) -> Made:
    pipe = assemble(
        cls, transformer=build(diffusers.Flux2Transformer2DModel, tiny.FLUX2_TINY), vae=flux2_vae(), scheduler=flow()
    )
    return pipe, dict(SIZE, prompt_embeds=prompts()["prompt_embeds"], **call)


def flux2() -> Made:
    return _flux2(diffusers.Flux2Pipeline, output_type="pt")


def flux2_references() -> Made:
    return _flux2(diffusers.Flux2Pipeline, image=[pil(64, 64)])


def flux2_klein() -> Made:
    return _flux2(diffusers.Flux2KleinPipeline, negative_prompt_embeds=prompts()["negative_prompt_embeds"])


def flux2_klein_kv() -> Made:
    return _flux2(diffusers.Flux2KleinKVPipeline, image=[pil(64, 64)])


def pil(height: int, width: int, mode: str = "RGB") -> Any:
    torch.manual_seed(2)
    return Image.fromarray((torch.rand(height, width, 3) * 255).byte().numpy()).convert(mode)


def z_image() -> Made:
    pipe = assemble(
        diffusers.ZImagePipeline, transformer=build(diffusers.ZImageTransformer2DModel, tiny.Z_IMAGE_TINY),
        vae=vae(4, shift_factor=0.1), scheduler=flow(),
    )  # fmt: skip
    embeds = {name: [value[0]] for name, value in prompts().items()}
    return pipe, dict(SIZE, output_type="pt", **embeds)


def chroma() -> Made:
    pipe = assemble(
        diffusers.ChromaPipeline, transformer=build(diffusers.ChromaTransformer2DModel, tiny.CHROMA_TINY),
        vae=vae(1, shift_factor=0.1), scheduler=flow(),
    )  # fmt: skip
    valid = masks("prompt_attention_mask", "negative_prompt_attention_mask")
    return pipe, dict(SIZE, negative_prompt=None, **prompts(), **valid)


def qwen_vae(channels: int, **options: Any) -> Any:
    config = dict(
        base_dim=4, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels, **options,
    )  # fmt: skip
    return build(diffusers.AutoencoderKLQwenImage, config)


def krea2() -> Made:
    pipe = assemble(
        diffusers.Krea2Pipeline, transformer=build(diffusers.Krea2Transformer2DModel, tiny.KREA2_TINY),
        vae=qwen_vae(1), scheduler=flow(use_dynamic_shifting=True), text_encoder_select_layers=(1, 2),
    )  # fmt: skip
    return pipe, dict(SIZE, **prompts(6, 2, 16), **masks("prompt_embeds_mask", "negative_prompt_embeds_mask"))


def qwen(cls: type, **call: Any) -> Made:
    config = {**QWEN_IMAGE[0].config, **call.pop("config", {})}
    parts = {"vae": qwen_vae(1), "scheduler": flow(use_dynamic_shifting=True), **call.pop("parts", {})}
    pipe = assemble(cls, transformer=build(diffusers.QwenImageTransformer2DModel, config), **parts)
    valid = masks("prompt_embeds_mask", "negative_prompt_embeds_mask")
    return pipe, dict(SIZE, true_cfg_scale=2.0, **prompts(), **valid, **call)


def small_references(cls: type, size: tuple[Any, ...]) -> type:
    """Return the pipeline class with ``size`` where it would scale reference images to a million pixels."""

    class Small(cls):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with mock.patch.object(sys.modules[cls.__module__], "calculate_dimensions", return_value=size):
                return super().__call__(*args, **kwargs)

    return Small


def qwen_image() -> Made:
    return qwen(diffusers.QwenImagePipeline, output_type="pt")


def qwen_image_edit() -> Made:
    cls = small_references(diffusers.QwenImageEditPipeline, (48, 32, None))
    return qwen(cls, image=pil(128, 160), prompt=None)


PIPELINES: dict[str, Callable[[], Made]] = {
    "flux": flux, "flux-img2img": flux_img2img, "flux-fill": flux_fill, "flux-control": flux_control,
    "flux-kontext": flux_kontext, "flux-kin": flux_kin, "flux2": flux2, "flux2-references": flux2_references,
    "flux2-klein": flux2_klein, "flux2-klein-kv": flux2_klein_kv, "z-image": z_image, "chroma": chroma, "krea2": krea2,
    "qwen-image": qwen_image, "qwen-image-edit": qwen_image_edit,
}  # fmt: skip
"""Name -> maker of (pipeline, arguments of a call); the first part of the name is the adapter's."""


def generate(pipe: Any, call: dict[str, Any], **changes: Any) -> torch.Tensor:
    """Return the image, or its latents, of a run from one fixed noise."""
    torch.manual_seed(0)  # some encode references without the generator
    out = pipe(**{**call, "generator": torch.Generator().manual_seed(0), **changes})
    if isinstance(out, torch.Tensor):
        return out
    images = out.images if hasattr(out, "images") else out[0]
    return torch.stack(list(images)) if isinstance(images, list) else images
