"""The pipelines that can be trained: Wan, HunyuanVideo, Mochi and LTX, each as its own call encodes and denoises."""

from typing import Any

import torch
from torch import Tensor

from dit_accel.adapters.model_files import ModelFiles
from dit_accel.errors import UnsupportedModel

from ..generation.pipeline_call import CallSignature
from .trainable import Text, Trainable

EMBEDDED_GUIDANCE = 1.0
"""At which HunyuanVideo is trained: its velocity of the data is the unguided one, and others are distilled from it."""

REASONS = {
    "CogVideoXPipeline": "its model predicts v on a schedule of betas, and flow matching trains a velocity",
    "AllegroPipeline": "its noise is a schedule of betas, and flow matching trains a velocity",
}
"""Name of a pipeline class of video -> why it is not trained."""


@torch.no_grad()
def _encoded(pipe: Any, video: Tensor) -> Tensor:
    return pipe.vae.encode(video.to(pipe.vae.device, pipe.vae.dtype)).latent_dist.mode().float()


def _normalised(latents: Tensor, mean: Any, std: Any, scale: float = 1.0) -> Tensor:
    """Return latents less the mean of each channel, over its deviation; either as numbers or a tensor."""
    mean, std = (torch.as_tensor(part, device=latents.device).float().view(1, -1, 1, 1, 1) for part in (mean, std))
    return (latents - mean) * scale / std


def _longest(pipe: Any) -> int:
    return CallSignature.of(type(pipe)).default("max_sequence_length")


@torch.no_grad()
def _t5(pipe: Any, caption: str) -> tuple[Tensor, ...]:
    """Encode a caption by a pipeline of one T5 encoder: embeddings, and what else it has."""
    return pipe.encode_prompt(
        caption, do_classifier_free_guidance=False, max_sequence_length=_longest(pipe), device=pipe.text_encoder.device
    )


def _masked_text(pipe: Any, caption: str) -> Text:
    embeds, mask, *_ = _t5(pipe, caption)
    return {"prompt_embeds": embeds, "prompt_attention_mask": mask}


def _wan_latents(pipe: Any, video: Tensor) -> Tensor:
    return _normalised(_encoded(pipe, video), pipe.vae.config.latents_mean, pipe.vae.config.latents_std)


def _wan_text(pipe: Any, caption: str) -> Text:
    return {"prompt_embeds": _t5(pipe, caption)[0]}


def _wan_velocity(transformer: Any, pipe: Any, noisy: Tensor, levels: Tensor, text: Text) -> Tensor:
    time = 1000 * levels
    if pipe.config.get("expand_timesteps"):  # Wan 2.2 TI2V: one for each token, which differ where a picture is given
        patch = transformer.config.patch_size
        tokens = [size // step for size, step in zip(noisy.shape[2:], patch, strict=True)]
        time = time[:, None].expand(-1, tokens[0] * tokens[1] * tokens[2])
    return transformer(
        hidden_states=noisy, timestep=time, encoder_hidden_states=text["prompt_embeds"], return_dict=False
    )[0]


def _hunyuan_latents(pipe: Any, video: Tensor) -> Tensor:
    return _encoded(pipe, video) * pipe.vae.config.scaling_factor


@torch.no_grad()
def _hunyuan_text(pipe: Any, caption: str) -> Text:
    embeds, pooled, mask = pipe.encode_prompt(
        caption, max_sequence_length=_longest(pipe), device=pipe.text_encoder.device
    )
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "prompt_attention_mask": mask}


def _hunyuan_velocity(transformer: Any, pipe: Any, noisy: Tensor, levels: Tensor, text: Text) -> Tensor:
    return transformer(
        hidden_states=noisy,
        timestep=1000 * levels,
        encoder_hidden_states=text["prompt_embeds"],
        encoder_attention_mask=text["prompt_attention_mask"].to(noisy.dtype),
        pooled_projections=text["pooled_prompt_embeds"],
        guidance=torch.full_like(levels, 1000 * EMBEDDED_GUIDANCE, dtype=noisy.dtype),
        return_dict=False,
    )[0]


def _mochi_latents(pipe: Any, video: Tensor) -> Tensor:
    latents, config = _encoded(pipe, video), pipe.vae.config
    if config.latents_mean is None or config.latents_std is None:
        return latents * config.scaling_factor
    return _normalised(latents, config.latents_mean, config.latents_std, config.scaling_factor)


def _mochi_velocity(transformer: Any, pipe: Any, noisy: Tensor, levels: Tensor, text: Text) -> Tensor:
    """Mochi's time runs from noise to the clip, and its velocity leads there."""
    return -transformer(
        hidden_states=noisy,
        timestep=1000 * (1 - levels),
        encoder_hidden_states=text["prompt_embeds"],
        encoder_attention_mask=text["prompt_attention_mask"],
        return_dict=False,
    )[0]


def _ltx_latents(pipe: Any, video: Tensor) -> Tensor:
    vae = pipe.vae
    return _normalised(_encoded(pipe, video), vae.latents_mean, vae.latents_std, vae.config.scaling_factor)


def _ltx_velocity(transformer: Any, pipe: Any, noisy: Tensor, levels: Tensor, text: Text) -> Tensor:
    """LTX takes tokens, and their places in seconds (at its call's own frame rate) and pixels."""
    frames, height, width = noisy.shape[2:]
    patches = pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size
    pixels = pipe.vae_spatial_compression_ratio
    seconds = pipe.vae_temporal_compression_ratio / CallSignature.of(type(pipe)).default("frame_rate")
    velocity = transformer(
        hidden_states=pipe._pack_latents(noisy, *patches),
        timestep=1000 * levels,
        encoder_hidden_states=text["prompt_embeds"],
        encoder_attention_mask=text["prompt_attention_mask"],
        num_frames=frames,
        height=height,
        width=width,
        rope_interpolation_scale=(seconds, pixels, pixels),
        return_dict=False,
    )[0]
    return pipe._unpack_latents(velocity, frames, height, width, *patches)


TRAINABLE = {
    "WanPipeline": Trainable(latents=_wan_latents, text=_wan_text, velocity=_wan_velocity),
    "HunyuanVideoPipeline": Trainable(
        latents=_hunyuan_latents, text=_hunyuan_text, velocity=_hunyuan_velocity, joined_output="proj_out"
    ),
    "MochiPipeline": Trainable(latents=_mochi_latents, text=_masked_text, velocity=_mochi_velocity),
    "LTXPipeline": Trainable(latents=_ltx_latents, text=_masked_text, velocity=_ltx_velocity),
}
"""Name of a pipeline class -> how it is trained."""


def trainable_of(files: ModelFiles) -> Trainable:
    """Find how a model's pipeline is trained."""
    name = str(files.index.get("_class_name"))
    if name not in TRAINABLE:
        why = f" ({REASONS[name]})" if name in REASONS else ""
        raise UnsupportedModel(
            f"{files.name} is made for {name}, which finetune can't train{why}; it trains {', '.join(TRAINABLE)}"
        )
    return TRAINABLE[name]
