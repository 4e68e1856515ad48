"""Every stock pipeline class of diffusers that an adapter covers, around a tiny transformer: a table and a builder."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import diffusers
import tiny_image_kits as image
import tiny_video_kits as video
import torch
from tiny_parts import (
    EDITED,
    EULER,
    INPAINTED,
    Conditioner,
    Kit,
    assemble,
    blocks_of,
    clip,
    connected,
    drawing,
    latents,
    letters,
    ltx2_guiders,
    mask,
    picture,
    pil,
    pipeline_class,
    small_references,
    tiny,
    vae,
)
from torch import Tensor

Call = dict[str, Any]


@dataclass(frozen=True)
class Stock:
    """One pipeline class around a tiny transformer.

    Attributes:
        kit: makes what the pipeline is assembled of.
        call: further arguments of a call with one prompt.
        wrap: makes another class of the pipeline's.
        rows: (call, prompts) -> a call of several prompts, where that of the matrix does not do.
        off: the guidance scale at which this class guides no more.
        scale: the argument that says how far it guides, where that can't be seen from its negative prompt.
        repeated: arguments, such as a picture, that are given once for each prompt.
        one: it makes one video, whose rows are no prompts.
    """

    kit: Callable[[], Kit]
    call: Mapping[str, Any] = field(default_factory=dict)
    wrap: Callable[[type], type] = lambda cls: cls
    rows: Callable[[Call, Sequence[int]], Call] | None = None
    off: float = 1.0
    scale: str | None = None
    repeated: tuple[str, ...] = ()
    one: bool = False


def stock_pipeline(name: str, **call: Any) -> tuple[Any, Call]:
    """Return a pipeline of `PIPELINES` and the arguments of a call with one prompt."""
    stock = PIPELINES[name]
    kit = stock.kit()
    if kit.pipe is not None:
        pipe, taken = kit.pipe, kit.call
    else:
        cls = name.split(",")[0]
        pipe, taken = assemble(stock.wrap(getattr(diffusers, cls, None) or getattr(diffusers.pipelines, cls)), kit)
    return pipe, {**taken, **deepcopy(dict(stock.call)), **call}


def run_stock(pipe: Any, call: Mapping[str, Any], **changes: Any) -> Tensor:
    """Return the latents, or what ``output_type`` asks for, of a run from one fixed noise."""
    torch.manual_seed(0)  # some encode references without the generator
    out = pipe(**{**call, "generator": torch.Generator().manual_seed(0), **changes})
    if not isinstance(out, Tensor):
        out = next(
            value for name in ("images", "frames", "video", "image") if (value := getattr(out, name, None)) is not None
        )
    while isinstance(out, list):
        out = torch.stack(out) if len(out) > 1 and all(isinstance(one, Tensor) for one in out) else out[0]
    return out


# Modular pipelines


def modular(name: str, of: str, parts: Mapping[str, Any] | None = None, **call: Any) -> Kit:
    """Return the denoising blocks of a modular pipeline around another pipeline's parts, and their call.

    Args:
        name: the modular pipeline's class.
        of: the pipeline of the table whose parts and arguments are taken where the blocks ask for them.
        parts: further components.
        call: further arguments.
    """
    pipe, base = stock_pipeline(of)
    cls = pipeline_class(name)
    blocks = blocks_of(cls).sub_blocks["denoise"]
    asked = {one.name for one in blocks.expected_components}
    known = {key: part for key, part in {**pipe.components, **(parts or {})}.items() if part is not None}
    for guider in {"guider", "guider_2", "audio_guider"} & asked - set(parts or ()):
        known[guider] = diffusers.ClassifierFreeGuidance(guidance_scale=2.0)
    built = cls(blocks=blocks)
    built.update_components(**{key: part for key, part in known.items() if key in asked})
    for coder in {"vae", "audio_vae"} & set(known) - asked:
        setattr(built, coder, known[coder])  # which tells the latents' channels and scale
    taken = {one.name for one in blocks.inputs} - {"num_images_per_prompt", "num_videos_per_prompt", "output_type"}
    return Kit(pipe=built, call={**{key: base[key] for key in taken & set(base)}, **call, "output": "latents"})


def _flux3_distilled() -> Kit:
    model = tiny("flux3", flow_map=True)
    return modular("Flux3DistilledModularPipeline", "Flux3ModularPipeline", dict(transformer=model))


def _cosmos3_distilled() -> Kit:
    kit = modular("Cosmos3DistilledModularPipeline", "Cosmos3OmniPipeline", guidance_scale=1.0, **SAID)
    kit.pipe.update_components(scheduler=EULER())
    kit.pipe.register_to_config(distilled_sigmas=[1.0, 0.8, 0.6, 0.4, 0.2])
    return kit


def _control_of_each(call: Call, prompts: Any) -> Call:
    fields = {name: value.repeat(len(prompts), 1, 1, 1, 1) for name, value in call["denoiser_input_fields"].items()}
    return {**call, "denoiser_input_fields": fields}


def _counted(call: Call, prompts: Any) -> Call:
    return {**call, "batch_size": len(prompts)}


SAID = dict(cond_input_ids=letters("a kite"), uncond_input_ids=letters("dull"))
ONES = torch.ones(1, 6, dtype=torch.long)
ANIMA = dict(qwen_prompt_embeds=latents(6, 16), negative_qwen_prompt_embeds=latents(6, 16).flip(1)) | {
    f"{sign}{name}": ONES
    for sign in ("", "negative_")
    for name in ("qwen_attention_mask", "t5_input_ids", "t5_attention_mask")
}
PAD = dict.fromkeys(("image_pad_mask", "negative_image_pad_mask"), torch.zeros(1, 6, dtype=torch.bool))
LTX2 = dict(connected(), batch_size=1, dtype=torch.float32)
CONTROL = dict(denoiser_input_fields=dict(control_hidden_states=latents(88, 5, 8, 8)))
GIVEN = dict(image_condition_latents=latents(16, 5, 8, 8))
ECHO = dict(connected(negative=False), sigmas=[1.0, 0.8, 0.6, 0.4, 0.2, 0.0])

MODULAR: dict[str, tuple[str, Call]] = {
    "AnimaModularPipeline": ("Cosmos2TextToImagePipeline", dict(ANIMA, parts={"text_conditioner": Conditioner()})),
    "Cosmos3OmniModularPipeline": ("Cosmos3OmniPipeline", SAID),
    "EchoModularPipeline": ("LTX2Pipeline", ECHO),
    "ErnieImageModularPipeline": ("ErnieImagePipeline", {}),
    "FluxModularPipeline": ("FluxPipeline", {}),
    "FluxKontextModularPipeline": ("FluxKontextPipeline", {}),
    "QwenImageModularPipeline": ("QwenImagePipeline", {}),
    "QwenImageEditModularPipeline": ("QwenImageEditPipeline", dict(image_latents=latents(1, 1, 4, 6))),
    "QwenImageEditPlusModularPipeline": ("QwenImageEditPlusPipeline", dict(image_latents=[latents(1, 1, 4, 6)])),
    "QwenImageLayeredModularPipeline": ("QwenImageLayeredPipeline", dict(image_latents=latents(1, 1, 16, 20))),
    "QwenImage21ModularPipeline": ("QwenImage21Pipeline", PAD),
    "QwenImage21TurboModularPipeline": ("QwenImage21Pipeline", dict(image_pad_mask=PAD["image_pad_mask"])),
    "Flux2ModularPipeline": ("Flux2Pipeline", {}),
    "Flux2KleinModularPipeline": ("Flux2KleinPipeline", {}),
    "Flux2KleinBaseModularPipeline": ("Flux2KleinPipeline", {}),
    "HeliosModularPipeline": ("HeliosPipeline", {}),
    "HeliosPyramidModularPipeline": ("HeliosPyramidPipeline", {}),
    "HeliosPyramidDistilledModularPipeline": (
        "HeliosPyramidPipeline", dict(parts={"scheduler": diffusers.HeliosDMDScheduler(gamma=0.25)}),
    ),
    "HunyuanVideo15ModularPipeline": ("HunyuanVideo15Pipeline", {}),
    "Ideogram4ModularPipeline": (
        "Ideogram4Pipeline", dict(guidance_schedule=(2.0,) * 5, text_features=latents(8, 16), text_lengths=[8]),
    ),
    "Krea2ModularPipeline": ("Krea2Pipeline", {}),
    "Krea2TurboModularPipeline": ("Krea2Pipeline", {}),
    "LTXModularPipeline": ("LTXPipeline", {}),
    "LTX2ModularPipeline": ("LTX2Pipeline", dict(LTX2, parts=ltx2_guiders())),
    "LTX25ModularPipeline": ("LTX2Pipeline", dict(LTX2, parts=ltx2_guiders())),
    "StableDiffusion3ModularPipeline": ("StableDiffusion3Pipeline", {}),
    "WanModularPipeline": ("WanPipeline", {}),
    "WanImage2VideoModularPipeline": ("WanImageToVideoPipeline", dict(GIVEN, image_embeds=torch.ones(1, 7, 24))),
    "Wan22ModularPipeline": ("WanPipeline, two experts", {}),
    "Wan22Image2VideoModularPipeline": ("WanImageToVideoPipeline, two experts", GIVEN),
    "Wan22VaceModularPipeline": ("WanVACEPipeline, two experts", CONTROL),
    "ZImageModularPipeline": ("ZImagePipeline", {}),
}  # fmt: skip
"""Modular pipeline class -> the pipeline whose parts it has, and further arguments."""

ROWS = {"LTX2ModularPipeline": _counted, "LTX25ModularPipeline": _counted, "Wan22VaceModularPipeline": _control_of_each}
"""Modular pipeline class -> what a call of several prompts changes besides the rows of its tensors."""

WIDE = dict(image=drawing(64, 128))
RECONSTRUCTED = dict(video=clip(25, 64, 128), strength=1.0)
IMAGE, VIDEO = ("image",), ("video",)
LARGE = dict(max_area=128 * 160, _auto_resize=False)

PIPELINES: dict[str, Stock] = {
    "FluxPipeline": Stock(image.flux),
    "FluxImg2ImgPipeline": Stock(image.flux, EDITED),
    "FluxInpaintPipeline": Stock(image.flux, INPAINTED),
    "FluxFillPipeline": Stock(partial(image.flux, 4 + 4 + 256), dict(image=picture(), mask_image=mask())),
    "FluxControlPipeline": Stock(partial(image.flux, 8), dict(control_image=picture())),
    "FluxControlImg2ImgPipeline": Stock(partial(image.flux, 8), dict(EDITED, control_image=picture())),
    "FluxControlInpaintPipeline": Stock(partial(image.flux, 8), dict(INPAINTED, control_image=picture())),
    "FluxControlNetPipeline": Stock(image.flux_controlnet),
    "FluxControlNetImg2ImgPipeline": Stock(image.flux_controlnet, EDITED),
    "FluxControlNetInpaintPipeline": Stock(image.flux_controlnet, INPAINTED),
    "FluxKontextPipeline": Stock(image.flux, dict(LARGE, image=picture(32, 48))),
    "FluxKontextInpaintPipeline": Stock(image.flux, INPAINTED | LARGE),
    "VisualClozeGenerationPipeline": Stock(image.visual_cloze, repeated=IMAGE),
    "VisualClozePipeline": Stock(image.visual_cloze, repeated=IMAGE),
    "OvisImagePipeline": Stock(image.ovis),
    "BriaPipeline": Stock(image.bria),
    "LongCatImagePipeline": Stock(image.longcat, dict(enable_prompt_rewrite=False)),
    "LongCatImageEditPipeline": Stock(image.longcat, dict(image=pil(128, 160)), small_references((160, 128))),
    "Flux2Pipeline": Stock(image.flux2),
    "Flux2Pipeline, references": Stock(image.flux2, dict(image=[pil(64, 64)])),
    "Flux2KleinPipeline": Stock(image.flux2),
    "Flux2KleinKVPipeline": Stock(image.flux2, dict(image=[pil(64, 64)])),
    "Flux2KleinInpaintPipeline": Stock(image.flux2, INPAINTED),
    "ChromaPipeline": Stock(image.chroma),
    "ChromaImg2ImgPipeline": Stock(image.chroma, EDITED),
    "ChromaInpaintPipeline": Stock(image.chroma, INPAINTED),
    "StableDiffusion3Pipeline": Stock(image.sd3),
    "StableDiffusion3Img2ImgPipeline": Stock(image.sd3, EDITED),
    "StableDiffusion3InpaintPipeline": Stock(partial(image.sd3, 0, 16), INPAINTED),
    "StableDiffusion3PAGPipeline": Stock(partial(image.sd3, 0), dict(pag_scale=2.0)),
    "StableDiffusion3PAGImg2ImgPipeline": Stock(partial(image.sd3, 0), dict(EDITED, pag_scale=2.0)),
    "StableDiffusion3ControlNetPipeline": Stock(image.sd3_controlnet),
    "StableDiffusion3ControlNetInpaintingPipeline": Stock(partial(image.sd3_controlnet, 1)),
    "QwenImagePipeline": Stock(image.qwen_image),
    "QwenImageImg2ImgPipeline": Stock(image.qwen_image, EDITED),
    "QwenImageInpaintPipeline": Stock(image.qwen_image, INPAINTED),
    "QwenImageEditPipeline": Stock(image.qwen_image, dict(image=pil(128, 160)), small_references((48, 32, None))),
    "QwenImageEditInpaintPipeline": Stock(
        image.qwen_image, dict(INPAINTED, image=pil(128, 160)), small_references((160, 128, None)), repeated=IMAGE
    ),
    "QwenImageEditPlusPipeline": Stock(
        image.qwen_image, dict(image=[pil(128, 160), pil(64, 64)]), small_references((48, 32))
    ),
    "QwenImageLayeredPipeline": Stock(image.qwen_image_layered, wrap=small_references((160, 128))),
    "QwenImageControlNetPipeline": Stock(image.qwen_image_controlnet),
    "QwenImageControlNetInpaintPipeline": Stock(partial(image.qwen_image_controlnet, extra_condition_channels=4)),
    "QwenImage21Pipeline": Stock(image.qwen_image_21),
    "QwenImage21Pipeline, no KV cache": Stock(image.qwen_image_21, dict(use_kv_cache=False)),
    "ZImagePipeline": Stock(image.z_image, off=0.0),
    "ZImageImg2ImgPipeline": Stock(image.z_image, EDITED, off=0.0),
    "ZImageInpaintPipeline": Stock(image.z_image, INPAINTED, off=0.0),
    "ZImageControlNetPipeline": Stock(image.z_image_controlnet, off=0.0),
    "ZImageControlNetInpaintPipeline": Stock(partial(image.z_image_controlnet, 4 + 4 + 1), off=0.0),
    "ZImageOmniPipeline": Stock(image.z_image_omni, off=0.0),
    "Krea2Pipeline": Stock(image.krea2),
    "HunyuanImagePipeline": Stock(image.hunyuan_image),
    "HunyuanImageRefinerPipeline": Stock(image.hunyuan_image_refiner),
    "HiDreamImagePipeline": Stock(image.hidream),
    "CogView3PlusPipeline": Stock(image.cogview3),
    "CogView4Pipeline": Stock(image.cogview4),
    "CogView4ControlPipeline": Stock(partial(image.cogview4, 8), dict(control_image=picture())),
    "GlmImagePipeline": Stock(image.glm_image),
    "GlmImagePipeline, references": Stock(
        image.glm_image,
        dict(
            image=[[pil(32, 48)]], prior_token_image_ids=[torch.arange(6)],
            source_image_grid_thw=[torch.tensor([[1, 2, 3]])],
        ),
    ),
    "Lumina2Pipeline": Stock(image.lumina2),
    "LuminaPipeline": Stock(image.lumina_next),
    "Ideogram4Pipeline": Stock(image.ideogram4, scale="guidance_scale"),
    "AuraFlowPipeline": Stock(image.aura_flow),
    "BriaFiboPipeline": Stock(image.bria_fibo),
    "BriaFiboEditPipeline": Stock(image.bria_fibo_edit),
    "BriaFibo2Pipeline": Stock(image.bria_fibo_2),
    "ErnieImagePipeline": Stock(image.ernie_image),
    "NucleusMoEImagePipeline": Stock(image.nucleus_image),
    "PRXPipeline": Stock(image.prx),
    "PRXPixelPipeline": Stock(partial(image.prx, 3), dict(height=16, width=20)),
    "JoyImageEditPipeline": Stock(image.joyimage_edit),
    "JoyImageEditPlusPipeline": Stock(image.joyimage_edit_plus),
    "PixArtAlphaPipeline": Stock(image.pixart),
    "PixArtSigmaPipeline": Stock(image.pixart),
    "PixArtSigmaPAGPipeline": Stock(image.pixart, dict(pag_scale=2.0)),
    "HunyuanDiTPipeline": Stock(image.hunyuan_dit),
    "HunyuanDiTPAGPipeline": Stock(image.hunyuan_dit, dict(pag_scale=2.0)),
    "HunyuanDiTControlNetPipeline": Stock(image.hunyuan_dit_controlnet),
    "AllegroPipeline": Stock(video.allegro),
    "AnyFlowPipeline": Stock(video.anyflow),
    "CogVideoXPipeline": Stock(video.cogvideox),
    "CosmosTextToWorldPipeline": Stock(video.cosmos),
    "Cosmos3OmniPipeline": Stock(video.cosmos3),
    "EasyAnimatePipeline": Stock(video.easyanimate),
    "HeliosPipeline": Stock(video.helios),
    "HunyuanVideoPipeline": Stock(video.hunyuan_video),
    "HunyuanVideo15Pipeline": Stock(video.hunyuan_video15),
    "HunyuanVideoFramepackPipeline": Stock(video.framepack, repeated=IMAGE),
    "Kandinsky5T2VPipeline": Stock(video.kandinsky5),
    "Kandinsky6TI2VAPipeline": Stock(video.kandinsky6, repeated=IMAGE),
    "LTXPipeline": Stock(video.ltx),
    "LTXConditionPipeline": Stock(video.ltx),
    "LTX2Pipeline": Stock(video.ltx2),
    "MochiPipeline": Stock(video.mochi),
    "MotifVideoPipeline": Stock(partial(video.motif_video, image_embed_dim=None)),
    "SkyReelsV2Pipeline": Stock(video.skyreels),
    "SkyReelsV2DiffusionForcingPipeline": Stock(partial(video.skyreels, 1), dict(prompt=None, base_num_frames=17)),
    "WanAnimatePipeline": Stock(video.wan_animate),
    "MiniMaxH3ModularPipeline": Stock(video.minimax_h3, one=True),
    "Flux3ModularPipeline": Stock(image.flux3),
    "Flux3ModularPipeline, references": Stock(
        partial(image.flux3, "Flux3ImageConditionedCoreDenoiseStep"), dict(image_cond_latents=[latents(4, 2, 3)])
    ),
    "WanPipeline": Stock(video.wan),
    "WanPipeline, two experts": Stock(video.wan_two_experts),
    "WanVideoToVideoPipeline": Stock(video.wan, dict(video=clip(), strength=1.0)),
    "WanImageToVideoPipeline": Stock(video.wan_image),
    "WanImageToVideoPipeline, first and last frame": Stock(video.wan_first_last_frame),
    "WanImageToVideoPipeline, a timestep a token": Stock(video.wan_image_22),
    "WanVACEPipeline": Stock(video.wan_vace),
    "LucyEditPipeline": Stock(video.lucy_edit, repeated=VIDEO),
    "ChronoEditPipeline": Stock(video.chrono_edit),
    "SkyReelsV2ImageToVideoPipeline": Stock(video.skyreels_image),
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": Stock(
        partial(video.skyreels, 1), dict(image=drawing(), prompt=None, base_num_frames=17)
    ),
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": Stock(
        partial(video.skyreels, 1),
        dict(video=clip(9), prompt=None, base_num_frames=17, overlap_history=5, num_frames=21),
    ),
    "CogVideoXImageToVideoPipeline": Stock(partial(video.cogvideox, 8), WIDE, repeated=IMAGE),
    "CogVideoXVideoToVideoPipeline": Stock(video.cogvideox, RECONSTRUCTED, repeated=VIDEO),
    "CogVideoXFunControlPipeline": Stock(
        partial(video.cogvideox, 8), dict(control_video=clip(25, 64, 128)), repeated=("control_video",)
    ),
    "ConsisIDPipeline": Stock(video.consisid, repeated=IMAGE),
    "CosmosVideoToWorldPipeline": Stock(partial(video.cosmos, 1), WIDE, repeated=IMAGE),
    "Cosmos2TextToImagePipeline": Stock(video.cosmos2),
    "Cosmos2VideoToWorldPipeline": Stock(partial(video.cosmos2, 1), WIDE, repeated=IMAGE),
    "EasyAnimateInpaintPipeline": Stock(partial(video.easyanimate, 9)),
    "HeliosPyramidPipeline": Stock(video.helios_pyramid),
    "HunyuanSkyreelsImageToVideoPipeline": Stock(
        partial(video.hunyuan_video, in_channels=8), WIDE, repeated=IMAGE
    ),
    "HunyuanVideoImageToVideoPipeline": Stock(partial(video.hunyuan_video, 2), WIDE, repeated=IMAGE),
    "HunyuanVideoImageToVideoPipeline, token_replace": Stock(partial(video.hunyuan_video, 1), WIDE, repeated=IMAGE),
    "HunyuanVideo15ImageToVideoPipeline": Stock(video.hunyuan_video15, WIDE),
    "Kandinsky5I2VPipeline": Stock(partial(video.kandinsky5, visual_cond=True), WIDE),
    "Kandinsky5T2IPipeline": Stock(lambda: video.kandinsky5().but(vae=vae(4)), dict(height=128, width=160)),
    "Kandinsky5I2IPipeline": Stock(
        lambda: video.kandinsky5(visual_cond=True).but(vae=vae(4)),
        dict(height=128, width=160, image=drawing(128, 160)), repeated=IMAGE,
    ),
    "LTXImageToVideoPipeline": Stock(video.ltx, dict(image=drawing(32, 32)), repeated=IMAGE),
    "LTXI2VLongMultiPromptPipeline": Stock(video.ltx_long),
    "MotifVideoImage2VideoPipeline": Stock(video.motif_video, dict(WIDE, prompt=None)),
    "LTX2ImageToVideoPipeline": Stock(video.ltx2, repeated=IMAGE),
    "LTX2ConditionPipeline": Stock(video.ltx2),
    "LTX2InContextPipeline": Stock(video.ltx2),
    "LTX2HDRPipeline": Stock(video.ltx2),
    "LTX2DFRPipeline": Stock(video.ltx2),
    "Cosmos3DistilledModularPipeline": Stock(_cosmos3_distilled),
    "Flux3DistilledModularPipeline": Stock(_flux3_distilled),
    "WanImageToVideoPipeline, two experts": Stock(lambda: video.both_experts(video.wan_first_last_frame())),
    "WanVACEPipeline, two experts": Stock(lambda: video.both_experts(video.wan_vace())),
    **{name: Stock(partial(modular, name, of, **more), rows=ROWS.get(name)) for name, (of, more) in MODULAR.items()},
}  # fmt: skip
"""Pipeline class, and a variant of it -> how it is made."""

NOT_BUILT: dict[str, str] = {
    **dict.fromkeys(
        ("Cosmos2_5_PredictBasePipeline", "Cosmos2_5_TransferPipeline"),
        "it resizes with torchvision, which the tests do not install",
    ),
    "EasyAnimateControlPipeline": "diffusers 0.42.1 calls its encode_prompt with an argument that it does not take",
    "LTX2DFRTemporalRefinePipeline": "it refines the latents, keyframes and sound that LTX2DFRPipeline gives",
}
"""Pipeline class -> why there is no tiny one."""
