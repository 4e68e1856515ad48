"""Images with text in a cross-attention: PixArt, HunyuanDiT and Lumina-Next."""

from dataclasses import replace
from functools import partial

from dit_accel.adapter import ONE_FRAME, Adapter, latents_grid

PIXART = Adapter(
    name="pixart",
    transformers=("PixArtTransformer2DModel",),
    self_attention=("transformer_blocks.*.attn1",),
    grid=partial(latents_grid, frames_axis=None),
    refused={"radial": ONE_FRAME},
)
HUNYUAN_DIT = replace(
    PIXART, name="hunyuan-dit", transformers=("HunyuanDiT2DModel",), self_attention=("blocks.*.attn1",)
)
LUMINA_NEXT = replace(
    PIXART,
    name="lumina-next",
    transformers=("LuminaNextDiT2DModel",),
    self_attention=("layers.*.attn1",),
    rising_timesteps=True,
)
