"""Further tiny pipelines of image families: image to image, inpainting, control, diffusers' own PAG."""

from typing import Any

import diffusers
import tiny_image_models as tiny
import tiny_image_pipelines as image
import tiny_other_models as models
import tiny_other_pipelines as other
import torch
from tiny_flux_pipelines import around, mask, texts
from tiny_image_pipelines import SIZE, Made, assemble, build, flow, masks, picture, pil, prompts, vae
from tiny_models import QWEN_IMAGE, SD3_TINY


def _changed(cls: type, made: Made, parts: dict[str, Any] | None = None, **call: Any) -> Made:
    return around(made, cls, parts=parts, output_type="latent", **call)


def sd3_img2img() -> Made:
    return _changed(diffusers.StableDiffusion3Img2ImgPipeline, other.sd3(), image=picture(), strength=1.0)


def _sd3(cls: type, channels: int = 4, parts: dict[str, Any] | None = None, **call: Any) -> Made:
    """Without dual attention, which diffusers' own PAG does not know."""
    pipe, made = other.sd3()
    config = dict(SD3_TINY, in_channels=channels, out_channels=channels)
    changed = {"transformer": build(diffusers.SD3Transformer2DModel, config), "vae": vae(channels, shift_factor=0.1)}
    return _changed(cls, (pipe, made), {**changed, **(parts or {})}, **call)


def sd3_inpaint() -> Made:
    inpainted = dict(image=picture(), strength=1.0, mask_image=mask())
    return _sd3(diffusers.StableDiffusion3InpaintPipeline, 16, **inpainted)


PAG: dict[str, Any] = {"pag_applied_layers": "blocks.1"}


def sd3_pag() -> Made:
    return _sd3(diffusers.StableDiffusion3PAGPipeline, parts=PAG, pag_scale=2.0)


def sd3_pag_img2img() -> Made:
    changed = dict(image=picture(), strength=1.0)
    return _sd3(diffusers.StableDiffusion3PAGImg2ImgPipeline, parts=PAG, pag_scale=2.0, **changed)


def _sd3_controlnet(cls: type, extra: int = 0, **call: Any) -> Made:
    config = dict(SD3_TINY, num_layers=1, extra_conditioning_channels=extra)
    controlnet = build(diffusers.SD3ControlNetModel, config)
    return _changed(cls, other.sd3(), {"controlnet": controlnet}, control_image=picture(), **call)


def sd3_controlnet() -> Made:
    return _sd3_controlnet(diffusers.StableDiffusion3ControlNetPipeline)


def sd3_controlnet_inpaint() -> Made:
    return _sd3_controlnet(diffusers.StableDiffusion3ControlNetInpaintingPipeline, 1, control_mask=mask())


def qwen_image_img2img() -> Made:
    return image.qwen(diffusers.QwenImageImg2ImgPipeline, image=picture(), strength=1.0)


def qwen_image_inpaint() -> Made:
    return image.qwen(diffusers.QwenImageInpaintPipeline, image=picture(), strength=1.0, mask_image=mask())


def qwen_image_edit_inpaint() -> Made:
    cls = image.small_references(diffusers.QwenImageEditInpaintPipeline, (160, 128, None))
    return image.qwen(cls, image=pil(128, 160), strength=1.0, mask_image=mask(), prompt=None)


def qwen_image_controlnet_inpaint() -> Made:
    config = {
        name: value for name, value in QWEN_IMAGE[0].config.items()
        if name in ("in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "axes_dims_rope")
    }  # fmt: skip
    config |= {"num_layers": 1, "out_channels": 1, "extra_condition_channels": 4}
    controlnet = build(diffusers.QwenImageControlNetModel, config)
    return image.qwen(
        diffusers.QwenImageControlNetInpaintPipeline, parts={"controlnet": controlnet}, control_image=picture(),
        control_mask=mask(),
    )  # fmt: skip


def z_image_img2img() -> Made:
    return _changed(diffusers.ZImageImg2ImgPipeline, image.z_image(), image=picture(), strength=1.0)


def z_image_inpaint() -> Made:
    return _changed(diffusers.ZImageInpaintPipeline, image.z_image(), image=picture(), strength=1.0, mask_image=mask())


def _z_image_controlnet(cls: type, channels: int, **call: Any) -> Made:
    pipe, made = image.z_image()
    config = dict(
        control_layers_places=[0, 2], control_refiner_layers_places=[0], control_in_dim=channels,
        add_control_noise_refiner="control_noise_refiner", dim=32, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
    )  # fmt: skip
    controlnet = build(diffusers.ZImageControlNetModel, config)
    diffusers.ZImageControlNetModel.from_transformer(controlnet, pipe.transformer)
    return _changed(cls, (pipe, made), {"controlnet": controlnet}, control_image=picture(), **call)


def z_image_controlnet() -> Made:
    return _z_image_controlnet(diffusers.ZImageControlNetPipeline, 4)


def z_image_controlnet_inpaint() -> Made:
    return _z_image_controlnet(diffusers.ZImageControlNetInpaintPipeline, 4 + 4 + 1, image=picture(), mask_image=mask())


def z_image_omni() -> Made:
    config = dict(tiny.Z_IMAGE_TINY, siglip_feat_dim=8)
    pipe = assemble(
        diffusers.ZImageOmniPipeline, transformer=build(diffusers.ZImageTransformer2DModel, config),
        vae=vae(4, shift_factor=0.1), scheduler=flow(),
    )  # fmt: skip
    pipe.vae.to(torch.bfloat16)  # in which it gets its pictures
    pipe.prepare_siglip_embeds = lambda images, batch_size, **_: [
        [torch.ones(2, 3, 8) for _ in images or []] for _ in range(batch_size)
    ]
    embeds = {name: [[value[0], value[0, :3], value[0, :2]]] for name, value in prompts().items()}
    return pipe, dict(SIZE, image=[pil(64, 64)], **embeds)


def cogview4_control() -> Made:
    config = dict(tiny.COGVIEW4_TINY, in_channels=8, out_channels=4)
    pipe = assemble(
        diffusers.CogView4ControlPipeline, transformer=build(diffusers.CogView4Transformer2DModel, config),
        vae=vae(4), scheduler=flow(use_dynamic_shifting=True, time_shift_type="linear"),
    )  # fmt: skip
    return pipe, dict(SIZE, control_image=picture(), **prompts())


def hunyuan_dit_pag() -> Made:
    return _changed(diffusers.HunyuanDiTPAGPipeline, other.hunyuan_dit(), PAG, pag_scale=2.0)


def hunyuan_dit_controlnet() -> Made:
    known = ("num_attention_heads", "attention_head_dim", "in_channels", "patch_size", "sample_size", "hidden_size",
             "cross_attention_dim", "cross_attention_dim_t5", "pooled_projection_dim", "text_len", "text_len_t5",
             "use_style_cond_and_image_meta_size")  # fmt: skip
    config = {name: models.HUNYUAN_DIT_TINY[name] for name in known} | {"transformer_num_layers": 4}
    controlnet = build(diffusers.HunyuanDiT2DControlNetModel, config)
    return _changed(
        diffusers.HunyuanDiTControlNetPipeline, other.hunyuan_dit(), {"controlnet": controlnet},
        control_image=picture(),
    )  # fmt: skip


def pixart_alpha() -> Made:
    return _changed(diffusers.PixArtAlphaPipeline, other.pixart())


def pixart_pag() -> Made:
    return _changed(diffusers.PixArtSigmaPAGPipeline, other.pixart(), PAG, pag_scale=2.0)


def prx_pixel() -> Made:
    config = dict(models.PRX_TINY, in_channels=3)
    pipe = assemble(
        diffusers.PRXPixelPipeline, scheduler=flow(), prompt_max_tokens=6, default_sample_size=16,
        transformer=build(diffusers.PRXTransformer2DModel, config),
    )  # fmt: skip
    valid = masks("prompt_attention_mask", "negative_prompt_attention_mask")
    size = dict(SIZE, height=16, width=20, use_resolution_binning=False)
    return pipe, dict(size, **prompts(), **valid)


def hunyuan_image_refiner() -> Made:
    config = dict(
        in_channels=3, out_channels=3, latent_channels=2, block_out_channels=(32,) * 4, layers_per_block=1,
        spatial_compression_ratio=8, temporal_compression_ratio=1, scaling_factor=1.0,
        downsample_match_channel=False, upsample_match_channel=False,
    )  # fmt: skip
    model = dict(
        tiny.HUNYUAN_IMAGE_TINY, in_channels=8, out_channels=4, patch_size=(1, 1, 1), rope_axes_dim=(4, 6, 6),
        text_embed_2_dim=None, guidance_embeds=True,
    )  # fmt: skip
    pipe = assemble(
        diffusers.HunyuanImageRefinerPipeline, transformer=build(diffusers.HunyuanImageTransformer2DModel, model),
        vae=build(diffusers.AutoencoderKLHunyuanImageRefiner, config), scheduler=flow(),
        guider=diffusers.AdaptiveProjectedMixGuidance(guidance_scale=2.0, enabled=True),
    )  # fmt: skip
    call = dict(SIZE, height=64, width=80, image=picture(64, 80), **prompts())
    return pipe, call | masks("prompt_embeds_mask", "negative_prompt_embeds_mask")


def _bria_fibo(cls: type, prompt: str, **call: Any) -> Made:
    """The text encoder's layers follow what the prompts say."""
    pipe, made = other.bria_fibo()
    if cls is not type(pipe):
        pipe, made = around((pipe, made), cls, parts={"vae": other._wan_vae()})

    def encoded(prompt: Any, num_images_per_prompt: int = 1, **_: Any) -> tuple[Any, ...]:
        text = texts(prompt, 6, 16).repeat_interleave(num_images_per_prompt, 0)
        away, rows = texts(["dull"], 6, 16).expand_as(text), len(text)
        valid = [torch.ones(rows, 6), torch.ones(rows, 6)]
        layers = [texts(prompt, 6, 12).repeat_interleave(num_images_per_prompt, 0)] * 4
        return text, away, torch.zeros(6, 3), *valid, layers, [one.flip(1) for one in layers]

    pipe.encode_prompt = encoded
    return pipe, dict(made, prompt=prompt, **call)


def bria_fibo() -> Made:
    return _bria_fibo(diffusers.BriaFiboPipeline, "{}")


def bria_fibo_edit() -> Made:
    asked = '{"edit_instruction": "a"}'
    return _bria_fibo(diffusers.BriaFiboEditPipeline, asked, image=pil(128, 160), _auto_resize=False)


def joyimage_edit_plus() -> Made:
    pipe, call = other.joyimage_edit_plus()

    def encoded(prompt: list[str], **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        text = texts(prompt, 6, 16)
        return text, torch.ones(len(text), 6, dtype=torch.bool)

    pipe.encode_prompt_multiple_images = encoded
    return pipe, dict(call, prompt="a kite")


def ideogram4() -> Made:
    pipe, call = other.ideogram4()
    one = tiny.ideogram4(1, padding=2)

    def encoded(prompt: Any, **_: Any) -> tuple[torch.Tensor, ...]:
        listed = [prompt] if isinstance(prompt, str) else prompt
        features = one["encoder_hidden_states"]
        text = texts(listed, *features.shape[1:]) * (features != 0)
        rest = (
            one[name].repeat(len(listed), *[1] * (one[name].ndim - 1))
            for name in ("position_ids", "segment_ids", "indicator")
        )
        return (text, *rest)

    pipe.encode_prompt = encoded
    return pipe, dict(call, prompt="a kite")
