"""Builds the embedded image pipeline's parts from tiny configs of Flux's own classes."""

from __future__ import annotations

from build import TEXT_WIDTH, build_tokenizer, small_t5
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

POOLED_WIDTH = 64
TEXT_LENGTH = 64
"""Tokens of a prompt with its pads, which Flux attends to: trained, and sampled, with this many."""

IMAGE_VAE_CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (24, 48, 64),
    "layers_per_block": 1,
    "latent_channels": 12,
    "norm_num_groups": 8,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
}
"""Four by four compression; Flux packs two by two latents into a token, which is eight pixels square."""

FLUX_CONFIG = {
    "patch_size": 1,
    "in_channels": 48,
    "num_layers": 4,
    "num_single_layers": 8,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "pooled_projection_dim": POOLED_WIDTH,
    "guidance_embeds": False,
    "axes_dims_rope": (8, 28, 28),
}


def build_clip(vocabulary_size: int) -> CLIPTextModel:
    """Return an untrained one-layer CLIP text model, whose pooled state steers Flux's modulation."""
    config = CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=POOLED_WIDTH,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=POOLED_WIDTH,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return CLIPTextModel(config)


def build_flux_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Return the scheduler that Flux's guidance-free pipelines sample with: a shift that grows with the tokens."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def build_flux_pipeline(vae: AutoencoderKL) -> FluxPipeline:
    """Return a pipeline with an untrained transformer and text encoders around a given autoencoder."""
    tokenizer, tokenizer_2 = build_tokenizer(), build_tokenizer()
    tokenizer.model_max_length = TEXT_LENGTH
    return FluxPipeline(
        scheduler=build_flux_scheduler(),
        vae=vae,
        text_encoder=build_clip(len(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(T5Config(**small_t5(len(tokenizer)))),
        tokenizer_2=tokenizer_2,
        transformer=FluxTransformer2DModel(**FLUX_CONFIG),
    )
