"""AuraFlow: register tokens and text first, then the image, in every block."""

from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from typing import Any

from dit_accel.adapters.adapter import Adapter, Family, Grid, latents_grid
from dit_accel.adapters.blocks import JOINT, BlockList
from dit_accel.adapters.guidance import Guidance
from dit_accel.adapters.joined_text import JoinedText
from dit_accel.adapters.sizes import read_sizes

REGISTERS = 8
"""Learned tokens in front of the text."""

AURA_FLOW_03 = Family(
    name="aura-flow-0.3",
    repo="fal/AuraFlow-v0.3",
    layers=4 + 32,  # double and single blocks
    heads=12,
    head_dim=256,
    ffn_dim=8192 * 3 // 2,  # gated: three matrices
    patch=(1, 2, 2),
    vae=(1, 8),
    text_tokens=REGISTERS + 256,
    height=1024,
    width=1024,
    num_frames=1,
)


def behind_registers(config: Any, inputs: Mapping[str, Any]) -> Grid:
    """Read the grid off latents [B, C, H, W]."""
    frames, height, width, before, after = latents_grid(config, inputs, frames_axis=None, text="before")
    return frames, height, width, before + REGISTERS, after


AURA_FLOW = Adapter(
    name="aura-flow",
    transformers=("AuraFlowTransformer2DModel",),
    guidance=Guidance(together=("AuraFlowPipeline",)),
    self_attention=("joint_transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    blocks=(
        BlockList(pattern="joint_transformer_blocks.*", takes=JOINT, gives=(1, 0)),
        BlockList(pattern="single_transformer_blocks.*", joined=True),
    ),
    sizes=partial(
        read_sizes,
        layers=("num_mmdit_layers", "num_single_dit_layers"),
        mlp_ratio=Fraction(8, 3),
        multiple_of=256,
        gated=True,
    ),
    grid=behind_registers,
    rope="AuraFlow adds learned positions to the patches",
    joined_text=JoinedText(place="before", registers=REGISTERS),
    families=(AURA_FLOW_03,),
    makes_images=True,
)
