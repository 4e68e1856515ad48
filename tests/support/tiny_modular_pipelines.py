"""Tiny modular pipelines: the blocks behind the text encoder, around the parts of the pipelines of the same family."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import diffusers
import tiny_further_pipelines as further
import tiny_image_models
import tiny_image_pipelines as image
import tiny_other_pipelines as other
import tiny_pipelines
import tiny_video_pipelines as video
import tiny_wan_pipelines as wan
import torch
from diffusers import modular_pipelines as package
from diffusers.modular_pipelines import ModularPipeline
from matrix_methods import STEPS

Made = tuple[Any, dict[str, Any]]
HIDDEN = ("num_images_per_prompt", "num_videos_per_prompt", "output_type")


def pipeline_class(name: str) -> Any:
    """Return a modular pipeline's class."""
    for found in pkgutil.iter_modules(package.__path__):
        if found.ispkg:
            importlib.import_module(f"{package.__name__}.{found.name}.modular_pipeline")
    stack = [ModularPipeline]
    while stack:
        cls = stack.pop()
        if cls.__name__ == name:
            return cls
        stack += cls.__subclasses__()
    raise KeyError(name)


def blocks_of(cls: Any) -> Any:
    """Return the blocks that a modular pipeline runs unless told otherwise."""
    package = importlib.import_module(cls.__module__.rsplit(".", 1)[0])
    return getattr(package, cls.default_blocks_name)()


def modular(name: str, make: Callable[[], Made], parts: dict[str, Any] | None = None, **call: Any) -> Made:
    """Return the denoising blocks of a modular pipeline around another pipeline's parts, and their call.

    Args:
        name: the modular pipeline's class.
        make: makes the pipeline whose parts and arguments are taken where the blocks ask for them.
        parts: further components.
        call: further arguments.
    """
    pipe, base = make()
    cls = pipeline_class(name)
    blocks = blocks_of(cls).sub_blocks["denoise"]
    asked = {one.name for one in blocks.expected_components}
    known = {key: part for key, part in {**pipe.components, **(parts or {})}.items() if part is not None}
    for guider in ("guider", "guider_2", "audio_guider"):
        if guider in asked and guider not in (parts or {}):
            known[guider] = diffusers.ClassifierFreeGuidance(guidance_scale=2.0)
    made = cls(blocks=blocks)
    made.update_components(**{key: part for key, part in known.items() if key in asked})
    for name in {"vae", "audio_vae"} & set(known) - asked:
        setattr(made, name, known[name])  # which tells the latents' channels and scale
    taken = {one.name for one in blocks.inputs} - set(HIDDEN)
    return made, {**{key: value for key, value in base.items() if key in taken}, **call, "output": "latents"}


def _latents(channels: int = 1, *size: int) -> torch.Tensor:
    """A picture as the encoder of the blocks gives it."""
    return torch.randn(1, channels, *(size or (16, 20)), generator=torch.Generator().manual_seed(6))


def of(name: str, make: Callable[[], Made], **more: Any) -> Callable[[], Made]:
    """Return a maker of a modular pipeline."""
    return lambda: modular(name, make, **more)


class Conditioner(torch.nn.Module):
    """Stands in for a text conditioner: it hands on what it gets."""

    dtype = torch.float32
    device = torch.device("cpu")

    def forward(self, source_hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        """Return the embeddings."""
        return source_hidden_states


def _connected(negative: bool = True) -> dict[str, Any]:
    """Embeddings behind the connectors of LTX-2."""
    generator = torch.Generator().manual_seed(7)
    made = {"connector_attention_mask": torch.ones(1, 6, dtype=torch.long)}
    for name in ("connector_prompt_embeds", "connector_audio_prompt_embeds"):
        made[name] = torch.randn(1, 6, 16, generator=generator)
    return {**made, **({f"negative_{name}": value.flip(1) for name, value in made.items()} if negative else {})}


def _letters(*texts: str) -> list[list[int]]:
    return [[3 + ord(letter) % 17 for letter in text] for text in texts]


_LTX2 = dict(_connected(), batch_size=1, dtype=torch.float32)


def _ltx2_guiders() -> dict[str, Any]:
    options: dict[str, Any] = dict(guidance_scale=2.0, stg_scale=1.0, spatio_temporal_guidance_blocks=[1])
    return {name: diffusers.LTX2Guidance(**options) for name in ("guider", "audio_guider")}


_CONTROL = dict(control_hidden_states=_latents(88, 5, 8, 8))
_SEEN = dict(image_embeds=torch.ones(1, 7, 24))
_PAD = dict.fromkeys(("image_pad_mask", "negative_image_pad_mask"), torch.zeros(1, 6, dtype=torch.bool))
_ANIMA = dict(
    qwen_prompt_embeds=_latents(6, 16), negative_qwen_prompt_embeds=_latents(6, 16).flip(1),
    **{f"{sign}qwen_attention_mask": torch.ones(1, 6, dtype=torch.long) for sign in ("", "negative_")},
    **{f"{sign}t5_input_ids": torch.ones(1, 6, dtype=torch.long) for sign in ("", "negative_")},
    **{f"{sign}t5_attention_mask": torch.ones(1, 6, dtype=torch.long) for sign in ("", "negative_")},
)  # fmt: skip


def _flux3_distilled() -> Made:
    config = {**tiny_image_models.FLUX3_TINY, "flow_map": True}
    return modular(
        "Flux3DistilledModularPipeline", other.flux3,
        {"transformer": image.build(diffusers.Flux3Transformer2DModel, config)},
    )  # fmt: skip


def _ideogram4() -> Made:
    features = tiny_image_models.ideogram4(1, padding=2)["encoder_hidden_states"]
    width = features.shape[-1]
    return modular(
        "Ideogram4ModularPipeline", other.ideogram4, guidance_schedule=(2.0,) * STEPS,
        text_features=_latents(8, width), text_lengths=[8],
    )  # fmt: skip


def _cosmos3_distilled() -> Made:
    texts = dict(cond_input_ids=_letters("a kite")[0], uncond_input_ids=_letters("dull")[0])
    pipe, call = modular("Cosmos3DistilledModularPipeline", video.cosmos3, guidance_scale=1.0, **texts)
    pipe.update_components(scheduler=video.EULER())
    pipe.register_to_config(distilled_sigmas=[1.0, 0.8, 0.6, 0.4, 0.2])
    return pipe, call


MODULAR: dict[str, Callable[[], Made]] = {
    "AnimaModularPipeline": of(
        "AnimaModularPipeline", further.cosmos2_image, parts={"text_conditioner": Conditioner()}, **_ANIMA
    ),
    "Cosmos3OmniModularPipeline": of(
        "Cosmos3OmniModularPipeline",
        video.cosmos3,
        cond_input_ids=_letters("a kite")[0],
        uncond_input_ids=_letters("dull")[0],
    ),
    "Cosmos3DistilledModularPipeline": _cosmos3_distilled,
    "EchoModularPipeline": of(
        "EchoModularPipeline", video.ltx2, sigmas=[1.0, 0.8, 0.6, 0.4, 0.2, 0.0], **_connected(negative=False)
    ),
    "ErnieImageModularPipeline": of("ErnieImageModularPipeline", other.ernie_image),
    "FluxModularPipeline": of("FluxModularPipeline", image.flux),
    "FluxKontextModularPipeline": of("FluxKontextModularPipeline", image.flux_kontext),
    "QwenImageModularPipeline": of("QwenImageModularPipeline", image.qwen_image),
    "QwenImageEditModularPipeline": of(
        "QwenImageEditModularPipeline", image.qwen_image_edit, image_latents=_latents(1, 1, 4, 6)
    ),
    "QwenImageEditPlusModularPipeline": of(
        "QwenImageEditPlusModularPipeline", other.qwen_image_edit_plus, image_latents=[_latents(1, 1, 4, 6)]
    ),
    "QwenImageLayeredModularPipeline": of(
        "QwenImageLayeredModularPipeline", other.qwen_image_layered, image_latents=_latents(1, 1, 16, 20)
    ),
    "QwenImage21ModularPipeline": of("QwenImage21ModularPipeline", other.qwen_image_21, **_PAD),
    "QwenImage21TurboModularPipeline": of(
        "QwenImage21TurboModularPipeline", other.qwen_image_21, image_pad_mask=_PAD["image_pad_mask"]
    ),
    "Flux2ModularPipeline": of("Flux2ModularPipeline", image.flux2),
    "Flux2KleinModularPipeline": of("Flux2KleinModularPipeline", image.flux2_klein),
    "Flux2KleinBaseModularPipeline": of("Flux2KleinBaseModularPipeline", image.flux2_klein),
    "Flux3DistilledModularPipeline": _flux3_distilled,
    "HeliosModularPipeline": of("HeliosModularPipeline", video.helios),
    "HeliosPyramidModularPipeline": of("HeliosPyramidModularPipeline", further.helios_pyramid),
    "HeliosPyramidDistilledModularPipeline": of(
        "HeliosPyramidDistilledModularPipeline",
        further.helios_pyramid,
        parts={"scheduler": diffusers.HeliosDMDScheduler(gamma=0.25)},
    ),
    "HunyuanVideo15ModularPipeline": of("HunyuanVideo15ModularPipeline", video.hunyuan_video15),
    "Ideogram4ModularPipeline": _ideogram4,
    "Krea2ModularPipeline": of("Krea2ModularPipeline", image.krea2),
    "Krea2TurboModularPipeline": of("Krea2TurboModularPipeline", image.krea2),
    "LTXModularPipeline": of("LTXModularPipeline", tiny_pipelines.ltx),
    "LTX2ModularPipeline": of("LTX2ModularPipeline", video.ltx2, parts=_ltx2_guiders(), **_LTX2),
    "LTX25ModularPipeline": of("LTX25ModularPipeline", video.ltx2, parts=_ltx2_guiders(), **_LTX2),
    "StableDiffusion3ModularPipeline": of("StableDiffusion3ModularPipeline", other.sd3),
    "WanModularPipeline": of("WanModularPipeline", wan.wan),
    "WanImage2VideoModularPipeline": of(
        "WanImage2VideoModularPipeline", wan.wan_image_to_video, image_condition_latents=_latents(16, 5, 8, 8), **_SEEN
    ),
    "Wan22ModularPipeline": of("Wan22ModularPipeline", wan.wan_two_experts),
    "Wan22Image2VideoModularPipeline": of(
        "Wan22Image2VideoModularPipeline", wan.wan_image_two_experts, image_condition_latents=_latents(16, 5, 8, 8)
    ),
    "Wan22VaceModularPipeline": of(
        "Wan22VaceModularPipeline", wan.wan_vace_two_experts, denoiser_input_fields=_CONTROL
    ),
    "ZImageModularPipeline": of("ZImageModularPipeline", image.z_image),
}
"""Modular pipeline class -> maker of (pipeline, arguments of a call)."""


def _control_of_each(call: dict[str, Any], prompts: Any) -> dict[str, Any]:
    fields = {name: value.repeat(len(prompts), 1, 1, 1, 1) for name, value in call["denoiser_input_fields"].items()}
    return {**call, "denoiser_input_fields": fields}


def _counted(call: dict[str, Any], prompts: Any) -> dict[str, Any]:
    return {**call, "batch_size": len(prompts)}


ROWS: dict[str, Callable[[dict[str, Any], Any], dict[str, Any]]] = {
    "LTX2ModularPipeline": _counted, "LTX25ModularPipeline": _counted, "Wan22VaceModularPipeline": _control_of_each,
}  # fmt: skip
"""Modular pipeline class -> what a call of several prompts changes besides the rows of its tensors."""
