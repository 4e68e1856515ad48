"""One prompt or two of a tiny pipeline in one call, each from its own noise, for tests of what a batch's rows get."""

from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import tiny_image_pipelines as images
import tiny_other_pipelines as others
import tiny_pipelines as videos
import tiny_video_pipelines as more_videos
import torch
from PIL import Image
from torch import Tensor
from wan_tiny import tiny_transformer

Made = tuple[Any, dict[str, Any]]


def _over(cls: type, name: str, **changes: Any) -> Made:
    """Another pipeline class over a tiny pipeline's parts."""
    pipe, call = (images.PIPELINES | others.PIPELINES)[name]()
    other = cls(**pipe.components)
    other.set_progress_bar_config(disable=True)
    return other, {**call, "output_type": "latent", **changes}


def _mask() -> Tensor:
    return (torch.arange(160) > 80).float().expand(1, 1, 128, 160)


def wan_video_to_video() -> Made:
    pipe = diffusers.WanVideoToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=more_videos._wan_vae(12), transformer=tiny_transformer(),
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    frames = [Image.new("RGB", (64, 64), (40 * at % 255, 90, 160)) for at in range(9)]
    torch.manual_seed(1)
    texts = dict(prompt_embeds=torch.randn(1, 6, 64), negative_prompt_embeds=torch.randn(1, 6, 64))
    return pipe, dict(
        video=frames, height=64, width=64, num_inference_steps=4, strength=0.9, guidance_scale=3.0, **texts
    )


def flux_true_guidance(name: str = "flux-img2img") -> Made:
    pipe, call = images.PIPELINES[name]()
    negative = dict(negative_prompt_embeds=torch.ones(1, 6, 16), negative_pooled_prompt_embeds=torch.ones(1, 8))
    return pipe, {**call, "true_cfg_scale": 2.0, **negative}


PIPELINES: dict[str, Callable[[], Made]] = {
    **videos.PIPELINES,
    **others.PIPELINES,
    **more_videos.PIPELINES,
    "wan-v2v": wan_video_to_video,
    "flux-img2img, two calls": flux_true_guidance,
    "flux-kontext, two calls": lambda: flux_true_guidance("flux-kontext"),
    "flux-inpaint": lambda: _over(
        diffusers.FluxInpaintPipeline, "flux", image=images.picture(), mask_image=_mask(), strength=1.0
    ),
    "sd3-img2img": lambda: _over(
        diffusers.StableDiffusion3Img2ImgPipeline, "sd3", image=images.picture(), strength=1.0, height=128, width=160
    ),
    "sd3, guidance off": lambda: _over(diffusers.StableDiffusion3Pipeline, "sd3", guidance_scale=1.0),
    "chroma-img2img": lambda: _over(diffusers.ChromaImg2ImgPipeline, "chroma", image=images.picture(), strength=1.0),
}
"""Name -> maker of (pipeline, arguments of a call): those of the other modules, and more that open no context."""

ONE_PROMPT = {
    "qwen-image-edit-plus": "it takes one prompt",
    "qwen-image-layered": "it takes one prompt",
    "glm-image-references": "it takes a list of images for each prompt",
    "bria-fibo": "it makes one picture of all prompts",
    "prx": "its own mask does not fit two prompts that are given as embeddings",
    "joyimage-edit": "its two rows differ from each alone, with nothing attached",
    "joyimage-edit-plus": "it takes a list of images for each prompt",
    "framepack": "it takes one image",
    "kandinsky-6": "it takes one image",
    "minimax-h3": "it packs one prompt",
    "cosmos-3": "it packs one prompt",
}
"""Name -> why no two prompts are tried in one call."""

_ROW_AXIS = {"prompt_embeds_llama3": 1, "negative_prompt_embeds_llama3": 1}
_TEXTS = {"prompt": ("", "a red kite"), "bria-fibo": ("{}", '{"a": "red kite"}')}


def with_prompts(name: str, call: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Return a call with prompts of one or two: row 0 is the call's own, row 1 another."""

    def several(key: str, value: Any) -> Any:
        if isinstance(value, str) and key == "prompt":
            return [_TEXTS.get(name, _TEXTS["prompt"])[row] for row in rows]
        if isinstance(value, str) and key == "negative_prompt":
            return [value for _ in rows]
        if isinstance(value, list) and "embeds" in key:
            return [value[0] if row == 0 else _other(key, value[0]) for row in rows]
        if key == "prior_token_ids" or (isinstance(value, Tensor) and ("prompt" in key or "image" in key)):
            axis = _ROW_AXIS.get(key, 0)
            return torch.cat([value if row == 0 else _other(key, value) for row in rows], dim=axis)
        return value

    changed = {key: several(key, value) for key, value in call.items()}
    for sign in ("", "negative_"):  # Kandinsky's packed texts
        if (key := f"{sign}prompt_cu_seqlens") in call:
            changed[key] = call[key][-1] * torch.arange(len(rows) + 1, dtype=call[key].dtype)
    return changed


def _other(key: str, value: Tensor) -> Tensor:
    return value.flip(-1) if "embeds" in key and "negative" not in key and value.is_floating_point() else value


def run(name: str, pipe: Any, call: dict[str, Any], rows: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Return the latents of some prompts, each from the noise of its seed."""
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)  # some encode references without the generator
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    given = {**with_prompts(name, call, rows), "generator": noise if len(noise) > 1 else noise[0]}
    if "output" not in given:
        given["output_type"] = "latent"
    made = pipe(**given)
    parts = (getattr(made, kind, None) for kind in ("images", "frames", "video"))
    found = next((one for one in parts if one is not None), made)
    return (torch.stack(list(found)) if isinstance(found, list) else found).float()
