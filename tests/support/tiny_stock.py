"""Every stock pipeline class of diffusers that an adapter covers, around a tiny transformer: a table and a builder."""

from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import diffusers
import tiny_parts as parts
import torch
from tiny_image_kits import IMAGE_PIPELINES
from tiny_parts import Call, Conditioner, Kit, Stock, latents, letters, tiny
from tiny_video_kits import VIDEO_PIPELINES
from torch import Tensor


def stock_pipeline(name: str, **call: Any) -> tuple[Any, Call]:
    """Return a pipeline of `PIPELINES` and the arguments of a call with one prompt."""
    stock = PIPELINES[name]
    kit = stock.kit()
    if kit.pipe is not None:
        pipe, taken = kit.pipe, kit.call
    else:
        cls = name.split(",")[0]
        pipe, taken = parts.assemble(
            stock.wrap(getattr(diffusers, cls, None) or getattr(diffusers.pipelines, cls)), kit
        )
    return pipe, {**taken, **deepcopy(dict(stock.call)), **call}


def latents_of(out: Any) -> Tensor:
    """Return what a run gives, [rows, ...]."""
    if not isinstance(out, Tensor):
        named = (getattr(out, name, None) for name in ("frames", "images", "video", "image"))
        out = next((value for value in named if value is not None), out)
    while not isinstance(out, Tensor):
        if isinstance(out, (list, tuple)) and len(out) > 1 and all(isinstance(one, Tensor) for one in out):
            out = torch.stack(list(out))
        else:
            out = out[0] if isinstance(out, (list, tuple)) else torch.as_tensor(out)
    return out if out.dtype == torch.float64 else out.float()


def run_stock(pipe: Any, call: Mapping[str, Any], **changes: Any) -> Tensor:
    """Return the latents, or what ``output_type`` asks for, of a run from one fixed noise."""
    torch.manual_seed(0)  # some encode references without the generator
    return latents_of(pipe(**{**call, "generator": torch.Generator().manual_seed(0), **changes}))


# Modular pipelines


def modular(name: str, of: str, more: Mapping[str, Any] | None = None, **call: Any) -> Kit:
    """Return the denoising blocks of a modular pipeline around another pipeline's parts, and their call.

    Args:
        name: the modular pipeline's class.
        of: the pipeline of the table whose parts and arguments are taken where the blocks ask for them.
        more: further components.
        call: further arguments.
    """
    pipe, base = stock_pipeline(of)
    cls = getattr(diffusers, name, None) or getattr(diffusers.modular_pipelines, name)
    blocks = parts.blocks_of(cls).sub_blocks["denoise"]
    asked = {one.name for one in blocks.expected_components}
    known = {key: part for key, part in {**pipe.components, **(more or {})}.items() if part is not None}
    for guider in {"guider", "guider_2", "audio_guider"} & asked - set(more or ()):
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
    kit.pipe.update_components(scheduler=parts.EULER())
    kit.pipe.register_to_config(distilled_sigmas=[1.0, 0.8, 0.6, 0.4, 0.2])
    return kit


def _ltx2_guiders() -> Call:
    return {name: diffusers.LTX2Guidance(**STG) for name in ("guider", "audio_guider")}


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
LTX2 = dict(parts.connected(), batch_size=1, dtype=torch.float32)
STG = dict(guidance_scale=2.0, stg_scale=1.0, spatio_temporal_guidance_blocks=[1])
CONTROL = dict(denoiser_input_fields=dict(control_hidden_states=latents(88, 5, 8, 8)))
GIVEN = dict(image_condition_latents=latents(16, 5, 8, 8))
ECHO = dict(parts.connected(negative=False), sigmas=[1.0, 0.8, 0.6, 0.4, 0.2, 0.0])

MODULAR: dict[str, tuple[str, Call]] = {
    "AnimaModularPipeline": ("Cosmos2TextToImagePipeline", dict(ANIMA, more={"text_conditioner": Conditioner()})),
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
        "HeliosPyramidPipeline", dict(more={"scheduler": diffusers.HeliosDMDScheduler(gamma=0.25)}),
    ),
    "HunyuanVideo15ModularPipeline": ("HunyuanVideo15Pipeline", {}),
    "Ideogram4ModularPipeline": (
        "Ideogram4Pipeline", dict(guidance_schedule=(2.0,) * 5, text_features=latents(8, 16), text_lengths=[8]),
    ),
    "Krea2ModularPipeline": ("Krea2Pipeline", {}),
    "Krea2TurboModularPipeline": ("Krea2Pipeline", {}),
    "LTXModularPipeline": ("LTXPipeline", {}),
    "LTX2ModularPipeline": ("LTX2Pipeline", dict(LTX2, more=_ltx2_guiders())),
    "LTX25ModularPipeline": ("LTX2Pipeline", dict(LTX2, more=_ltx2_guiders())),
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

PIPELINES: dict[str, Stock] = {
    **IMAGE_PIPELINES,
    **VIDEO_PIPELINES,
    "Cosmos3DistilledModularPipeline": Stock(_cosmos3_distilled),
    "Flux3DistilledModularPipeline": Stock(_flux3_distilled),
    **{name: Stock(partial(modular, name, of, **call), rows=ROWS.get(name)) for name, (of, call) in MODULAR.items()},
}
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
