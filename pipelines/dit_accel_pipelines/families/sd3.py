"""Stable Diffusion 3 and 3.5: the image first, then text, in one attention.

The second attention of 3.5 medium's first blocks sees the image alone.
"""

from dataclasses import replace
from functools import partial

from dit_accel.adapters.adapter import Adapter, Family, latents_grid
from dit_accel.adapters.guidance import Guidance
from dit_accel.adapters.joined_text import JoinedText
from dit_accel.adapters.sizes import read_sizes

from .perturbation import with_perturbation

SD3_MEDIUM = Family(
    name="sd3-medium",
    repo="stabilityai/stable-diffusion-3-medium-diffusers",
    layers=24,
    heads=24,
    head_dim=64,
    ffn_dim=6144,
    patch=(1, 2, 2),
    vae=(1, 8),
    text_tokens=77 + 256,  # CLIP and T5
    height=1024,
    width=1024,
    num_frames=1,
    num_inference_steps=28,
)
SD35_LARGE = replace(
    SD3_MEDIUM,
    name="sd3.5-large",
    repo="stabilityai/stable-diffusion-3.5-large",
    layers=38,
    heads=38,
    ffn_dim=9728,
)

SD3 = Adapter(
    name="sd3",
    transformers=("SD3Transformer2DModel",),
    flow=True,
    guidance=Guidance(
        together=(
            "StableDiffusion3Pipeline",
            "StableDiffusion3Img2ImgPipeline",
            "StableDiffusion3InpaintPipeline",
            "StableDiffusion3ControlNetPipeline",
            "StableDiffusion3ControlNetInpaintingPipeline",
        ),
        own={
            "StableDiffusion3PAGPipeline": "it guides by perturbed attention of its own",
            "StableDiffusion3PAGImg2ImgPipeline": "it guides by perturbed attention of its own",
        },
        rows={"skip_layers": None},
    ),
    self_attention=("transformer_blocks.*.attn",),
    side_attention=("transformer_blocks.*.attn2",),
    sizes=partial(read_sizes, mlp_ratio=4.0),
    grid=partial(latents_grid, frames_axis=None, text="after"),
    variable_text_length=True,
    rope="SD3 adds sinusoidal positions to the patches",
    joined_text=JoinedText(place="after"),
    families=with_perturbation(SD3_MEDIUM, SD35_LARGE),
    makes_images=True,
)
