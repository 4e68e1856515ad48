"""The image pipelines of `tiny_stock`: what each is assembled of, and how it is called; prompts come as embeddings."""

from functools import partial
from typing import Any

import diffusers
import tiny_parts as parts
import torch
from diffusers.modular_pipelines.flux3 import modular_blocks_flux3
from tiny_models import MODELS
from tiny_parts import EDITED, INPAINTED, Kit, Stock, masked, masks, picture, pil, prompts, texts, tiny, vae, wan_vae

DYNAMIC = dict(use_dynamic_shifting=True)
LINEAR = dict(DYNAMIC, time_shift_type="linear")
PAG = {"pag_applied_layers": "blocks.1"}
QWEN_VAE = "AutoencoderKLQwenImage"
IMAGE = ("image",)
LARGE = dict(max_area=128 * 160, _auto_resize=False)
CONTROLLED = dict(control_image=picture(), control_mask=parts.mask())

kit = partial(parts.kit_of, parts.SIZE)


def positive(name: str = "prompt_embeds", *shape: int) -> dict[str, Any]:
    """The embeddings of the prompt alone."""
    return {name: prompts(*shape, name=name)[name]}


def listed(*front: int) -> dict[str, Any]:
    """Embeddings in lists, of which the negative ones are shorter by so many tokens as stand second."""
    return {name: [value[0, : 6 - less]] for (name, value), less in zip(prompts().items(), front, strict=True)}


def flux(channels: int = 4) -> Kit:
    call = positive() | positive("pooled_prompt_embeds", 8)
    return kit(tiny("flux", in_channels=channels, out_channels=4), vae(1), call)


def flux_controlnet() -> Kit:
    config = {**MODELS["flux"][0].config, "num_layers": 1, "num_single_layers": 1}
    return flux().but(dict(control_image=picture()), controlnet=parts.build("FluxControlNetModel", config))


def visual_cloze() -> Kit:
    """A picture is the lower right one of two rows of two; all are laid side by side."""
    text = prompts()["prompt_embeds"], torch.randn(1, 8), torch.zeros(6, 3)

    def setup(pipe: Any) -> None:
        for part in (pipe, getattr(pipe, "generation_pipe", pipe), getattr(pipe, "upsampling_pipe", pipe)):
            part.encode_prompt = lambda **_: text

    call = dict(
        image=[[pil(64, 64), pil(64, 64)], [pil(64, 64), None]], task_prompt="a", content_prompt="b",
        upsampling_height=64, upsampling_width=64, num_inference_steps=3, output_type="latent",
    )  # fmt: skip
    return Kit(dict(flux(4 + 4 + 256).parts, resolution=64), call, setup)


def longcat() -> Kit:
    call = dict(guidance_scale=3.0, prompt="a kite", negative_prompt="dull")
    encoded = parts.answering("_encode_prompt", lambda prompt, image=None: texts(prompt, 6, 16))
    return kit(tiny("flux-kin", 1, in_channels=64), vae(16), call, None, encoded, text_processor=parts.Processor())


def flux2() -> Kit:
    return kit(tiny("flux2"), vae(1, "AutoencoderKLFlux2"), prompts())


def flux3(blocks: str = "Flux3CoreDenoiseStep") -> Kit:
    """FLUX.3's blocks behind the text encoder; diffusers has no other pipeline of it."""
    pipe = getattr(modular_blocks_flux3, blocks)().init_pipeline()
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=2.0)
    pipe.update_components(transformer=tiny("flux3", flow_map=False), scheduler=parts.EULER(), guider=guider)
    pipe.set_progress_bar_config(disable=True)
    return Kit(pipe=pipe, call=dict(height=128, width=160, num_inference_steps=3, output="latents", **prompts()))


def chroma() -> Kit:
    def setup(pipe: Any) -> None:
        pipe.transformer.register_to_config(guidance_embeds=False)  # which inpainting asks for

    return kit(tiny("chroma"), vae(1), dict(negative_prompt=None, **masked()), setup=setup)


def sd3(number: int = 1, channels: int = 4) -> Kit:
    """With dual attention, or without: diffusers' own PAG does not know it."""
    model = tiny("sd3", number, in_channels=channels, out_channels=channels)
    return kit(model, vae(channels), prompts() | prompts(8, name="pooled_prompt_embeds"), **PAG)


def sd3_controlnet(extra: int = 0) -> Kit:
    config = {**MODELS["sd3"][0].config, "num_layers": 1, "extra_conditioning_channels": extra}
    return sd3().but(CONTROLLED, controlnet=parts.build("SD3ControlNetModel", config))


def qwen_image(**config: Any) -> Kit:
    call = dict(true_cfg_scale=2.0, **masked("prompt_embeds_mask"))
    return kit(tiny("qwen-image", **config), wan_vae(1, QWEN_VAE), call, parts.EULER(**DYNAMIC))


def qwen_image_layered() -> Kit:
    coder, encoder = wan_vae(1, QWEN_VAE, input_channels=4), type("Encoder", (), {"dtype": torch.float32})()
    call = dict(image=pil(128, 160, "RGBA"), prompt="a", layers=1, output_type="pt")
    return qwen_image(use_layer3d_rope=True, use_additional_t_cond=True).but(call, text_encoder=encoder, vae=coder)


def qwen_image_controlnet(**config: Any) -> Kit:
    controlnet = parts.part_of("QwenImageControlNetModel", "qwen-image", num_layers=1, out_channels=1, **config)
    return qwen_image().but(CONTROLLED, controlnet=controlnet)


def qwen_image_21() -> Kit:
    coder = wan_vae(4, "AutoencoderKLQwenImage21", decoder_base_dim=4, dim_mult=[1] * 5)
    call = dict(true_cfg_scale=2.0, **masked("prompt_embeds_mask"))
    return kit(tiny("qwen-image-2.1"), coder, call, parts.EULER(**DYNAMIC), processor=parts.Processor())


def z_image(call: Any = None, **config: Any) -> Kit:
    return kit(tiny("z-image", **config), vae(4), call or listed(0, 0))


def z_image_controlnet(channels: int = 4) -> Kit:
    made = z_image()
    config = dict(
        control_layers_places=[0, 2], control_refiner_layers_places=[0], control_in_dim=channels,
        add_control_noise_refiner="control_noise_refiner", dim=32, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
    )  # fmt: skip
    controlnet = parts.build("ZImageControlNetModel", config)
    diffusers.ZImageControlNetModel.from_transformer(controlnet, made.parts["transformer"])
    return made.but(dict(control_image=picture(), image=picture(), mask_image=parts.mask()), controlnet=controlnet)


def z_image_omni() -> Kit:
    embeds = {name: [[value[0], value[0, :3], value[0, :2]]] for name, value in prompts().items()}

    def seen(images: Any, batch_size: int, **_: Any) -> Any:
        return [[torch.ones(2, 3, 8) for _ in images or []] for _ in range(batch_size)]

    made = z_image(dict(image=[pil(64, 64)], **embeds), siglip_feat_dim=8)
    made.parts["vae"].to(torch.bfloat16)  # in which it gets its pictures
    made.setup = parts.answering("prepare_siglip_embeds", seen)
    return made


def krea2() -> Kit:
    call = prompts(6, 2, 16) | masks("prompt_embeds_mask", front=True)
    layers = dict(text_encoder_select_layers=(1, 2))
    return kit(tiny("krea2"), wan_vae(1, QWEN_VAE), call, parts.EULER(**DYNAMIC), **layers)


def hunyuan_image(model: Any, kind: str, channels: int, *, vae: dict[str, Any], **call: Any) -> Kit:
    coder = dict(
        in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(32,) * 4, layers_per_block=1,
        spatial_compression_ratio=8, scaling_factor=1.0, downsample_match_channel=False, upsample_match_channel=False,
    )  # fmt: skip
    guider = diffusers.AdaptiveProjectedMixGuidance(guidance_scale=2.0, enabled=True)
    call = dict(height=64, width=80, **masked("prompt_embeds_mask"), **call)
    return kit(model, parts.build(f"AutoencoderKLHunyuanImage{kind}", coder | vae), call, guider=guider)


def hunyuan_image_first() -> Kit:
    second = prompts(3, 12, name="prompt_embeds_2") | masks("prompt_embeds_mask_2", 3, front=True)
    return hunyuan_image(tiny("hunyuan-image"), "", 4, vae=dict(sample_size=64), **second)


def hunyuan_image_refiner() -> Kit:
    model = tiny("hunyuan-image", 1, in_channels=8, guidance_embeds=True)
    return hunyuan_image(model, "Refiner", 2, vae=dict(temporal_compression_ratio=1), image=picture(64, 80))


def hidream() -> Kit:
    call = prompts(name="prompt_embeds_t5") | prompts(8, name="pooled_prompt_embeds")
    llama = prompts(1, 7, 12, name="prompt_embeds_llama3")
    call |= {name: value.transpose(0, 1).repeat(4, 1, 1, 1) for name, value in llama.items()}
    return kit(tiny("hidream"), vae(4), call, setup=lambda pipe: setattr(pipe, "default_sample_size", 20))


def cogview4(channels: int = 4) -> Kit:
    return kit(tiny("cogview", 1, in_channels=channels), vae(4), prompts(), parts.EULER(**LINEAR))


def glm_image() -> Kit:
    call = dict(prior_token_ids=torch.arange(80)[None] % 32, **prompts())
    return kit(tiny("glm-image"), vae(4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4), call, parts.EULER(**LINEAR))


def ideogram4() -> Kit:
    """Its packed texts follow what the prompts say."""
    one = MODELS["ideogram4"][0].inputs(1, padding=2)

    def encoded(prompt: Any, **_: Any) -> tuple[Any, ...]:
        several = [prompt] if isinstance(prompt, str) else prompt
        features = one["encoder_hidden_states"]
        rest = (one[name].expand(len(several), *one[name].shape[1:]) for name in ("position_ids", "segment_ids"))
        text = texts(several, *features.shape[1:]) * (features != 0)
        return text, *rest, one["indicator"].repeat(len(several), 1)

    call = dict(prompt="a kite", guidance_scale=2.0, guidance_schedule=None, max_sequence_length=8)
    second = dict(unconditional_transformer=tiny("ideogram4"))
    coder, setup = vae(1, "AutoencoderKLFlux2"), parts.answering("encode_prompt", encoded)
    return kit(tiny("ideogram4"), coder, call, None, setup, **second)


def bria_fibo(prompt: str = "{}", coder: Any = None, **call: Any) -> Kit:
    """The text encoder's layers follow what the prompts say."""

    def encoded(prompt: Any, num_images_per_prompt: int = 1, **_: Any) -> tuple[Any, ...]:
        text = texts(prompt, 6, 16).repeat_interleave(num_images_per_prompt, 0)
        away, rows = texts(["dull"], 6, 16).expand_as(text), len(text)
        valid = [torch.ones(rows, 6), torch.ones(rows, 6)]
        layers = [texts(prompt, 6, 12).repeat_interleave(num_images_per_prompt, 0)] * 4
        return text, away, torch.zeros(6, 3), *valid, layers, [layer.flip(1) for layer in layers]

    setup = parts.answering("encode_prompt", encoded)
    return kit(tiny("bria-fibo"), coder or vae(4), dict(prompt=prompt, **call), setup=setup)


def bria_fibo_2() -> Kit:
    call = prompts(2, 6, 16) | masks("prompt_embeds_mask", front=True)
    return kit(tiny("bria-fibo-2"), vae(4, "AutoencoderKLFlux2"), call)


def nucleus_image() -> Kit:
    model, call = tiny("nucleus-image", patch_size=2, out_channels=1), masked("prompt_embeds_mask")
    return kit(model, wan_vae(1, QWEN_VAE), call, parts.EULER(**DYNAMIC), processor=parts.Processor())


def prx(channels: int = 4) -> Kit:
    call = dict(use_resolution_binning=False, **masked())
    return kit(tiny("prx", in_channels=channels), vae(4), call, prompt_max_tokens=6, default_sample_size=16)


def joy_vae() -> Any:
    return wan_vae(4, temperal_downsample=[False, True, True])


def joyimage_edit() -> Kit:
    def setup(pipe: Any) -> None:
        pipe.vae_image_processor.get_default_height_width = lambda *_, **__: (128, 160)

    return kit(tiny("joyimage-edit"), joy_vae(), dict(image=pil(128, 160), **masked("prompt_embeds_mask")), setup=setup)


def joyimage_edit_plus() -> Kit:
    def encoded(prompt: list[str], **_: Any) -> tuple[Any, Any]:
        text = texts(prompt, 6, 16)
        return text, torch.ones(len(text), 6, dtype=torch.bool)

    def setup(pipe: Any) -> None:
        pipe.image_processor.get_default_height_width = lambda *_, **__: (32, 48)
        pipe.encode_prompt_multiple_images = encoded

    call = dict(images=[[pil(32, 48)]], prompt="a kite", negative_prompt="negative")
    return kit(tiny("joyimage-edit-plus"), joy_vae(), call, setup=setup)


def pixart() -> Kit:
    call = dict(negative_prompt=None, use_resolution_binning=False, **masked())
    return kit(tiny("pixart"), vae(4), call, diffusers.DPMSolverMultistepScheduler(), **PAG)


def hunyuan_dit() -> Kit:
    call = dict(use_resolution_binning=False, **masked(), **prompts(7, 16, name="prompt_embeds_2"))
    call |= masks("prompt_attention_mask_2", 7, front=True)
    scheduler = diffusers.DDPMScheduler()
    return kit(tiny("hunyuan-dit"), vae(4), call, scheduler, requires_safety_checker=False, **PAG)


def hunyuan_dit_controlnet() -> Kit:
    controlnet = parts.part_of("HunyuanDiT2DControlNetModel", "hunyuan-dit", transformer_num_layers=4)
    return hunyuan_dit().but(dict(control_image=picture()), controlnet=controlnet)


NO_NEGATIVE = dict(negative_prompt=None)
REFERENCES = dict(
    image=[[pil(32, 48)]], prior_token_image_ids=[torch.arange(6)],
    source_image_grid_thw=[torch.tensor([[1, 2, 3]])],
)  # fmt: skip
TWO_PICTURES = dict(image=[pil(128, 160), pil(64, 64)])
QWEN_INPAINTED = dict(INPAINTED, image=pil(128, 160))
PAGED = dict(pag_scale=2.0)

IMAGE_PIPELINES: dict[str, Stock] = {
    "FluxPipeline": Stock(flux),
    "FluxImg2ImgPipeline": Stock(flux, EDITED),
    "FluxInpaintPipeline": Stock(flux, INPAINTED),
    "FluxFillPipeline": Stock(partial(flux, 4 + 4 + 256), dict(image=picture(), mask_image=parts.mask())),
    "FluxControlPipeline": Stock(partial(flux, 8), dict(control_image=picture())),
    "FluxControlImg2ImgPipeline": Stock(partial(flux, 8), dict(EDITED, control_image=picture())),
    "FluxControlInpaintPipeline": Stock(partial(flux, 8), dict(INPAINTED, control_image=picture())),
    "FluxControlNetPipeline": Stock(flux_controlnet),
    "FluxControlNetImg2ImgPipeline": Stock(flux_controlnet, EDITED),
    "FluxControlNetInpaintPipeline": Stock(flux_controlnet, INPAINTED),
    "FluxKontextPipeline": Stock(flux, dict(LARGE, image=picture(32, 48))),
    "FluxKontextInpaintPipeline": Stock(flux, INPAINTED | LARGE),
    "VisualClozeGenerationPipeline": Stock(visual_cloze, repeated=IMAGE),
    "VisualClozePipeline": Stock(visual_cloze, repeated=IMAGE),
    "OvisImagePipeline": Stock(lambda: kit(tiny("flux-kin", 2), vae(1), NO_NEGATIVE | prompts())),
    "BriaPipeline": Stock(lambda: kit(tiny("flux-kin", 0, in_channels=16), vae(4), NO_NEGATIVE | prompts())),
    "LongCatImagePipeline": Stock(longcat, dict(enable_prompt_rewrite=False)),
    "LongCatImageEditPipeline": Stock(longcat, dict(image=pil(128, 160)), parts.small_references((160, 128))),
    "Flux2Pipeline": Stock(flux2),
    "Flux2Pipeline, references": Stock(flux2, dict(image=[pil(64, 64)])),
    "Flux2KleinPipeline": Stock(flux2),
    "Flux2KleinKVPipeline": Stock(flux2, dict(image=[pil(64, 64)])),
    "Flux2KleinInpaintPipeline": Stock(flux2, INPAINTED),
    "Flux3ModularPipeline": Stock(flux3),
    "Flux3ModularPipeline, references": Stock(
        partial(flux3, "Flux3ImageConditionedCoreDenoiseStep"), dict(image_cond_latents=[parts.latents(4, 2, 3)])
    ),
    "ChromaPipeline": Stock(chroma),
    "ChromaImg2ImgPipeline": Stock(chroma, EDITED),
    "ChromaInpaintPipeline": Stock(chroma, INPAINTED),
    "StableDiffusion3Pipeline": Stock(sd3),
    "StableDiffusion3Img2ImgPipeline": Stock(sd3, EDITED),
    "StableDiffusion3InpaintPipeline": Stock(partial(sd3, 0, 16), INPAINTED),
    "StableDiffusion3PAGPipeline": Stock(partial(sd3, 0), PAGED),
    "StableDiffusion3PAGImg2ImgPipeline": Stock(partial(sd3, 0), EDITED | PAGED),
    "StableDiffusion3ControlNetPipeline": Stock(sd3_controlnet),
    "StableDiffusion3ControlNetInpaintingPipeline": Stock(partial(sd3_controlnet, 1)),
    "QwenImagePipeline": Stock(qwen_image),
    "QwenImageImg2ImgPipeline": Stock(qwen_image, EDITED),
    "QwenImageInpaintPipeline": Stock(qwen_image, INPAINTED),
    "QwenImageEditPipeline": Stock(qwen_image, dict(image=pil(128, 160)), parts.small_references((48, 32, None))),
    "QwenImageEditInpaintPipeline": Stock(
        qwen_image, QWEN_INPAINTED, parts.small_references((160, 128, None)), repeated=IMAGE
    ),
    "QwenImageEditPlusPipeline": Stock(qwen_image, TWO_PICTURES, parts.small_references((48, 32))),
    "QwenImageLayeredPipeline": Stock(qwen_image_layered, wrap=parts.small_references((160, 128))),
    "QwenImageControlNetPipeline": Stock(qwen_image_controlnet),
    "QwenImageControlNetInpaintPipeline": Stock(partial(qwen_image_controlnet, extra_condition_channels=4)),
    "QwenImage21Pipeline": Stock(qwen_image_21),
    "QwenImage21Pipeline, no KV cache": Stock(qwen_image_21, dict(use_kv_cache=False)),
    "ZImagePipeline": Stock(z_image, off=0.0),
    "ZImageImg2ImgPipeline": Stock(z_image, EDITED, off=0.0),
    "ZImageInpaintPipeline": Stock(z_image, INPAINTED, off=0.0),
    "ZImageControlNetPipeline": Stock(z_image_controlnet, off=0.0),
    "ZImageControlNetInpaintPipeline": Stock(partial(z_image_controlnet, 4 + 4 + 1), off=0.0),
    "ZImageOmniPipeline": Stock(z_image_omni, off=0.0),
    "Krea2Pipeline": Stock(krea2),
    "HunyuanImagePipeline": Stock(hunyuan_image_first),
    "HunyuanImageRefinerPipeline": Stock(hunyuan_image_refiner),
    "HiDreamImagePipeline": Stock(hidream),
    "CogView3PlusPipeline": Stock(
        lambda: kit(tiny("cogview", 0), vae(4), prompts(), diffusers.CogVideoXDDIMScheduler())
    ),
    "CogView4Pipeline": Stock(cogview4),
    "CogView4ControlPipeline": Stock(partial(cogview4, 8), dict(control_image=picture())),
    "GlmImagePipeline": Stock(glm_image),
    "GlmImagePipeline, references": Stock(glm_image, REFERENCES),
    "Lumina2Pipeline": Stock(lambda: kit(tiny("lumina2"), vae(4), masked())),
    "LuminaPipeline": Stock(lambda: kit(tiny("lumina-next"), vae(4), masked())),
    "Ideogram4Pipeline": Stock(ideogram4, scale="guidance_scale"),
    "AuraFlowPipeline": Stock(lambda: kit(tiny("aura-flow"), vae(4), masked())),
    "BriaFiboPipeline": Stock(bria_fibo),
    "BriaFiboEditPipeline": Stock(
        lambda: bria_fibo('{"edit_instruction": "a"}', joy_vae(), image=pil(128, 160), _auto_resize=False)
    ),
    "BriaFibo2Pipeline": Stock(bria_fibo_2),
    "ErnieImagePipeline": Stock(lambda: kit(tiny("ernie-image"), vae(1, "AutoencoderKLFlux2"), listed(0, 1))),
    "NucleusMoEImagePipeline": Stock(nucleus_image),
    "PRXPipeline": Stock(prx),
    "PRXPixelPipeline": Stock(partial(prx, 3), dict(height=16, width=20)),
    "JoyImageEditPipeline": Stock(joyimage_edit),
    "JoyImageEditPlusPipeline": Stock(joyimage_edit_plus),
    "PixArtAlphaPipeline": Stock(pixart),
    "PixArtSigmaPipeline": Stock(pixart),
    "PixArtSigmaPAGPipeline": Stock(pixart, PAGED),
    "HunyuanDiTPipeline": Stock(hunyuan_dit),
    "HunyuanDiTPAGPipeline": Stock(hunyuan_dit, PAGED),
    "HunyuanDiTControlNetPipeline": Stock(hunyuan_dit_controlnet),
}
"""Pipeline class, and a variant of it -> how it is made."""
