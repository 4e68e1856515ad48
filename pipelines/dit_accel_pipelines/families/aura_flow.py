"""AuraFlow: register tokens and text first, then the image, in every block."""

from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from typing import Any

from dit_accel.adapters import JOINT, Adapter, BlockList, Grid, Guidance, JoinedText, latents_grid, read_sizes

from .released import released

REGISTERS = 8
"""Learned tokens in front of the text."""


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
    families=released("aura-flow"),
    makes_images=True,
)
