"""AuraFlow: register tokens and text first, then the image, in every block."""

from collections.abc import Mapping
from typing import Any

from dit_accel.adapter import ONE_FRAME, Adapter, Grid, latents_grid

REGISTERS = 8
"""Learned tokens in front of the text."""


def behind_registers(config: Any, inputs: Mapping[str, Any]) -> Grid:
    """Read the grid off latents [B, C, H, W]."""
    frames, height, width, before, after = latents_grid(config, inputs, frames_axis=None, text="before")
    return frames, height, width, before + REGISTERS, after


AURA_FLOW = Adapter(
    name="aura-flow",
    transformers=("AuraFlowTransformer2DModel",),
    self_attention=("joint_transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    grid=behind_registers,
    refused={"radial": ONE_FRAME},
)
