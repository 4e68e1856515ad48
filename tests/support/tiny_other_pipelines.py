"""More tiny image pipelines, in the manner of `tiny_image_pipelines`; and all of them by name."""

from types import SimpleNamespace
from typing import Any

import diffusers
import tiny_image_models as tiny
import tiny_image_pipelines
import tiny_other_models as other
import torch
from diffusers.modular_pipelines.flux3 import modular_blocks_flux3
from tiny_image_pipelines import (
    SIZE,
    Made,
    assemble,
    build,
    flow,
    flux2_vae,
    masks,
    picture,
    pil,
    prompts,
    qwen,
    qwen_vae,
    small_references,
    vae,
)
from tiny_models import SD3_TINY


class Encoder:
    """Stands in for a text encoder that is asked for its number type alone."""

    dtype = torch.float32


def _flux3(blocks: type, **call: Any) -> Made:
    """Assemble FLUX.3's blocks behind the text encoder; diffusers has no other pipeline of it."""
    pipe = blocks().init_pipeline()
    pipe.update_components(
        transformer=build(diffusers.Flux3Transformer2DModel, tiny.FLUX3_TINY), scheduler=flow(),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=2.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe, dict(height=128, width=160, num_inference_steps=3, output="latents", **prompts(), **call)


def flux3() -> Made:
    return _flux3(modular_blocks_flux3.Flux3CoreDenoiseStep)


def flux3_references() -> Made:
    reference = [torch.randn(1, 4, 2, 3)]
    return _flux3(modular_blocks_flux3.Flux3ImageConditionedCoreDenoiseStep, image_cond_latents=reference)


def qwen_image_edit_plus() -> Made:
    cls = small_references(diffusers.QwenImageEditPlusPipeline, (48, 32))
    return qwen(cls, image=[pil(128, 160), pil(64, 64)], prompt=None)


def qwen_image_layered() -> Made:
    cls = small_references(diffusers.QwenImageLayeredPipeline, (160, 128))
    made = qwen(
        cls, image=pil(128, 160, "RGBA"), prompt="a", layers=1, output_type="pt",
        config=dict(use_layer3d_rope=True, use_additional_t_cond=True),
        parts=dict(text_encoder=Encoder(), vae=qwen_vae(1, input_channels=4)),
    )  # fmt: skip
    del made[1]["height"], made[1]["width"]
    return made


def qwen_image_controlnet() -> Made:
    config = {
        key: value for key, value in qwen(diffusers.QwenImagePipeline)[0].transformer.config.items()
        if key in ("in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "axes_dims_rope")
    }  # fmt: skip
    controlnet = build(diffusers.QwenImageControlNetModel, {**config, "num_layers": 1, "out_channels": 1})
    return qwen(diffusers.QwenImageControlNetPipeline, parts={"controlnet": controlnet}, control_image=picture())


class Processor:
    """Stands in for a vision-language processor where a pipeline asks one for its template's length."""

    tokenizer: Any = SimpleNamespace(encode=lambda text: [0])

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[]]


def qwen_image_21(**call: Any) -> Made:
    config = dict(
        base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )  # fmt: skip
    pipe = assemble(
        diffusers.QwenImage21Pipeline,
        transformer=build(diffusers.QwenImage21Transformer2DModel, dict(tiny.QWEN_IMAGE_21[0].config)),
        vae=build(diffusers.AutoencoderKLQwenImage21, config), scheduler=flow(use_dynamic_shifting=True),
        processor=Processor(),
    )  # fmt: skip
    valid = masks("prompt_embeds_mask", "negative_prompt_embeds_mask")
    return pipe, dict(SIZE, true_cfg_scale=2.0, **prompts(), **valid, **call)


def qwen_image_21_uncached() -> Made:
    return qwen_image_21(use_kv_cache=False)


def hunyuan_image() -> Made:
    config = dict(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32,) * 4, layers_per_block=1,
        spatial_compression_ratio=8, sample_size=64, scaling_factor=1.0, downsample_match_channel=False,
        upsample_match_channel=False,
    )  # fmt: skip
    pipe = assemble(
        diffusers.HunyuanImagePipeline,
        transformer=build(diffusers.HunyuanImageTransformer2DModel, tiny.HUNYUAN_IMAGE_TINY),
        vae=build(diffusers.AutoencoderKLHunyuanImage, config), scheduler=flow(),
        guider=diffusers.AdaptiveProjectedMixGuidance(guidance_scale=2.0, enabled=True),
    )  # fmt: skip
    call = dict(SIZE, height=64, width=80, **prompts(), **masks("prompt_embeds_mask", "negative_prompt_embeds_mask"))
    call |= prompts(3, 12, names=("prompt_embeds_2", "negative_prompt_embeds_2"))
    return pipe, call | masks("prompt_embeds_mask_2", "negative_prompt_embeds_mask_2", 3)


def hidream() -> Made:
    pipe = assemble(
        diffusers.HiDreamImagePipeline, transformer=build(diffusers.HiDreamImageTransformer2DModel, tiny.HIDREAM_TINY),
        vae=vae(4, shift_factor=0.1), scheduler=flow(),
    )  # fmt: skip
    pipe.default_sample_size = 20
    call = dict(SIZE, **prompts(names=("prompt_embeds_t5", "negative_prompt_embeds_t5")))
    call |= prompts(8, names=("pooled_prompt_embeds", "negative_pooled_prompt_embeds"))
    llama = prompts(1, 7, 12, names=("prompt_embeds_llama3", "negative_prompt_embeds_llama3"))
    return pipe, call | {name: value.transpose(0, 1).repeat(4, 1, 1, 1) for name, value in llama.items()}


def cogview4() -> Made:
    pipe = assemble(
        diffusers.CogView4Pipeline, transformer=build(diffusers.CogView4Transformer2DModel, tiny.COGVIEW4_TINY),
        vae=vae(4), scheduler=flow(use_dynamic_shifting=True, time_shift_type="linear"),
    )  # fmt: skip
    return pipe, dict(SIZE, output_type="pt", **prompts())


def cogview3() -> Made:
    pipe = assemble(
        diffusers.CogView3PlusPipeline, transformer=build(diffusers.CogView3PlusTransformer2DModel, tiny.COGVIEW_TINY),
        vae=vae(4), scheduler=diffusers.CogVideoXDDIMScheduler(),
    )  # fmt: skip
    return pipe, dict(SIZE, **prompts())


def glm_image(**call: Any) -> Made:
    pipe = assemble(
        diffusers.GlmImagePipeline, transformer=build(diffusers.GlmImageTransformer2DModel, tiny.GLM_IMAGE_TINY),
        vae=vae(4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        scheduler=flow(use_dynamic_shifting=True, time_shift_type="linear"),
    )  # fmt: skip
    return pipe, dict(SIZE, **prompts(), prior_token_ids=torch.arange(80)[None] % 32, **call)


def glm_image_references() -> Made:
    references = dict(prior_token_image_ids=[torch.arange(6)], source_image_grid_thw=[torch.tensor([[1, 2, 3]])])
    return glm_image(image=[[pil(32, 48)]], **references)


def lumina2() -> Made:
    pipe = assemble(
        diffusers.Lumina2Pipeline, transformer=build(diffusers.Lumina2Transformer2DModel, tiny.LUMINA2_TINY),
        vae=vae(4, shift_factor=0.1), scheduler=flow(),
    )  # fmt: skip
    return pipe, dict(SIZE, **prompts(), **masks("prompt_attention_mask", "negative_prompt_attention_mask"))


def ideogram4() -> Made:
    models = [build(diffusers.Ideogram4Transformer2DModel, tiny.IDEOGRAM4_TINY) for _ in range(2)]
    pipe = assemble(
        diffusers.Ideogram4Pipeline, transformer=models[0], unconditional_transformer=models[1], vae=flux2_vae(),
        scheduler=flow(),
    )  # fmt: skip
    features = tiny.ideogram4(1, padding=2)
    pipe.encode_prompt = lambda **_: tuple(
        features[name] for name in ("encoder_hidden_states", "position_ids", "segment_ids", "indicator")
    )
    call = dict(SIZE, prompt="", guidance_scale=2.0, guidance_schedule=None, max_sequence_length=8)
    return pipe, call


def aura_flow() -> Made:
    pipe = assemble(
        diffusers.AuraFlowPipeline, transformer=build(diffusers.AuraFlowTransformer2DModel, tiny.AURA_FLOW_TINY),
        vae=vae(4), scheduler=flow(),
    )  # fmt: skip
    return pipe, dict(SIZE, **prompts(), **masks("prompt_attention_mask", "negative_prompt_attention_mask"))


def bria_fibo() -> Made:
    pipe = assemble(
        diffusers.BriaFiboPipeline, transformer=build(diffusers.BriaFiboTransformer2DModel, tiny.BRIA_FIBO_TINY),
        vae=vae(4), scheduler=flow(),
    )  # fmt: skip
    text, valid = prompts(), masks("prompt", "negative", dtype=torch.float32)
    layers = [prompts(6, 12)["prompt_embeds"]] * 4
    pipe.encode_prompt = lambda **_: (*text.values(), torch.zeros(6, 3), *valid.values(), layers, layers)
    return pipe, dict(SIZE, prompt="{}")


def bria_fibo_2() -> Made:
    pipe = assemble(
        diffusers.BriaFibo2Pipeline, transformer=build(diffusers.BriaFibo2Transformer2DModel, tiny.BRIA_FIBO_2_TINY),
        vae=flux2_vae(4), scheduler=flow(),
    )  # fmt: skip
    return pipe, dict(SIZE, **prompts(2, 6, 16), **masks("prompt_embeds_mask", "negative_prompt_embeds_mask"))


def ernie_image() -> Made:
    pipe = assemble(
        diffusers.ErnieImagePipeline, transformer=build(diffusers.ErnieImageTransformer2DModel, other.ERNIE_IMAGE_TINY),
        vae=flux2_vae(), scheduler=flow(),
    )  # fmt: skip
    text = {name: [value[0, : 6 - i]] for i, (name, value) in enumerate(prompts().items())}
    return pipe, dict(SIZE, **text)


def nucleus_image() -> Made:
    config = {**other.NUCLEUS_IMAGE_TINY, "patch_size": 2, "out_channels": 1}
    pipe = assemble(
        diffusers.NucleusMoEImagePipeline, vae=qwen_vae(1), scheduler=flow(use_dynamic_shifting=True),
        transformer=build(diffusers.NucleusMoEImageTransformer2DModel, config), processor=Processor(),
    )  # fmt: skip
    return pipe, dict(SIZE, **prompts(), **masks("prompt_embeds_mask", "negative_prompt_embeds_mask"))


def prx() -> Made:
    pipe = assemble(
        diffusers.PRXPipeline, transformer=build(diffusers.PRXTransformer2DModel, other.PRX_TINY), vae=vae(4),
        scheduler=flow(),
    )  # fmt: skip
    valid = masks("prompt_attention_mask", "negative_prompt_attention_mask")
    return pipe, dict(SIZE, use_resolution_binning=False, **prompts(), **valid)


def _wan_vae() -> Any:
    config = dict(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return build(diffusers.AutoencoderKLWan, config)


def joyimage_edit() -> Made:
    pipe = assemble(
        diffusers.JoyImageEditPipeline, vae=_wan_vae(), scheduler=flow(),
        transformer=build(diffusers.JoyImageEditTransformer3DModel, other.JOYIMAGE_TINY),
    )  # fmt: skip
    pipe.vae_image_processor.get_default_height_width = lambda *_, **__: (128, 160)
    valid = masks("prompt_embeds_mask", "negative_prompt_embeds_mask")
    return pipe, dict(SIZE, image=pil(128, 160), **prompts(), **valid)


def joyimage_edit_plus() -> Made:
    pipe = assemble(
        diffusers.JoyImageEditPlusPipeline, vae=_wan_vae(), scheduler=flow(),
        transformer=build(diffusers.JoyImageEditPlusTransformer3DModel, other.JOYIMAGE_TINY),
    )  # fmt: skip
    pipe.image_processor.get_default_height_width = lambda *_, **__: (32, 48)
    text, valid = prompts(), masks("prompt_embeds_mask", "negative_prompt_embeds_mask")
    both = list(zip(text.values(), valid.values(), strict=True))
    pipe.encode_prompt_multiple_images = lambda prompt, **_: both["negative" in prompt[0]]
    return pipe, dict(SIZE, images=[[pil(32, 48)]], prompt="", negative_prompt="negative")


def pixart() -> Made:
    pipe = assemble(
        diffusers.PixArtSigmaPipeline, transformer=build(diffusers.PixArtTransformer2DModel, other.PIXART_TINY),
        vae=vae(4), scheduler=diffusers.DPMSolverMultistepScheduler(),
    )  # fmt: skip
    valid = masks("prompt_attention_mask", "negative_prompt_attention_mask")
    return pipe, dict(SIZE, negative_prompt=None, use_resolution_binning=False, **prompts(), **valid)


def hunyuan_dit() -> Made:
    pipe = assemble(
        diffusers.HunyuanDiTPipeline, transformer=build(diffusers.HunyuanDiT2DModel, other.HUNYUAN_DIT_TINY),
        vae=vae(4), scheduler=diffusers.DDPMScheduler(), requires_safety_checker=False,
    )  # fmt: skip
    call = dict(SIZE, use_resolution_binning=False, **prompts())
    call |= prompts(7, 16, names=("prompt_embeds_2", "negative_prompt_embeds_2"))
    call |= masks("prompt_attention_mask", "negative_prompt_attention_mask")
    return pipe, call | masks("prompt_attention_mask_2", "negative_prompt_attention_mask_2", 7)


def lumina_next() -> Made:
    pipe = assemble(
        diffusers.LuminaPipeline, transformer=build(diffusers.LuminaNextDiT2DModel, other.LUMINA_NEXT_TINY),
        vae=vae(4), scheduler=flow(),
    )  # fmt: skip
    return pipe, dict(SIZE, **prompts(), **masks("prompt_attention_mask", "negative_prompt_attention_mask"))


def sd3() -> Made:
    config = {**SD3_TINY, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
    pipe = assemble(
        diffusers.StableDiffusion3Pipeline, transformer=build(diffusers.SD3Transformer2DModel, config),
        vae=vae(4, shift_factor=0.1), scheduler=flow(),
    )  # fmt: skip
    pooled = prompts(8, names=("pooled_prompt_embeds", "negative_pooled_prompt_embeds"))
    return pipe, dict(SIZE, output_type="pt", **prompts(), **pooled)


PIPELINES = {
    **tiny_image_pipelines.PIPELINES, "flux3": flux3, "flux3-references": flux3_references, "sd3": sd3,
    "qwen-image-edit-plus": qwen_image_edit_plus,
    "qwen-image-layered": qwen_image_layered, "qwen-image-controlnet": qwen_image_controlnet,
    "qwen-image-2.1": qwen_image_21, "qwen-image-2.1-uncached": qwen_image_21_uncached,
    "hunyuan-image": hunyuan_image, "hidream": hidream, "cogview": cogview4, "cogview-3": cogview3,
    "glm-image": glm_image, "glm-image-references": glm_image_references, "lumina2": lumina2, "ideogram4": ideogram4,
    "aura-flow": aura_flow, "bria-fibo": bria_fibo, "bria-fibo-2": bria_fibo_2, "ernie-image": ernie_image,
    "nucleus-image": nucleus_image, "prx": prx, "joyimage-edit": joyimage_edit,
    "joyimage-edit-plus": joyimage_edit_plus, "pixart": pixart, "hunyuan-dit": hunyuan_dit,
    "lumina-next": lumina_next,
}  # fmt: skip
"""Name -> maker of (pipeline, arguments of a call); a name begins with its adapter's."""
