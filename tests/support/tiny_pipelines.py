"""Tiny pipelines of diffusers' own classes around the tiny transformers; prompts come as embeddings."""

from typing import Any

import diffusers
import torch
from tiny_models import COGVIDEOX_TINY, HUNYUAN_TINY, LTX, MOCHI

SIZE = dict(height=64, width=128, num_inference_steps=4, output_type="pt")


def _build(cls: type, config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return cls(**config).eval()


def _prompt(tokens: int = 6) -> dict[str, Any]:
    """A prompt and a negative prompt with padding, of different lengths."""
    torch.manual_seed(1)
    mask = torch.arange(tokens)[None] < tokens - 1
    return dict(
        prompt_embeds=torch.randn(1, tokens, 16), prompt_attention_mask=mask,
        negative_prompt_embeds=torch.randn(1, tokens, 16), negative_prompt_attention_mask=mask.roll(1) & mask,
    )  # fmt: skip


def hunyuan_video() -> tuple[Any, dict[str, Any]]:
    vae = dict(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    )  # fmt: skip
    pipe = diffusers.HunyuanVideoPipeline(
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        transformer=_build(diffusers.HunyuanVideoTransformer3DModel, HUNYUAN_TINY),
        vae=_build(diffusers.AutoencoderKLHunyuanVideo, vae),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip
    prompt = {name: value.long() if "mask" in name else value for name, value in _prompt().items()}
    pooled = dict(pooled_prompt_embeds=torch.randn(1, 8), negative_pooled_prompt_embeds=torch.randn(1, 8))
    return pipe, dict(SIZE, num_frames=25, true_cfg_scale=2.0, **prompt, **pooled)


def mochi() -> tuple[Any, dict[str, Any]]:
    vae = dict(encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5)
    pipe = diffusers.MochiPipeline(
        text_encoder=None, tokenizer=None,
        transformer=_build(diffusers.MochiTransformer3DModel, dict(MOCHI[0].config, in_channels=12)),
        vae=_build(diffusers.AutoencoderKLMochi, vae),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    )  # fmt: skip
    return pipe, dict(SIZE, num_frames=37, guidance_scale=3.0, **_prompt())


def cogvideox(config: dict[str, Any] = COGVIDEOX_TINY) -> tuple[Any, dict[str, Any]]:
    vae = dict(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    )  # fmt: skip
    pipe = diffusers.CogVideoXPipeline(
        text_encoder=None, tokenizer=None,
        transformer=_build(diffusers.CogVideoXTransformer3DModel, config),
        vae=_build(diffusers.AutoencoderKLCogVideoX, vae), scheduler=diffusers.CogVideoXDDIMScheduler(),
    )  # fmt: skip
    prompt = {name: value for name, value in _prompt().items() if "mask" not in name}
    return pipe, dict(SIZE, num_frames=25, guidance_scale=3.0, max_sequence_length=6, **prompt)


def ltx(pipeline: type = diffusers.LTXPipeline, **call: Any) -> tuple[Any, dict[str, Any]]:
    vae = dict(
        latent_channels=4, block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, False, False), patch_size=1,
        decoder_spatio_temporal_scaling=(True, True, False, False), patch_size_t=1,
    )  # fmt: skip
    pipe = pipeline(
        text_encoder=None, tokenizer=None,
        transformer=_build(diffusers.LTXVideoTransformer3DModel, dict(LTX[0].config)),
        vae=_build(diffusers.AutoencoderKLLTXVideo, vae), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    return pipe, dict(SIZE, **dict(height=32, width=32, num_frames=25, guidance_scale=3.0) | call, **_prompt())


def ltx_condition() -> tuple[Any, dict[str, Any]]:
    """Places its tokens by coordinates."""
    return ltx(diffusers.LTXConditionPipeline)


PIPELINES = {
    "hunyuan-video": hunyuan_video, "mochi": mochi, "cogvideox": cogvideox, "ltx": ltx, "ltx condition": ltx_condition,
}  # fmt: skip
"""Adapter name -> maker of (pipeline, arguments of a call)."""


def generate(pipe: Any, call: dict[str, Any], **changes: Any) -> torch.Tensor:
    """Return the frames of a run from one fixed noise."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(**{**call, "generator": torch.Generator().manual_seed(0), **changes}).frames
