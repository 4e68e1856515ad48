"""What the tiny image pipelines of `tiny_stock` are assembled of, a function a family; prompts come as embeddings."""

from typing import Any

import diffusers
import torch
from diffusers.modular_pipelines.flux3 import modular_blocks_flux3
from tiny_models import MODELS
from tiny_parts import (
    EULER,
    SIZE,
    Encoder,
    Kit,
    Processor,
    answering,
    build,
    mask,
    masked,
    masks,
    part_of,
    picture,
    picture_vae,
    pil,
    prompts,
    texts,
    tiny,
    vae,
    wan_vae,
)  # fmt: skip

DYNAMIC = dict(use_dynamic_shifting=True)
LINEAR = dict(DYNAMIC, time_shift_type="linear")
PAG = {"pag_applied_layers": "blocks.1"}


def kit(transformer: Any, coder: Any, call: dict[str, Any], scheduler: Any = None, **parts: Any) -> Kit:
    """A kit of an image family: a flow scheduler unless told."""
    parts |= dict(transformer=transformer, vae=coder, scheduler=scheduler or EULER())
    return Kit(parts, {**SIZE, **call})


def positive(name: str = "prompt_embeds", *shape: int) -> dict[str, Any]:
    """The embeddings of the prompt alone."""
    return {name: prompts(*shape, name=name)[name]}


def flux(channels: int = 4) -> Kit:
    call = positive() | positive("pooled_prompt_embeds", 8)
    return kit(tiny("flux", in_channels=channels, out_channels=4), vae(1), call)


def flux_controlnet() -> Kit:
    config = {**MODELS["flux"][0].config, "num_layers": 1, "num_single_layers": 1}
    controlnet = build(diffusers.FluxControlNetModel, config)
    return flux().but(dict(control_image=picture()), controlnet=controlnet)


def visual_cloze() -> Kit:
    """A picture is the lower right one of two rows of two; all are laid side by side."""
    text = prompts()["prompt_embeds"], torch.randn(1, 8), torch.zeros(6, 3)

    def setup(pipe: Any) -> None:
        for part in (pipe, getattr(pipe, "generation_pipe", pipe), getattr(pipe, "upsampling_pipe", pipe)):
            part.encode_prompt = lambda **_: text

    rows = [[pil(64, 64), pil(64, 64)], [pil(64, 64), None]]
    made = flux(4 + 4 + 256).but(dict(image=rows, task_prompt="a", content_prompt="b"), resolution=64)
    made.call |= dict(upsampling_height=64, upsampling_width=64)
    del made.call["height"], made.call["width"], made.call["prompt_embeds"], made.call["pooled_prompt_embeds"]
    made.setup = setup
    return made


def bria() -> Kit:
    return kit(tiny("flux-kin", 0, in_channels=16), vae(4), dict(negative_prompt=None, **prompts()))


def longcat() -> Kit:
    call = dict(guidance_scale=3.0, prompt="a kite", negative_prompt="dull")
    made = kit(tiny("flux-kin", 1, in_channels=64), vae(16), call, text_processor=Processor())
    made.setup = answering("_encode_prompt", lambda prompt, image=None: texts(prompt, 6, 16))
    return made


def ovis() -> Kit:
    return kit(tiny("flux-kin", 2), vae(1), dict(negative_prompt=None, **prompts()))


def flux2() -> Kit:
    return kit(tiny("flux2"), vae(1, "AutoencoderKLFlux2"), prompts())


def flux3(blocks: str = "Flux3CoreDenoiseStep", flow_map: bool = False) -> Kit:
    """FLUX.3's blocks behind the text encoder; diffusers has no other pipeline of it."""
    pipe = getattr(modular_blocks_flux3, blocks)().init_pipeline()
    parts = dict(transformer=tiny("flux3", flow_map=flow_map), scheduler=EULER())
    pipe.update_components(**parts, guider=diffusers.ClassifierFreeGuidance(guidance_scale=2.0))
    pipe.set_progress_bar_config(disable=True)
    return Kit(pipe=pipe, call=dict(height=128, width=160, num_inference_steps=3, output="latents", **prompts()))


def chroma() -> Kit:
    made = kit(tiny("chroma"), vae(1), dict(negative_prompt=None, **masked()))
    made.setup = lambda pipe: pipe.transformer.register_to_config(guidance_embeds=False)  # which inpainting asks for
    return made


def sd3(number: int = 1, channels: int = 4) -> Kit:
    """With dual attention, or without: diffusers' own PAG does not know it."""
    model = tiny("sd3", number, in_channels=channels, out_channels=channels)
    return kit(model, vae(channels), prompts() | prompts(8, name="pooled_prompt_embeds"), **PAG)


def sd3_controlnet(extra: int = 0) -> Kit:
    config = {**MODELS["sd3"][0].config, "num_layers": 1, "extra_conditioning_channels": extra}
    controlnet = build(diffusers.SD3ControlNetModel, config)
    return sd3().but(dict(control_image=picture(), control_mask=mask()), controlnet=controlnet)


def qwen_image(**config: Any) -> Kit:
    call = dict(true_cfg_scale=2.0, **masked("prompt_embeds_mask"))
    coder = wan_vae(1, "AutoencoderKLQwenImage")
    return kit(tiny("qwen-image", **config), coder, call, EULER(**DYNAMIC))


def qwen_image_layered() -> Kit:
    made = qwen_image(use_layer3d_rope=True, use_additional_t_cond=True)
    coder = wan_vae(1, "AutoencoderKLQwenImage", input_channels=4)
    call = dict(image=pil(128, 160, "RGBA"), prompt="a", layers=1, output_type="pt")
    return made.but(call, text_encoder=Encoder(), vae=coder)


QWEN_SHARED = "in_channels attention_head_dim num_attention_heads joint_attention_dim axes_dims_rope"


def qwen_image_controlnet(**config: Any) -> Kit:
    changes = dict(num_layers=1, out_channels=1, **config)
    controlnet = part_of("QwenImageControlNetModel", "qwen-image", QWEN_SHARED, **changes)
    return qwen_image().but(dict(control_image=picture(), control_mask=mask()), controlnet=controlnet)


def qwen_image_21() -> Kit:
    config = dict(
        base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1] * 5, num_res_blocks=1, latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )  # fmt: skip
    call = dict(true_cfg_scale=2.0, **masked("prompt_embeds_mask"))
    coder = build(diffusers.AutoencoderKLQwenImage21, config)
    return kit(tiny("qwen-image-2.1"), coder, call, EULER(**DYNAMIC), processor=Processor())


def z_image() -> Kit:
    return kit(tiny("z-image"), vae(4), {name: [value[0]] for name, value in prompts().items()})


def z_image_controlnet(channels: int = 4) -> Kit:
    made = z_image()
    config = dict(
        control_layers_places=[0, 2], control_refiner_layers_places=[0], control_in_dim=channels,
        add_control_noise_refiner="control_noise_refiner", dim=32, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
    )  # fmt: skip
    controlnet = build(diffusers.ZImageControlNetModel, config)
    diffusers.ZImageControlNetModel.from_transformer(controlnet, made.parts["transformer"])
    return made.but(dict(control_image=picture(), image=picture(), mask_image=mask()), controlnet=controlnet)


def z_image_omni() -> Kit:
    embeds = {name: [[value[0], value[0, :3], value[0, :2]]] for name, value in prompts().items()}
    made = kit(tiny("z-image", siglip_feat_dim=8), vae(4), dict(image=[pil(64, 64)], **embeds))

    def seen(images: Any, batch_size: int, **_: Any) -> Any:
        return [[torch.ones(2, 3, 8) for _ in images or []] for _ in range(batch_size)]

    made.parts["vae"].to(torch.bfloat16)  # in which it gets its pictures
    made.setup = answering("prepare_siglip_embeds", seen)
    return made


def krea2() -> Kit:
    call = prompts(6, 2, 16) | masks("prompt_embeds_mask", front=True)
    coder = wan_vae(1, "AutoencoderKLQwenImage")
    return kit(tiny("krea2"), coder, call, EULER(**DYNAMIC), text_encoder_select_layers=(1, 2))


def _mixed() -> Any:
    return diffusers.AdaptiveProjectedMixGuidance(guidance_scale=2.0, enabled=True)


def hunyuan_image() -> Kit:
    call = dict(height=64, width=80, **masked("prompt_embeds_mask"), **prompts(3, 12, name="prompt_embeds_2"))
    call |= masks("prompt_embeds_mask_2", 3, front=True)
    coder = picture_vae("AutoencoderKLHunyuanImage", 4, sample_size=64)
    return kit(tiny("hunyuan-image"), coder, call, guider=_mixed())


def hunyuan_image_refiner() -> Kit:
    model = tiny("hunyuan-image", 1, in_channels=8, guidance_embeds=True)
    call = dict(height=64, width=80, image=picture(64, 80), **masked("prompt_embeds_mask"))
    coder = picture_vae("AutoencoderKLHunyuanImageRefiner", 2, temporal_compression_ratio=1)
    return kit(model, coder, call, guider=_mixed())


def hidream() -> Kit:
    call = prompts(name="prompt_embeds_t5") | prompts(8, name="pooled_prompt_embeds")
    llama = prompts(1, 7, 12, name="prompt_embeds_llama3")
    call |= {name: value.transpose(0, 1).repeat(4, 1, 1, 1) for name, value in llama.items()}
    made = kit(tiny("hidream"), vae(4), call)
    made.setup = lambda pipe: setattr(pipe, "default_sample_size", 20)
    return made


def cogview3() -> Kit:
    return kit(tiny("cogview", 0), vae(4), prompts(), diffusers.CogVideoXDDIMScheduler())


def cogview4(channels: int = 4) -> Kit:
    return kit(tiny("cogview", 1, in_channels=channels), vae(4), prompts(), EULER(**LINEAR))


def glm_image() -> Kit:
    call = dict(prior_token_ids=torch.arange(80)[None] % 32, **prompts())
    coder = vae(4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    return kit(tiny("glm-image"), coder, call, EULER(**LINEAR))


def lumina2() -> Kit:
    return kit(tiny("lumina2"), vae(4), masked())


def lumina_next() -> Kit:
    return kit(tiny("lumina-next"), vae(4), masked())


def aura_flow() -> Kit:
    return kit(tiny("aura-flow"), vae(4), masked())


def ideogram4() -> Kit:
    """Its packed texts follow what the prompts say."""
    one = MODELS["ideogram4"][0].inputs(1, padding=2)

    def encoded(prompt: Any, **_: Any) -> tuple[Any, ...]:
        listed = [prompt] if isinstance(prompt, str) else prompt
        features = one["encoder_hidden_states"]
        rest = (
            one[name].repeat(len(listed), *[1] * (one[name].ndim - 1))
            for name in ("position_ids", "segment_ids", "indicator")
        )
        return (texts(listed, *features.shape[1:]) * (features != 0), *rest)

    call = dict(prompt="a kite", guidance_scale=2.0, guidance_schedule=None, max_sequence_length=8)
    coder = vae(1, "AutoencoderKLFlux2")
    made = kit(tiny("ideogram4"), coder, call, unconditional_transformer=tiny("ideogram4"))
    made.setup = answering("encode_prompt", encoded)
    return made


def bria_fibo(prompt: str = "{}", coder: Any = None) -> Kit:
    """The text encoder's layers follow what the prompts say."""

    def encoded(prompt: Any, num_images_per_prompt: int = 1, **_: Any) -> tuple[Any, ...]:
        text = texts(prompt, 6, 16).repeat_interleave(num_images_per_prompt, 0)
        away, rows = texts(["dull"], 6, 16).expand_as(text), len(text)
        valid = [torch.ones(rows, 6), torch.ones(rows, 6)]
        layers = [texts(prompt, 6, 12).repeat_interleave(num_images_per_prompt, 0)] * 4
        return text, away, torch.zeros(6, 3), *valid, layers, [layer.flip(1) for layer in layers]

    made = kit(tiny("bria-fibo"), coder or vae(4), dict(prompt=prompt))
    made.setup = answering("encode_prompt", encoded)
    return made


def bria_fibo_edit() -> Kit:
    edited = dict(image=pil(128, 160), _auto_resize=False)
    return bria_fibo('{"edit_instruction": "a"}', _joy_vae()).but(edited)


def bria_fibo_2() -> Kit:
    call = prompts(2, 6, 16) | masks("prompt_embeds_mask", front=True)
    return kit(tiny("bria-fibo-2"), vae(4, "AutoencoderKLFlux2"), call)


def ernie_image() -> Kit:
    text = {name: [value[0, : 6 - place]] for place, (name, value) in enumerate(prompts().items())}
    return kit(tiny("ernie-image"), vae(1, "AutoencoderKLFlux2"), text)


def nucleus_image() -> Kit:
    model = tiny("nucleus-image", patch_size=2, out_channels=1)
    coder = wan_vae(1, "AutoencoderKLQwenImage")
    return kit(model, coder, masked("prompt_embeds_mask"), EULER(**DYNAMIC), processor=Processor())


def prx(channels: int = 4) -> Kit:
    call = dict(use_resolution_binning=False, **masked())
    return kit(tiny("prx", in_channels=channels), vae(4), call, prompt_max_tokens=6, default_sample_size=16)


def _joy_vae() -> Any:
    return wan_vae(4, temperal_downsample=[False, True, True])


def joyimage_edit() -> Kit:
    call = dict(image=pil(128, 160), **masked("prompt_embeds_mask"))
    made = kit(tiny("joyimage-edit"), _joy_vae(), call)
    made.setup = lambda pipe: answering("get_default_height_width", lambda *_, **__: (128, 160))(
        pipe.vae_image_processor
    )
    return made


def joyimage_edit_plus() -> Kit:
    def encoded(prompt: list[str], **_: Any) -> tuple[Any, Any]:
        text = texts(prompt, 6, 16)
        return text, torch.ones(len(text), 6, dtype=torch.bool)

    def setup(pipe: Any) -> None:
        pipe.image_processor.get_default_height_width = lambda *_, **__: (32, 48)
        pipe.encode_prompt_multiple_images = encoded

    call = dict(images=[[pil(32, 48)]], prompt="a kite", negative_prompt="negative")
    made = kit(tiny("joyimage-edit-plus"), _joy_vae(), call)
    made.setup = setup
    return made


def pixart() -> Kit:
    call = dict(negative_prompt=None, use_resolution_binning=False, **masked())
    return kit(tiny("pixart"), vae(4), call, diffusers.DPMSolverMultistepScheduler(), **PAG)


DIT_SHARED = (
    "num_attention_heads attention_head_dim in_channels patch_size sample_size hidden_size cross_attention_dim "
    "cross_attention_dim_t5 pooled_projection_dim text_len text_len_t5 use_style_cond_and_image_meta_size"
)


def hunyuan_dit() -> Kit:
    call = dict(use_resolution_binning=False, **masked(), **prompts(7, 16, name="prompt_embeds_2"))
    call |= masks("prompt_attention_mask_2", 7, front=True)
    model, scheduler = tiny("hunyuan-dit"), diffusers.DDPMScheduler()
    return kit(model, vae(4), call, scheduler, requires_safety_checker=False, **PAG)


def hunyuan_dit_controlnet() -> Kit:
    controlnet = part_of("HunyuanDiT2DControlNetModel", "hunyuan-dit", DIT_SHARED, transformer_num_layers=4)
    return hunyuan_dit().but(dict(control_image=picture()), controlnet=controlnet)
