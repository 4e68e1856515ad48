"""Stable Diffusion 3 and 3.5: the image first, then text, in one attention.

The second attention of 3.5 medium's first blocks sees the image alone.
"""

from functools import partial

from dit_accel.adapters import Adapter, Guidance, JoinedText, latents_grid, read_sizes

from .released import released

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
    families=released("sd3"),
    makes_images=True,
)
