"""The video pipelines of `tiny_stock`: what each is assembled of, and how it is called; prompts come as embeddings."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
import tiny_parts as parts
import torch
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.minimax_h3 import before_denoise
from diffusers.modular_pipelines.minimax_h3.denoise import MiniMaxH3DenoiseStep
from diffusers.modular_pipelines.minimax_h3.modular_pipeline import MiniMaxH3ModularPipeline
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from PIL import Image
from tiny_parts import EULER, GUIDED, SMALL, Kit, Stock, answering, build, clip, drawing, masked, prompts, tiny_video
from wan_tiny import sharp_transformer

WAN_SIZE = dict(GUIDED, width=64, num_frames=17)
PICTURE = dict(image=drawing(64, 128))
SEEN = answering("encode_image", lambda *_: parts.drawn(1, 7, 24, seed=4))
"""Every picture has the same features."""
ONES = answering("encode_image", lambda *_, **__: torch.ones(1, 3, 8))
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
IMAGE, VIDEO = ("image",), ("video",)
HUNYUAN_VAE = ("AutoencoderKLHunyuanVideo", "HunyuanVideo")
OFF_GRID = dict(prompt=None, base_num_frames=17)

kit = partial(parts.kit_of, parts.VIDEO_SIZE)
flow_guider = partial(diffusers.ClassifierFreeGuidance, 3.0)


def padded(name: str = "prompt_attention_mask", tokens: int = 6) -> dict[str, Any]:
    """Masks of whole numbers."""
    return parts.masks(name, tokens, torch.long)


def pooled() -> dict[str, Any]:
    return prompts(8, name="pooled_prompt_embeds")


# Wan and those made of it


def wan(model: Any = None, setup: Any = None, **call: Any) -> Kit:
    more = dict(boundary_ratio=None, image_encoder=None, image_processor=None, expand_timesteps=False)
    call = {**WAN_SIZE, **prompts(6, 64), **call}
    return kit(model or sharp_transformer(), parts.wan_vae(12), call, EULER(shift=3.0), setup, **more)


def wan_first_last_frame() -> Kit:
    """From a first frame to a last one."""
    model = tiny_video("wan", 0, in_channels=12 + 4 + 12)
    return wan(model, image=drawing(), last_image=drawing(color=parts.COLORS[1]))


def wan_vace() -> Kit:
    shown = [Image.new("L", (64, 64), 255 * (index > 4)) for index in range(17)]
    return wan(tiny_video("wan", 2, vace_in_channels=12 * 2 + 64), video=clip(), mask=shown)


def both_experts(kit: Kit) -> Kit:
    """Let a second transformer of the same kind take over below a noise level."""
    first = kit.parts["transformer"]
    return kit.but(transformer_2=build(type(first), first.config, 0.2, biases=True), boundary_ratio=0.8)


def chrono_edit() -> Kit:
    config = dict(in_channels=12 + 4 + 12, out_channels=12, image_dim=24, added_kv_proj_dim=36)
    return wan(tiny_video("wan", 3, **config), SEEN, image=drawing(), **prompts(512, 64))


def wan_animate() -> Kit:
    call = dict(
        image=drawing(64, 128), pose_video=[drawing(64, 128)] * 21, face_video=[drawing(16, 16)] * 21,
        segment_frame_length=21, **prompts(512, 64),
    )  # fmt: skip
    return kit(tiny_video("wan-animate"), parts.wan_vae(4), call, setup=SEEN)


def skyreels(number: int = 0, model: Any = None, setup: Any = None, **call: Any) -> Kit:
    model = model or tiny_video("skyreels-v2", number, out_channels=16)
    call = {**WAN_SIZE, **prompts(6, 64), **call}
    return kit(model, parts.wan_vae(16), call, diffusers.UniPCMultistepScheduler(**FLOW), setup)


def skyreels_image() -> Kit:
    config = dict(in_channels=16 + 4 + 16, out_channels=16, image_dim=24, added_kv_proj_dim=32)
    return skyreels(0, tiny_video("skyreels-v2", **config), SEEN, image=drawing(), **prompts(512, 64))


# HunyuanVideo and its kin


def hunyuan_video(number: int = 0, **changes: Any) -> Kit:
    call = dict(true_cfg_scale=2.0, **masked(dtype=torch.long), **pooled())
    model = parts.tiny("hunyuan-video", number, gates=None, **changes)
    return kit(model, parts.block_vae(*HUNYUAN_VAE), call, EULER(shift=7.0), image_processor=None)


def hunyuan_video15() -> Kit:
    coder = dict(latent_channels=2, block_out_channels=(8,) * 5, layers_per_block=1)
    call = prompts() | padded("prompt_embeds_mask") | prompts(5, 12, name="prompt_embeds_2")

    def setup(pipe: Any) -> None:
        pipe.vision_num_semantic_tokens, pipe.vision_states_dim, pipe.target_size = 3, 8, 64
        pipe._get_image_embeds = lambda *_, **__: torch.ones(1, 3, 8)

    return kit(
        tiny_video("hunyuan-video-1.5", in_channels=5, out_channels=2), build("AutoencoderKLHunyuanVideo15", coder),
        call | padded("prompt_embeds_mask_2", 5), setup=setup, guider=flow_guider(),
    )  # fmt: skip


def framepack() -> Kit:
    call = dict(PICTURE, latent_window_size=7, true_cfg_scale=2.0, **prompts(), **padded(), **pooled())
    return kit(tiny_video("framepack"), parts.block_vae(*HUNYUAN_VAE), call, EULER(shift=7.0), ONES)


# Kandinsky


def kandinsky5(**config: Any) -> Kit:
    call = dict(GUIDED, **prompts(name="prompt_embeds_qwen"), **prompts(8, name="prompt_embeds_clip"))
    call |= dict(prompt_cu_seqlens=torch.tensor([0, 6]), negative_prompt_cu_seqlens=torch.tensor([0, 6]))
    sizes = answering("resolutions", [(64, 128), (128, 160)])
    return kit(tiny_video("kandinsky-5", **config), parts.block_vae(*HUNYUAN_VAE), call, setup=sizes)


def kandinsky5_image(**config: Any) -> Kit:
    return kandinsky5(**config).but(vae=parts.vae(4))


def kandinsky6() -> Kit:
    sound = dict(mel_bins=8, latent_channels=5, hidden_channels=8, channel_multipliers=(1, 1), layers_per_block=1)
    voice = dict(
        num_mels=8, upsample_initial_channel=8, upsample_rates=(2, 2), upsample_kernel_sizes=(4, 4),
        resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1, 3, 5),),
    )  # fmt: skip
    return kit(
        tiny_video("kandinsky-6", ca_rope=False, cross_gates=False, visual_cond=True), parts.block_vae(*HUNYUAN_VAE),
        dict(GUIDED, **PICTURE, **prompts(), **pooled()), audio_vae=build("MMAudioVAE", sound),
        vocoder=build("MMAudioVocoder", voice),
    )  # fmt: skip


# LTX


LTX_VAE = dict(
    latent_channels=4, block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4, layers_per_block=(1,) * 5,
    decoder_layers_per_block=(1,) * 5, patch_size=1, patch_size_t=1,
)  # fmt: skip


def ltx_scaling(*scaling: bool) -> dict[str, Any]:
    """Which levels of an autoencoder of LTX shrink the picture."""
    return dict(spatio_temporal_scaling=scaling, decoder_spatio_temporal_scaling=scaling)


def ltx(**call: Any) -> Kit:
    coder = build("AutoencoderKLLTXVideo", LTX_VAE | ltx_scaling(True, True, False, False))
    return kit(parts.tiny("ltx", gates=None), coder, {**GUIDED, "height": 32, "width": 32, **masked(), **call})


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
        latent_channels=4, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 3, patch_size=2,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 4, spatial_compression_ratio=8,
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False),
        temporal_compression_ratio=2, downsample_type=("spatiotemporal", "spatial", "spatial", "spatial"),
        upsample_residual=(False,) * 3, upsample_factor=(1,) * 3,
    )  # fmt: skip
    heads = dict(num_attention_heads=2, attention_head_dim=8, num_layers=1, num_learnable_registers=None)
    connectors = dict(caption_channels=16, text_proj_in_factor=1)
    connectors |= {f"{kind}_connector_{key}": heads[key] for kind in ("video", "audio") for key in heads}
    sound = dict(base_channels=4, ch_mult=(1,), num_res_blocks=1, latent_channels=2, mel_bins=8)
    call = dict(
        GUIDED, height=32, width=64, num_frames=13, stg_scale=1.0, modality_scale=2.0, image=drawing(32, 64),
        guidance_rescale=0.0, audio_guidance_rescale=0.0,  # with a rescale, methods of guidance are refused
        spatio_temporal_guidance_blocks=[1], use_cross_timestep=False, image_crf=0, generate_slots=False,
        **prompts(), **padded(),
    )  # fmt: skip
    return kit(
        tiny_video("ltx-2", perturbed_attn=True, audio_in_channels=4, audio_out_channels=4),
        build("AutoencoderKLLTX2Video", vae), call, audio_vae=build("AutoencoderKLLTX2Audio", sound),
        connectors=build(LTX2TextConnectors, connectors), vocoder=None,
    )  # fmt: skip


# Further families


def mochi() -> Kit:
    vae = dict(encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5)
    call = dict(GUIDED, num_frames=37, **masked())
    return kit(parts.tiny("mochi", in_channels=12), build("AutoencoderKLMochi", vae), call, EULER(invert_sigmas=True))


def cogvideox(channels: int = 4) -> Kit:
    call, vae = dict(GUIDED, max_sequence_length=6, **prompts()), parts.block_vae("AutoencoderKLCogVideoX", "CogVideoX")
    model = parts.tiny("cogvideox", gates=None, in_channels=channels)
    return kit(model, vae, call, diffusers.CogVideoXDDIMScheduler())


def consisid() -> Kit:
    identity = dict(PICTURE, id_cond=torch.randn(1, 4), id_vit_hidden=[torch.randn(1, 2, 4)])
    return cogvideox().but(identity, transformer=tiny_video("cogvideox", 2, in_channels=8))


def motif_video(**config: Any) -> Kit:
    model, call = tiny_video("motif-video", in_channels=9, **config), dict(**prompts(), **padded())
    setup = answering("_get_image_embeds", lambda *_, **__: torch.ones(1, 3, 8))
    return kit(model, parts.wan_vae(4), call, None, setup, guider=flow_guider(), feature_extractor=None)


def helios(scheduler: Any = None) -> Kit:
    call = dict(GUIDED, num_latent_frames_per_chunk=7, history_sizes=[4, 2, 1], **prompts())
    return kit(tiny_video("helios"), parts.wan_vae(4), call, scheduler or diffusers.HeliosScheduler(stages=1))


def anyflow() -> Kit:
    call, scheduler = dict(prompt_embeds=prompts()["prompt_embeds"]), diffusers.FlowMapEulerDiscreteScheduler()
    return kit(tiny_video("anyflow"), parts.wan_vae(4), call, scheduler)


def easyanimate(channels: int = 4) -> Kit:
    noise = torch.rand(1, 3, 25, 64, 128, generator=torch.Generator().manual_seed(4))
    vae = build("AutoencoderKLMagvit", SMALL | dict(block_out_channels=[4] * 4))
    vae.register_to_config(cache_mag_vae=False)
    model = tiny_video("easyanimate", text_embed_dim_t5=None, in_channels=channels)
    shown = dict(video=noise, mask_video=(noise[:, :1] > 0.5).float() * 255)
    return kit(model, vae, dict(GUIDED, **prompts(), **padded(), **shown))


def allegro() -> Kit:
    call = dict(GUIDED, num_frames=28, negative_prompt=None, **prompts(), **padded())
    return kit(tiny_video("allegro"), build("AutoencoderKLAllegro", SMALL), call, diffusers.DDIMScheduler())


def cosmos(number: int = 0) -> Kit:
    coder = dict(
        latent_channels=4, encoder_block_out_channels=(8,) * 4, decode_block_out_channels=(8,) * 4, num_layers=1,
        attention_resolutions=(8,), resolution=64, patch_size=4, latents_mean=None, latents_std=None,
        temporal_compression_ratio=4,
    )  # fmt: skip
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5)
    model, vae = tiny_video("cosmos", number), build("AutoencoderKLCosmos", coder)
    return kit(model, vae, dict(GUIDED, **prompts()), scheduler, safety_checker=parts.Unguarded())


def cosmos2(number: int = 0) -> Kit:
    model, scheduler = tiny_video("cosmos", number, max_size=(32, 16, 16)), EULER(use_karras_sigmas=True)
    return kit(model, parts.wan_vae(4), dict(GUIDED, **prompts()), scheduler, safety_checker=parts.Unguarded())


def cosmos3() -> Kit:
    options = dict(add_resolution_template=False, add_duration_template=False, use_system_prompt=False)
    call = dict(GUIDED, prompt="a red kite", negative_prompt="dull", **options)
    scheduler, more = diffusers.UniPCMultistepScheduler(**FLOW), dict(enable_safety_checker=False)
    return kit(tiny_video("cosmos-3"), parts.wan_vae(4), call, scheduler, text_tokenizer=parts.Letters(), **more)


class Called:
    """A modular pipeline that is called as the others are."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.components, self.scheduler = pipe, pipe.components, pipe.scheduler
        self.set_progress_bar_config = pipe.set_progress_bar_config

    def __call__(self, output_type: str, **call: Any) -> Any:
        return SimpleNamespace(frames=self.pipe(**call, output="latents"))


def minimax_h3() -> Kit:
    blocks = SequentialPipelineBlocks.from_blocks_dict(
        {
            "layout": before_denoise.MiniMaxH3PrepareLayoutStep(),
            "latents": before_denoise.MiniMaxH3PrepareLatentsStep(),
            "timesteps": before_denoise.MiniMaxH3SetTimestepsStep(), "denoise": MiniMaxH3DenoiseStep(),
        }
    )  # fmt: skip
    pipe = MiniMaxH3ModularPipeline(blocks=blocks)
    pipe.update_components(
        transformer=tiny_video("minimax-h3", in_channels=24, audio_in_channels=32),
        scheduler=diffusers.MiniMaxH3Scheduler(), audio_scheduler=diffusers.MiniMaxH3Scheduler(shift=3.0),
    )  # fmt: skip
    text = dict(prompt_embeds=torch.randn(1, 6, 16), text_token_tags=torch.ones(6, dtype=torch.long))
    return Kit(pipe=Called(pipe), call=dict(parts.VIDEO_SIZE, num_frames=124, **text))


CONTINUED = dict(OFF_GRID, video=clip(9), overlap_history=5, num_frames=21)
SQUARE = dict(height=128, width=160)
RECONSTRUCTED = dict(video=clip(25, 64, 128), strength=1.0)

VIDEO_PIPELINES: dict[str, Stock] = {
    "AllegroPipeline": Stock(allegro),
    "AnyFlowPipeline": Stock(anyflow),
    "CogVideoXPipeline": Stock(cogvideox),
    "CogVideoXImageToVideoPipeline": Stock(partial(cogvideox, 8), PICTURE, repeated=IMAGE),
    "CogVideoXVideoToVideoPipeline": Stock(cogvideox, RECONSTRUCTED, repeated=VIDEO),
    "CogVideoXFunControlPipeline": Stock(
        partial(cogvideox, 8), dict(control_video=clip(25, 64, 128)), repeated=("control_video",)
    ),
    "ConsisIDPipeline": Stock(consisid, repeated=IMAGE),
    "CosmosTextToWorldPipeline": Stock(cosmos),
    "CosmosVideoToWorldPipeline": Stock(partial(cosmos, 1), PICTURE, repeated=IMAGE),
    "Cosmos2TextToImagePipeline": Stock(cosmos2),
    "Cosmos2VideoToWorldPipeline": Stock(partial(cosmos2, 1), PICTURE, repeated=IMAGE),
    "Cosmos3OmniPipeline": Stock(cosmos3),
    "EasyAnimatePipeline": Stock(easyanimate),
    "EasyAnimateInpaintPipeline": Stock(partial(easyanimate, 9)),
    "HeliosPipeline": Stock(helios),
    "HeliosPyramidPipeline": Stock(
        lambda: helios(diffusers.HeliosScheduler(gamma=0.25)).but(dict(pyramid_num_inference_steps_list=[4, 2, 1]))
    ),
    "HunyuanVideoPipeline": Stock(hunyuan_video),
    "HunyuanSkyreelsImageToVideoPipeline": Stock(partial(hunyuan_video, in_channels=8), PICTURE, repeated=IMAGE),
    "HunyuanVideoImageToVideoPipeline": Stock(partial(hunyuan_video, 2), PICTURE, repeated=IMAGE),
    "HunyuanVideoImageToVideoPipeline, token_replace": Stock(partial(hunyuan_video, 1), PICTURE, repeated=IMAGE),
    "HunyuanVideo15Pipeline": Stock(hunyuan_video15),
    "HunyuanVideo15ImageToVideoPipeline": Stock(hunyuan_video15, PICTURE),
    "HunyuanVideoFramepackPipeline": Stock(framepack, repeated=IMAGE),
    "Kandinsky5T2VPipeline": Stock(kandinsky5),
    "Kandinsky5I2VPipeline": Stock(partial(kandinsky5, visual_cond=True), PICTURE),
    "Kandinsky5T2IPipeline": Stock(kandinsky5_image, SQUARE),
    "Kandinsky5I2IPipeline": Stock(
        partial(kandinsky5_image, visual_cond=True), dict(SQUARE, image=drawing(128, 160)), repeated=IMAGE
    ),
    "Kandinsky6TI2VAPipeline": Stock(kandinsky6, repeated=IMAGE),
    "LTXPipeline": Stock(ltx),
    "LTXConditionPipeline": Stock(ltx),
    "LTXImageToVideoPipeline": Stock(ltx, dict(image=drawing(32, 32)), repeated=IMAGE),
    "LTXI2VLongMultiPromptPipeline": Stock(ltx_long),
    "LTX2Pipeline": Stock(ltx2),
    "LTX2ImageToVideoPipeline": Stock(ltx2, repeated=IMAGE),
    "LTX2ConditionPipeline": Stock(ltx2),
    "LTX2InContextPipeline": Stock(ltx2),
    "LTX2HDRPipeline": Stock(ltx2),
    "LTX2DFRPipeline": Stock(ltx2),
    "MiniMaxH3ModularPipeline": Stock(minimax_h3, one=True),
    "MochiPipeline": Stock(mochi),
    "MotifVideoPipeline": Stock(partial(motif_video, image_embed_dim=None)),
    "MotifVideoImage2VideoPipeline": Stock(motif_video, dict(PICTURE, prompt=None)),
    "SkyReelsV2Pipeline": Stock(skyreels),
    "SkyReelsV2ImageToVideoPipeline": Stock(skyreels_image),
    "SkyReelsV2DiffusionForcingPipeline": Stock(partial(skyreels, 1), OFF_GRID),
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": Stock(partial(skyreels, 1), dict(OFF_GRID, image=drawing())),
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": Stock(partial(skyreels, 1), CONTINUED),
    "WanPipeline": Stock(wan),
    # Wan 2.2 A14B: another transformer takes over below a noise level
    "WanPipeline, two experts": Stock(lambda: wan().but(transformer_2=sharp_transformer(5), boundary_ratio=0.8)),
    "WanVideoToVideoPipeline": Stock(wan, dict(video=clip(), strength=1.0)),
    # Wan 2.1: the picture's features join the text
    "WanImageToVideoPipeline": Stock(
        lambda: wan(tiny_video("wan", 1, in_channels=12 + 4 + 12), SEEN, image=drawing(), **prompts(512, 64))
    ),
    "WanImageToVideoPipeline, first and last frame": Stock(wan_first_last_frame),
    # Wan 2.2 TI2V: every token has its own timestep
    "WanImageToVideoPipeline, a timestep a token": Stock(lambda: wan(image=drawing()).but(expand_timesteps=True)),
    "WanImageToVideoPipeline, two experts": Stock(lambda: both_experts(wan_first_last_frame())),
    "WanVACEPipeline": Stock(wan_vace),
    "WanVACEPipeline, two experts": Stock(lambda: both_experts(wan_vace())),
    "WanAnimatePipeline": Stock(wan_animate),
    "LucyEditPipeline": Stock(lambda: wan(tiny_video("wan", 0, in_channels=24), video=clip()), repeated=VIDEO),
    "ChronoEditPipeline": Stock(chrono_edit),
}
"""Pipeline class, and a variant of it -> how it is made."""
