"""Tiny pipelines of diffusers' own classes around the tiny video transformers; prompts come as embeddings."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import tiny_video_models as models
import torch
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.minimax_h3 import before_denoise
from diffusers.modular_pipelines.minimax_h3.denoise import MiniMaxH3DenoiseStep
from diffusers.modular_pipelines.minimax_h3.modular_pipeline import MiniMaxH3ModularPipeline
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from PIL import Image

SIZE = dict(height=64, width=128, num_frames=25, num_inference_steps=4)
EULER = diffusers.FlowMatchEulerDiscreteScheduler


def _build(cls: type, config: dict[str, Any]) -> Any:
    """A model from a fixed seed, its gates opened: some start at zero, which would hide all that attention does."""
    torch.manual_seed(0)
    model = cls(**config).eval()
    for parameter in model.parameters():
        if not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def _prompts(tokens: int = 6, width: int = 16, **names: str) -> dict[str, Any]:
    """Embeddings of a prompt and of a negative prompt."""
    torch.manual_seed(1)
    return {
        f"{sign}{names.get('embeds', 'prompt_embeds')}": torch.randn(1, tokens, width) for sign in ("", "negative_")
    }


def _masked(mask: str = "prompt_attention_mask", dtype: torch.dtype = torch.long, tokens: int = 6) -> dict[str, Any]:
    """Masks of a prompt and of a shorter negative prompt."""
    rows = (torch.arange(tokens)[None] < tokens - 1).to(dtype), (torch.arange(tokens)[None] < tokens - 2).to(dtype)
    return {mask: rows[0], f"negative_{mask}": rows[1]}


def _wan_vae(channels: int) -> Any:
    return _build(
        diffusers.AutoencoderKLWan,
        dict(
            base_dim=4, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
        ),
    )  # fmt: skip


def _hunyuan_vae() -> Any:
    config = dict(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    )  # fmt: skip
    return _build(diffusers.AutoencoderKLHunyuanVideo, config)


def skyreels_v2() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.SkyReelsV2Pipeline(
        tokenizer=None, text_encoder=None, vae=_wan_vae(16), scheduler=diffusers.UniPCMultistepScheduler(),
        transformer=_build(diffusers.SkyReelsV2Transformer3DModel, dict(models.SKYREELS[0].config, out_channels=16)),
    )  # fmt: skip
    return pipe, dict(SIZE, guidance_scale=3.0, **_prompts(width=64))


def skyreels_v2_forced() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.SkyReelsV2DiffusionForcingPipeline(
        tokenizer=None, text_encoder=None, vae=_wan_vae(16),
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        transformer=_build(diffusers.SkyReelsV2Transformer3DModel, dict(models.SKYREELS[1].config, out_channels=16)),
    )  # fmt: skip
    return pipe, dict(SIZE, prompt=None, guidance_scale=3.0, base_num_frames=25, **_prompts(width=64))


def wan_animate() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.WanAnimatePipeline(
        tokenizer=None, text_encoder=None, image_processor=None, image_encoder=None, vae=_wan_vae(4),
        scheduler=EULER(), transformer=_build(diffusers.WanAnimateTransformer3DModel, models.WAN_ANIMATE[0].config),
    )  # fmt: skip
    pipe.encode_image = lambda *args: torch.ones(1, 7, 24)
    picture, face = Image.new("RGB", (128, 64), (90, 40, 10)), Image.new("RGB", (16, 16), (10, 40, 90))
    return pipe, dict(
        image=picture, pose_video=[picture] * 21, face_video=[face] * 21, segment_frame_length=21, height=64, width=128,
        num_inference_steps=4, **_prompts(512, 64),
    )  # fmt: skip


def hunyuan_video15() -> tuple[Any, dict[str, Any]]:
    vae = dict(latent_channels=2, block_out_channels=(8,) * 5, layers_per_block=1)
    pipe = diffusers.HunyuanVideo15Pipeline(
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, scheduler=EULER(),
        vae=_build(diffusers.AutoencoderKLHunyuanVideo15, vae), guider=diffusers.ClassifierFreeGuidance(3.0),
        transformer=_build(
            diffusers.HunyuanVideo15Transformer3DModel, dict(models.HUNYUAN15_TINY, in_channels=5, out_channels=2)
        ),
    )  # fmt: skip
    pipe.vision_num_semantic_tokens, pipe.vision_states_dim = 3, 8
    prompts = _prompts() | _masked("prompt_embeds_mask") | _prompts(5, 12, embeds="prompt_embeds_2")
    return pipe, dict(SIZE, **prompts, **_masked("prompt_embeds_mask_2", tokens=5))


def framepack() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.HunyuanVideoFramepackPipeline(
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, image_encoder=None,
        feature_extractor=None, vae=_hunyuan_vae(), scheduler=EULER(shift=7.0),
        transformer=_build(diffusers.HunyuanVideoFramepackTransformer3DModel, models.FRAMEPACK_TINY),
    )  # fmt: skip
    pipe.encode_image = lambda *args, **kwargs: torch.ones(1, 3, 8)
    pooled = dict(pooled_prompt_embeds=torch.randn(1, 8), negative_pooled_prompt_embeds=torch.randn(1, 8))
    return pipe, dict(
        SIZE, image=Image.new("RGB", (128, 64), (90, 40, 10)), latent_window_size=7, true_cfg_scale=2.0,
        **_prompts(), **_masked(), **pooled,
    )  # fmt: skip


def kandinsky5() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.Kandinsky5T2VPipeline(
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, vae=_hunyuan_vae(),
        scheduler=EULER(), transformer=_build(diffusers.Kandinsky5Transformer3DModel, models.KANDINSKY5_TINY),
    )  # fmt: skip
    prompts = dict(prompt_embeds_clip=torch.randn(1, 8), negative_prompt_embeds_clip=torch.randn(1, 8))
    prompts |= dict(prompt_cu_seqlens=torch.tensor([0, 6]), negative_prompt_cu_seqlens=torch.tensor([0, 6]))
    return pipe, dict(SIZE, guidance_scale=3.0, **_prompts(embeds="prompt_embeds_qwen"), **prompts)


def motif_video() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.MotifVideoPipeline(
        text_encoder=None, tokenizer=None, vae=_wan_vae(4), scheduler=EULER(),
        guider=diffusers.ClassifierFreeGuidance(3.0),
        transformer=_build(
            diffusers.MotifVideoTransformer3DModel, dict(models.MOTIF_TINY, in_channels=9, image_embed_dim=None)
        ),
    )  # fmt: skip
    return pipe, dict(SIZE, **_prompts(), **_masked())


def helios() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.HeliosPipeline(
        text_encoder=None, tokenizer=None, vae=_wan_vae(4), scheduler=diffusers.HeliosScheduler(stages=1),
        transformer=_build(diffusers.HeliosTransformer3DModel, models.HELIOS_TINY),
    )  # fmt: skip
    return pipe, dict(SIZE, guidance_scale=3.0, num_latent_frames_per_chunk=7, history_sizes=[4, 2, 1], **_prompts())


def anyflow() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.AnyFlowPipeline(
        text_encoder=None, tokenizer=None, vae=_wan_vae(4), scheduler=diffusers.FlowMapEulerDiscreteScheduler(),
        transformer=_build(diffusers.AnyFlowTransformer3DModel, models.ANYFLOW_TINY),
    )  # fmt: skip
    return pipe, dict(SIZE, prompt_embeds=torch.randn(1, 6, 16))


def easyanimate() -> tuple[Any, dict[str, Any]]:
    vae = dict(latent_channels=4, block_out_channels=[4] * 4, layers_per_block=1, norm_num_groups=2)
    pipe = diffusers.EasyAnimatePipeline(
        text_encoder=None, tokenizer=None, vae=_build(diffusers.AutoencoderKLMagvit, vae), scheduler=EULER(),
        transformer=_build(diffusers.EasyAnimateTransformer3DModel, models.EASYANIMATE_TINY),
    )  # fmt: skip
    return pipe, dict(SIZE, guidance_scale=3.0, **_prompts(), **_masked())


def allegro() -> tuple[Any, dict[str, Any]]:
    vae = dict(latent_channels=4, block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2)
    pipe = diffusers.AllegroPipeline(
        text_encoder=None, tokenizer=None, vae=_build(diffusers.AutoencoderKLAllegro, vae),
        scheduler=diffusers.DDIMScheduler(),
        transformer=_build(diffusers.AllegroTransformer3DModel, models.ALLEGRO_TINY),
    )  # fmt: skip
    return pipe, dict(SIZE, num_frames=28, guidance_scale=3.0, negative_prompt=None, **_prompts(), **_masked())


class Unguarded:
    """Stands in for Cosmos' guard models, without which its pipelines refuse to run; its prompts are noise."""

    def to(self, device: Any) -> "Unguarded":
        """Stay where it is."""
        return self

    def check_video_safety(self, frames: Any) -> Any:
        """Let all through."""
        return frames


def cosmos() -> tuple[Any, dict[str, Any]]:
    vae = dict(
        latent_channels=4, encoder_block_out_channels=(8,) * 4, decode_block_out_channels=(8,) * 4, num_layers=1,
        attention_resolutions=(8,), resolution=64, patch_size=4, latents_mean=None, latents_std=None,
        temporal_compression_ratio=4,
    )  # fmt: skip
    pipe = diffusers.CosmosTextToWorldPipeline(
        text_encoder=None, tokenizer=None, vae=_build(diffusers.AutoencoderKLCosmos, vae), safety_checker=Unguarded(),
        scheduler=diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5),
        transformer=_build(diffusers.CosmosTransformer3DModel, models.COSMOS_TINY),
    )  # fmt: skip
    return pipe, dict(SIZE, guidance_scale=3.0, **_prompts())


class Letters:
    """Stands in for Cosmos 3's tokenizer: a token is a letter."""

    eos_token_id = 1

    def convert_tokens_to_ids(self, token: str) -> int:
        """Return the one special token that is asked for."""
        return 2

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        """Return the tokens of what the user says."""
        return SimpleNamespace(input_ids=[3 + ord(letter) % 17 for letter in conversation[-1]["content"]])


def cosmos3() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.Cosmos3OmniPipeline(
        text_tokenizer=Letters(), vae=_wan_vae(4), enable_safety_checker=False,
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        transformer=_build(diffusers.Cosmos3OmniTransformer, models.COSMOS3_TINY),
    )  # fmt: skip
    options = dict(add_resolution_template=False, add_duration_template=False, use_system_prompt=False)
    return pipe, dict(SIZE, prompt="a red kite", negative_prompt="dull", guidance_scale=3.0, **options)


def ltx2() -> tuple[Any, dict[str, Any]]:
    vae = dict(
        latent_channels=4, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 3,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 4, patch_size=2, spatial_compression_ratio=8,
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False),
        temporal_compression_ratio=2, downsample_type=("spatiotemporal", "spatial", "spatial", "spatial"),
    )  # fmt: skip
    connectors = dict(
        caption_channels=16, text_proj_in_factor=1, video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8, video_connector_num_layers=1, audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8, audio_connector_num_layers=1,
        video_connector_num_learnable_registers=None, audio_connector_num_learnable_registers=None,
    )  # fmt: skip
    sound = dict(base_channels=4, ch_mult=(1,), num_res_blocks=1, latent_channels=2, mel_bins=8)
    pipe = diffusers.LTX2Pipeline(
        text_encoder=None, tokenizer=None, scheduler=EULER(), vae=_build(diffusers.AutoencoderKLLTX2Video, vae),
        audio_vae=_build(diffusers.AutoencoderKLLTX2Audio, sound), vocoder=None,
        connectors=_build(LTX2TextConnectors, connectors),
        transformer=_build(
            diffusers.LTX2VideoTransformer3DModel,
            dict(models.LTX2_TINY, perturbed_attn=True, audio_in_channels=4, audio_out_channels=4),
        ),
    )  # fmt: skip
    return pipe, dict(
        SIZE, height=32, width=64, num_frames=13, guidance_scale=3.0, stg_scale=1.0, modality_scale=2.0,
        guidance_rescale=0.0, audio_guidance_rescale=0.0,  # with a rescale, methods of guidance are refused
        spatio_temporal_guidance_blocks=[1], use_cross_timestep=False, **_prompts(), **_masked(),
    )  # fmt: skip


def kandinsky6() -> tuple[Any, dict[str, Any]]:
    sound = dict(mel_bins=8, latent_channels=5, hidden_channels=8, channel_multipliers=(1, 1), layers_per_block=1)
    voice = dict(
        num_mels=8, upsample_initial_channel=8, upsample_rates=(2, 2), upsample_kernel_sizes=(4, 4),
        resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1, 3, 5),),
    )  # fmt: skip
    pipe = diffusers.Kandinsky6TI2VAPipeline(
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, vae=_hunyuan_vae(),
        scheduler=EULER(), audio_vae=_build(diffusers.MMAudioVAE, sound),
        vocoder=_build(diffusers.MMAudioVocoder, voice),
        transformer=_build(diffusers.Kandinsky6Transformer3DModel, models.KANDINSKY6_TINY | dict(visual_cond=True)),
    )  # fmt: skip
    pooled = dict(pooled_prompt_embeds=torch.randn(1, 8), negative_pooled_prompt_embeds=torch.randn(1, 8))
    return pipe, dict(SIZE, image=Image.new("RGB", (128, 64), (90, 40, 10)), guidance_scale=3.0, **_prompts(), **pooled)


class Made:
    """A modular pipeline that is called as the others are."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.components = pipe.components
        self.scheduler = pipe.scheduler

    def set_progress_bar_config(self, **options: Any) -> None:
        """Pass on."""
        self.pipe.set_progress_bar_config(**options)

    def __call__(self, output_type: str, **call: Any) -> Any:
        """Return the rows of the video."""
        return SimpleNamespace(frames=self.pipe(**call, output="latents"))


def minimax_h3() -> tuple[Any, dict[str, Any]]:
    blocks = SequentialPipelineBlocks.from_blocks_dict(
        {
            "layout": before_denoise.MiniMaxH3PrepareLayoutStep(),
            "latents": before_denoise.MiniMaxH3PrepareLatentsStep(),
            "timesteps": before_denoise.MiniMaxH3SetTimestepsStep(),
            "denoise": MiniMaxH3DenoiseStep(),
        }
    )
    pipe = MiniMaxH3ModularPipeline(blocks=blocks)
    config = dict(models.MINIMAX_TINY, in_channels=24, audio_in_channels=32)
    pipe.update_components(
        transformer=_build(diffusers.MiniMaxH3Transformer3DModel, config),
        scheduler=diffusers.MiniMaxH3Scheduler(), audio_scheduler=diffusers.MiniMaxH3Scheduler(shift=3.0),
    )  # fmt: skip
    return Made(pipe), dict(
        prompt_embeds=torch.randn(1, 6, 16), text_token_tags=torch.ones(6, dtype=torch.long), height=64, width=128,
        num_frames=124, num_inference_steps=4,
    )  # fmt: skip


PIPELINES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "hunyuan-video-1.5": hunyuan_video15, "wan-animate": wan_animate, "skyreels-v2": skyreels_v2,
    "skyreels-v2 forced": skyreels_v2_forced, "kandinsky-5": kandinsky5, "framepack": framepack,
    "ltx-2": ltx2, "minimax-h3": minimax_h3, "kandinsky-6": kandinsky6, "cosmos": cosmos, "cosmos-3": cosmos3,
    "motif-video": motif_video, "helios": helios, "easyanimate": easyanimate, "allegro": allegro, "anyflow": anyflow,
}  # fmt: skip
"""Adapter name, and a variant -> maker of (pipeline, arguments of a call)."""


def generate(pipe: Any, call: dict[str, Any], **changes: Any) -> torch.Tensor:
    """Return the latents, or what ``output_type`` asks for, of a run from one fixed noise."""
    pipe.set_progress_bar_config(disable=True)
    made = pipe(**{"output_type": "latent", **call, "generator": torch.Generator().manual_seed(0), **changes})
    video = next(value for value in (getattr(made, "frames", None), getattr(made, "video", None)) if value is not None)
    return video if isinstance(video, torch.Tensor) else video[-1]
