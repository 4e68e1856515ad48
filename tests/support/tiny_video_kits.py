"""What the tiny video pipelines of `tiny_stock` are assembled of, a function a family; prompts come as embeddings."""

from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.minimax_h3 import before_denoise
from diffusers.modular_pipelines.minimax_h3.denoise import MiniMaxH3DenoiseStep
from diffusers.modular_pipelines.minimax_h3.modular_pipeline import MiniMaxH3ModularPipeline
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from PIL import Image
from tiny_models import MODELS
from tiny_parts import (
    COLORS,
    EULER,
    GUIDED,
    VIDEO_SIZE,
    Kit,
    Letters,
    Unguarded,
    answering,
    block_vae,
    build,
    clip,
    drawing,
    masked,
    masks,
    noise_clip,
    prompts,
    tiny,
    tiny_video,
    wan_vae,
)  # fmt: skip
from wan_tiny import sharp_transformer

WAN_SIZE = dict(GUIDED, width=64, num_frames=17)
PICTURE = dict(image=drawing(64, 128))
SEEN = answering("encode_image", lambda *_: torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(4)))
"""Every picture has the same features."""
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)


def kit(transformer: Any, vae: Any, call: dict[str, Any], scheduler: Any = None, **parts: Any) -> Kit:
    """A kit of a video family: a flow scheduler unless told."""
    parts |= dict(transformer=transformer, vae=vae, scheduler=scheduler or EULER())
    return Kit(parts, {**VIDEO_SIZE, **call})


def padded(name: str = "prompt_attention_mask", tokens: int = 6) -> dict[str, Any]:
    """Masks of whole numbers."""
    return masks(name, tokens, torch.long)


def pooled() -> dict[str, Any]:
    return prompts(8, name="pooled_prompt_embeds")


# Wan and those made of it


def wan(channels: int = 12, model: Any = None, **call: Any) -> Kit:
    parts = dict(boundary_ratio=None, image_encoder=None, image_processor=None, expand_timesteps=False)
    call = {**WAN_SIZE, **prompts(6, 64), **call}
    return kit(model or sharp_transformer(), wan_vae(channels), call, EULER(shift=3.0), **parts)


def lucy_edit() -> Kit:
    return wan(model=tiny_video("wan", 0, in_channels=24), video=clip())


def wan_two_experts() -> Kit:
    """Wan 2.2 A14B: another transformer takes over below a noise level."""
    return wan().but(transformer_2=sharp_transformer(5), boundary_ratio=0.8)


def wan_image() -> Kit:
    """Wan 2.1: the picture's features join the text."""
    made = wan(model=tiny_video("wan", 1, in_channels=12 + 4 + 12), image=drawing(), **prompts(512, 64))
    made.setup = SEEN
    return made


def wan_first_last_frame() -> Kit:
    """From a first frame to a last one."""
    model = tiny_video("wan", 0, in_channels=12 + 4 + 12)
    return wan(model=model, image=drawing(), last_image=drawing(color=COLORS[1]))


def wan_image_22() -> Kit:
    """Wan 2.2 TI2V: every token has its own timestep."""
    return wan(image=drawing()).but(expand_timesteps=True)


def wan_vace() -> Kit:
    shown = [Image.new("L", (64, 64), 255 * (index > 4)) for index in range(17)]
    return wan(model=tiny_video("wan", 2, vace_in_channels=12 * 2 + 64), video=clip(), mask=shown)


def both_experts(kit: Kit) -> Kit:
    """Let a second transformer of the same kind take over below a noise level."""
    first = kit.parts["transformer"]
    second = build(type(first), first.config, 0.2, biases=True)
    return kit.but(transformer_2=second, boundary_ratio=0.8)


def chrono_edit() -> Kit:
    config = dict(in_channels=12 + 4 + 12, out_channels=12, image_dim=24, added_kv_proj_dim=36)
    made = wan(model=tiny_video("wan", 3, **config), image=drawing(), **prompts(512, 64))
    made.setup = SEEN
    return made


def wan_animate() -> Kit:
    call = dict(
        image=drawing(64, 128), pose_video=[drawing(64, 128)] * 21, face_video=[drawing(16, 16)] * 21,
        segment_frame_length=21, **prompts(512, 64),
    )  # fmt: skip
    made = kit(tiny_video("wan-animate"), wan_vae(4), call)
    made.setup = SEEN
    return made


def skyreels(number: int = 0, **call: Any) -> Kit:
    model, scheduler = tiny_video("skyreels-v2", number, out_channels=16), diffusers.UniPCMultistepScheduler(**FLOW)
    return kit(model, wan_vae(16), {**WAN_SIZE, **prompts(6, 64), **call}, scheduler)


def skyreels_image() -> Kit:
    config = {**MODELS["wan"][1].config, "in_channels": 16 + 4 + 16, "out_channels": 16}
    model = build(diffusers.SkyReelsV2Transformer3DModel, config, 0.2, biases=True)
    made = skyreels(image=drawing(), **prompts(512, 64)).but(transformer=model)
    made.setup = SEEN
    return made


# HunyuanVideo and its kin


def hunyuan_video(number: int = 0, **changes: Any) -> Kit:
    call = dict(true_cfg_scale=2.0, **masked(dtype=torch.long), **pooled())
    vae = block_vae("AutoencoderKLHunyuanVideo", "HunyuanVideo")
    return kit(tiny("hunyuan-video", number, gates=None, **changes), vae, call, EULER(shift=7.0), image_processor=None)


def hunyuan_video15(**call: Any) -> Kit:
    coder = dict(latent_channels=2, block_out_channels=(8,) * 5, layers_per_block=1)
    call |= prompts() | padded("prompt_embeds_mask") | prompts(5, 12, name="prompt_embeds_2")
    made = kit(
        tiny_video("hunyuan-video-1.5", in_channels=5, out_channels=2),
        build(diffusers.AutoencoderKLHunyuanVideo15, coder), call | padded("prompt_embeds_mask_2", 5),
        guider=diffusers.ClassifierFreeGuidance(3.0),
    )  # fmt: skip

    def setup(pipe: Any) -> None:
        pipe.vision_num_semantic_tokens, pipe.vision_states_dim, pipe.target_size = 3, 8, 64
        pipe._get_image_embeds = lambda *_, **__: torch.ones(1, 3, 8)

    made.setup = setup
    return made


def framepack() -> Kit:
    call = dict(PICTURE, latent_window_size=7, true_cfg_scale=2.0, **prompts(), **padded(), **pooled())
    vae = block_vae("AutoencoderKLHunyuanVideo", "HunyuanVideo")
    made = kit(tiny_video("framepack"), vae, call, EULER(shift=7.0))
    made.setup = answering("encode_image", lambda *_, **__: torch.ones(1, 3, 8))
    return made


# Kandinsky


def kandinsky5(**config: Any) -> Kit:
    call = dict(GUIDED, **prompts(name="prompt_embeds_qwen"), **prompts(8, name="prompt_embeds_clip"))
    call |= dict(prompt_cu_seqlens=torch.tensor([0, 6]), negative_prompt_cu_seqlens=torch.tensor([0, 6]))
    vae = block_vae("AutoencoderKLHunyuanVideo", "HunyuanVideo")
    made = kit(tiny_video("kandinsky-5", **config), vae, call)
    made.setup = lambda pipe: setattr(pipe, "resolutions", [(64, 128), (128, 160)])
    return made


def kandinsky6() -> Kit:
    sound = dict(mel_bins=8, latent_channels=5, hidden_channels=8, channel_multipliers=(1, 1), layers_per_block=1)
    voice = dict(
        num_mels=8, upsample_initial_channel=8, upsample_rates=(2, 2), upsample_kernel_sizes=(4, 4),
        resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1, 3, 5),),
    )  # fmt: skip
    return kit(
        tiny_video("kandinsky-6", ca_rope=False, cross_gates=False, visual_cond=True),
        block_vae("AutoencoderKLHunyuanVideo", "HunyuanVideo"), dict(GUIDED, **PICTURE, **prompts(), **pooled()),
        audio_vae=build(diffusers.MMAudioVAE, sound), vocoder=build(diffusers.MMAudioVocoder, voice),
    )  # fmt: skip


# LTX


def ltx(**call: Any) -> Kit:
    vae = dict(
        latent_channels=4, block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, False, False), patch_size=1,
        decoder_spatio_temporal_scaling=(True, True, False, False), patch_size_t=1,
    )  # fmt: skip
    size = dict(GUIDED, height=32, width=32)
    model = tiny("ltx", gates=None)
    return kit(model, build(diffusers.AutoencoderKLLTXVideo, vae), {**size, **masked(), **call})


def ltx_long() -> Kit:
    made = ltx(
        temporal_tile_size=16, temporal_overlap=8, seed=0, prompt="a", negative_prompt="b",
        num_frames=21,  # all windows of the same length
    )  # fmt: skip
    names = [f"{sign}prompt_{what}" for sign in ("", "negative_") for what in ("embeds", "attention_mask")]
    given = [made.call.pop(name) for name in names]
    made.setup = answering("encode_prompt", lambda **_: given)
    return made


def ltx2() -> Kit:
    vae = dict(
        latent_channels=4, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 3,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 4, patch_size=2, spatial_compression_ratio=8,
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False),
        temporal_compression_ratio=2, downsample_type=("spatiotemporal", "spatial", "spatial", "spatial"),
    )  # fmt: skip
    connectors = dict(caption_channels=16, text_proj_in_factor=1)
    for kind in ("video", "audio"):
        heads = dict(num_attention_heads=2, attention_head_dim=8, num_layers=1, num_learnable_registers=None)
        connectors |= {f"{kind}_connector_{name}": value for name, value in heads.items()}
    sound = dict(base_channels=4, ch_mult=(1,), num_res_blocks=1, latent_channels=2, mel_bins=8)
    call = dict(
        GUIDED, height=32, width=64, num_frames=13, stg_scale=1.0, modality_scale=2.0, image=drawing(32, 64),
        guidance_rescale=0.0, audio_guidance_rescale=0.0,  # with a rescale, methods of guidance are refused
        spatio_temporal_guidance_blocks=[1], use_cross_timestep=False, image_crf=0, generate_slots=False,
        **prompts(), **padded(),
    )  # fmt: skip
    return kit(
        tiny_video("ltx-2", perturbed_attn=True, audio_in_channels=4, audio_out_channels=4),
        build(diffusers.AutoencoderKLLTX2Video, vae), call, audio_vae=build(diffusers.AutoencoderKLLTX2Audio, sound),
        connectors=build(LTX2TextConnectors, connectors), vocoder=None,
    )  # fmt: skip


# Further families


def mochi() -> Kit:
    vae = dict(encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5)
    call = dict(GUIDED, num_frames=37, **masked())
    model = tiny("mochi", in_channels=12)
    return kit(model, build(diffusers.AutoencoderKLMochi, vae), call, EULER(invert_sigmas=True))


def cogvideox(channels: int = 4, **config: Any) -> Kit:
    call = dict(GUIDED, max_sequence_length=6, **prompts())
    model = tiny("cogvideox", gates=None, in_channels=channels, **config)
    vae = block_vae("AutoencoderKLCogVideoX", "CogVideoX")
    return kit(model, vae, call, diffusers.CogVideoXDDIMScheduler())


def consisid() -> Kit:
    identity = dict(PICTURE, id_cond=torch.randn(1, 4), id_vit_hidden=[torch.randn(1, 2, 4)])
    return cogvideox().but(identity, transformer=tiny_video("cogvideox", 2, in_channels=8))


def motif_video(**config: Any) -> Kit:
    model = tiny_video("motif-video", in_channels=9, **config)
    guider = diffusers.ClassifierFreeGuidance(3.0)
    made = kit(model, wan_vae(4), dict(**prompts(), **padded()), guider=guider, feature_extractor=None)
    made.setup = answering("_get_image_embeds", lambda *_, **__: torch.ones(1, 3, 8))
    return made


def helios(scheduler: Any = None) -> Kit:
    call = dict(GUIDED, num_latent_frames_per_chunk=7, history_sizes=[4, 2, 1], **prompts())
    return kit(tiny_video("helios"), wan_vae(4), call, scheduler or diffusers.HeliosScheduler(stages=1))


def helios_pyramid() -> Kit:
    return helios(diffusers.HeliosScheduler(gamma=0.25)).but(dict(pyramid_num_inference_steps_list=[4, 2, 1]))


def anyflow() -> Kit:
    scheduler = diffusers.FlowMapEulerDiscreteScheduler()
    return kit(tiny_video("anyflow"), wan_vae(4), dict(prompt_embeds=prompts()["prompt_embeds"]), scheduler)


def easyanimate(channels: int = 4) -> Kit:
    coder = dict(latent_channels=4, block_out_channels=[4] * 4, layers_per_block=1, norm_num_groups=2)
    vae = build(diffusers.AutoencoderKLMagvit, coder)
    vae.register_to_config(cache_mag_vae=False)
    model = tiny_video("easyanimate", text_embed_dim_t5=None, in_channels=channels)
    shown = dict(video=noise_clip(), mask_video=(noise_clip()[:, :1] > 0.5).float() * 255)
    return kit(model, vae, dict(GUIDED, **prompts(), **padded(), **shown))


def allegro() -> Kit:
    coder = dict(latent_channels=4, block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2)
    call = dict(GUIDED, num_frames=28, negative_prompt=None, **prompts(), **padded())
    vae = build(diffusers.AutoencoderKLAllegro, coder)
    return kit(tiny_video("allegro"), vae, call, diffusers.DDIMScheduler())


def cosmos(number: int = 0) -> Kit:
    coder = dict(
        latent_channels=4, encoder_block_out_channels=(8,) * 4, decode_block_out_channels=(8,) * 4, num_layers=1,
        attention_resolutions=(8,), resolution=64, patch_size=4, latents_mean=None, latents_std=None,
        temporal_compression_ratio=4,
    )  # fmt: skip
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5)
    vae = build(diffusers.AutoencoderKLCosmos, coder)
    call = dict(GUIDED, **prompts())
    return kit(tiny_video("cosmos", number), vae, call, scheduler, safety_checker=Unguarded())


def cosmos2(number: int = 0) -> Kit:
    model, scheduler = tiny_video("cosmos", number, max_size=(32, 16, 16)), EULER(use_karras_sigmas=True)
    return kit(model, wan_vae(4), dict(GUIDED, **prompts()), scheduler, safety_checker=Unguarded())


def cosmos3() -> Kit:
    options = dict(add_resolution_template=False, add_duration_template=False, use_system_prompt=False)
    call = dict(GUIDED, prompt="a red kite", negative_prompt="dull", **options)
    scheduler = diffusers.UniPCMultistepScheduler(**FLOW)
    parts = dict(text_tokenizer=Letters(), enable_safety_checker=False)
    return kit(tiny_video("cosmos-3"), wan_vae(4), call, scheduler, **parts)


class Called:
    """A modular pipeline that is called as the others are."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.components = pipe.components
        self.scheduler = pipe.scheduler

    def set_progress_bar_config(self, **options: Any) -> None:
        self.pipe.set_progress_bar_config(**options)

    def __call__(self, output_type: str, **call: Any) -> Any:
        return SimpleNamespace(frames=self.pipe(**call, output="latents"))


def minimax_h3() -> Kit:
    blocks = SequentialPipelineBlocks.from_blocks_dict(
        {
            "layout": before_denoise.MiniMaxH3PrepareLayoutStep(),
            "latents": before_denoise.MiniMaxH3PrepareLatentsStep(),
            "timesteps": before_denoise.MiniMaxH3SetTimestepsStep(),
            "denoise": MiniMaxH3DenoiseStep(),
        }
    )
    pipe = MiniMaxH3ModularPipeline(blocks=blocks)
    pipe.update_components(
        transformer=tiny_video("minimax-h3", in_channels=24, audio_in_channels=32),
        scheduler=diffusers.MiniMaxH3Scheduler(), audio_scheduler=diffusers.MiniMaxH3Scheduler(shift=3.0),
    )  # fmt: skip
    text = dict(prompt_embeds=torch.randn(1, 6, 16), text_token_tags=torch.ones(6, dtype=torch.long))
    size = dict(height=64, width=128, num_frames=124, num_inference_steps=4, output_type="latent")
    return Kit(pipe=Called(pipe), call=dict(text, **size))
