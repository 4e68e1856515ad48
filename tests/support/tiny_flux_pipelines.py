"""Further tiny pipelines of FLUX and its kin: inpainting, control, editing; prompts come as embeddings."""

import inspect
import zlib
from typing import Any

import diffusers
import tiny_image_pipelines as image
import torch
from tiny_image_pipelines import SIZE, Made, assemble, build, flow, picture, pil, prompts, vae
from tiny_models import FLUX, FLUX_KIN_TINY


def mask(height: int = 128, width: int = 160) -> torch.Tensor:
    """The right half of a picture is to be made anew."""
    return (torch.arange(width)[None, None, None] > width // 2).float().expand(1, 1, height, width)


def around(made: Made, cls: type, drop: tuple[str, ...] = (), parts: dict[str, Any] | None = None, **call: Any) -> Made:
    """Return another pipeline around the parts of one, and its call with some arguments more and some less."""
    pipe, base = made
    kept = {name: part for name, part in pipe.components.items() if name in assembled(cls)}
    other = assemble(cls, **{**kept, **(parts or {})})
    return other, {name: value for name, value in {**base, **call}.items() if name not in drop}


def assembled(cls: type) -> set[str]:
    """The components that a pipeline class takes."""
    return set(inspect.signature(cls.__init__).parameters) - {"self"}


def flux_inpaint() -> Made:
    return image._flux(diffusers.FluxInpaintPipeline, image=picture(), mask_image=mask(), strength=1.0)


def flux_kontext_inpaint() -> Made:
    return image._flux(
        diffusers.FluxKontextInpaintPipeline, image=picture(), mask_image=mask(), strength=1.0, max_area=128 * 160,
        _auto_resize=False,
    )  # fmt: skip


def flux_control_img2img() -> Made:
    return image._flux(
        diffusers.FluxControlImg2ImgPipeline, channels=8, control_image=picture(), image=picture(), strength=1.0
    )


def flux_control_inpaint() -> Made:
    return image._flux(
        diffusers.FluxControlInpaintPipeline, channels=8, control_image=picture(), image=picture(), strength=1.0,
        mask_image=mask(),
    )  # fmt: skip


def _flux_controlnet(cls: type, **call: Any) -> Made:
    config = dict(FLUX[0].config, in_channels=4, num_layers=1, num_single_layers=1)
    config.pop("out_channels", None)
    made = around(image.flux(), cls, parts={"controlnet": build(diffusers.FluxControlNetModel, config)}, **call)
    made[1].update(control_image=picture(), output_type="latent")
    return made


def flux_controlnet() -> Made:
    return _flux_controlnet(diffusers.FluxControlNetPipeline)


def flux_controlnet_img2img() -> Made:
    return _flux_controlnet(diffusers.FluxControlNetImg2ImgPipeline, image=picture(), strength=1.0)


def flux_controlnet_inpaint() -> Made:
    return _flux_controlnet(diffusers.FluxControlNetInpaintPipeline, image=picture(), strength=1.0, mask_image=mask())


def _cloze(cls: type, **call: Any) -> Made:
    """A picture is the lower right one of two rows of two; all are laid side by side."""
    config = dict(FLUX[0].config, in_channels=4 + 4 + 256, out_channels=4)
    pipe = assemble(
        cls, transformer=build(diffusers.FluxTransformer2DModel, config), vae=vae(1, shift_factor=0.1),
        scheduler=flow(), resolution=64,
    )  # fmt: skip
    rows = [[pil(64, 64), pil(64, 64)], [pil(64, 64), None]]
    text = prompts()["prompt_embeds"], torch.randn(1, 8), torch.zeros(6, 3)
    for part in (pipe, getattr(pipe, "generation_pipe", pipe), getattr(pipe, "upsampling_pipe", pipe)):
        part.encode_prompt = lambda **_: text
    prompt = dict(task_prompt="a", content_prompt="b")
    return pipe, dict(num_inference_steps=3, output_type="latent", image=rows, **prompt, **call)


def visual_cloze_generation() -> Made:
    return _cloze(diffusers.pipelines.VisualClozeGenerationPipeline)


def visual_cloze() -> Made:
    return _cloze(diffusers.VisualClozePipeline, upsampling_height=64, upsampling_width=64)


def bria() -> Made:
    config = {**FLUX_KIN_TINY, "in_channels": 16}
    config.pop("out_channels", None)
    pipe = assemble(
        diffusers.BriaPipeline, transformer=build(diffusers.BriaTransformer2DModel, config), vae=vae(4),
        scheduler=flow(),
    )  # fmt: skip
    return pipe, dict(SIZE, negative_prompt=None, **prompts())


def texts(prompts: str | list[str], *shape: int) -> torch.Tensor:
    """Embeddings of some prompts, each drawn by what it says, [prompts, *shape]."""
    listed = [prompts] if isinstance(prompts, str) else prompts
    seeds = [zlib.crc32(prompt.encode()) for prompt in listed]
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


class Sight:
    """Stands in for the processor of a model that sees; what it sees is not asked for."""

    image_processor = None


def _longcat(cls: type, **call: Any) -> Made:
    config = {**FLUX_KIN_TINY, "in_channels": 64}
    config.pop("out_channels", None)
    pipe = assemble(
        cls, transformer=build(diffusers.LongCatImageTransformer2DModel, config), vae=vae(16, shift_factor=0.1),
        scheduler=flow(), text_processor=Sight(),
    )  # fmt: skip
    pipe._encode_prompt = lambda prompt, image=None: texts(prompt, 6, 16)
    return pipe, dict(SIZE, guidance_scale=3.0, prompt="a kite", negative_prompt="dull", **call)


def longcat() -> Made:
    return _longcat(diffusers.LongCatImagePipeline, enable_prompt_rewrite=False)


def longcat_edit() -> Made:
    cls = image.small_references(diffusers.LongCatImageEditPipeline, (160, 128))
    pipe, call = _longcat(cls, image=pil(128, 160))
    return pipe, {name: value for name, value in call.items() if name not in ("height", "width")}


def flux2_klein_inpaint() -> Made:
    made = image._flux2(diffusers.Flux2KleinInpaintPipeline, negative_prompt_embeds=prompts()["negative_prompt_embeds"])
    made[1].update(image=picture(), mask_image=mask(), strength=1.0)
    return made


def chroma_img2img() -> Made:
    return around(image.chroma(), diffusers.ChromaImg2ImgPipeline, image=picture(), strength=1.0)


def chroma_inpaint() -> Made:
    made = around(image.chroma(), diffusers.ChromaInpaintPipeline, image=picture(), strength=1.0, mask_image=mask())
    made[0].transformer.register_to_config(guidance_embeds=False)  # which the pipeline asks for, and the class has not
    return made
