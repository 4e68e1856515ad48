"""Allegro: video attends to itself under an additive mask of padded latents; text comes in by cross-attention."""

from dit_accel.adapters.adapter import Adapter
from dit_accel.adapters.blocks import BlockList

ALLEGRO = Adapter(
    name="allegro",
    transformers=("AllegroTransformer3DModel",),
    self_attention=("transformer_blocks.*.attn1",),
    blocks=(BlockList(pattern="transformer_blocks.*"),),
)
