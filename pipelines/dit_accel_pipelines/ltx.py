"""LTX-Video: packed latents [B, S, C] whose sizes are among the forward's inputs; text comes in by cross-attention."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from dit_accel.adapters.adapter import Adapter, Family, Grid
from dit_accel.adapters.rope import Rope
from dit_accel.adapters.rope_axes import fractions
from dit_accel.adapters.sizes import read_sizes
from dit_accel.errors import ConfigError

LTX_2B = Family(
    name="ltx-video-2b",
    repo="Lightricks/LTX-Video",
    layers=28,
    heads=32,
    head_dim=64,
    ffn_dim=8192,
    patch=(1, 1, 1),
    vae=(8, 32),
    cross_tokens=128,
    height=512,
    width=704,
    num_frames=161,
)
LTX_13B = replace(
    LTX_2B, name="ltx-video-13b", repo="Lightricks/LTX-Video-0.9.7-dev", layers=48, head_dim=128, ffn_dim=16384
)


def packed_grid(config: Any, inputs: Mapping[str, Any]) -> Grid:
    """Read the grid off ``num_frames``, ``height`` and ``width``, which count tokens; those left over stand behind it.

    Raises:
        ConfigError: for a sequence whose tokens are placed by ``video_coords``.
    """
    frames, height, width = (inputs.get(name) for name in ("num_frames", "height", "width"))
    if frames is None or height is None or width is None:
        raise ConfigError(
            "LTX places its tokens by video_coords here, as the condition pipeline does, and that is no grid; use the "
            f"text or image pipeline, or detach (num_frames = {frames}, height = {height}, width = {width})"
        )
    return frames, height, width, 0, inputs["hidden_states"].shape[1] - frames * height * width


LTX = Adapter(
    name="ltx",
    transformers=("LTXVideoTransformer3DModel",),
    self_attention=("transformer_blocks.*.attn1",),
    sizes=partial(read_sizes, mlp_ratio=4.0),
    grid=packed_grid,
    rope=Rope(
        owner="rope",
        form="theta of all axes",
        axes=fractions,
        note="positions are coordinates, which turn many times within a frame: divide all frequencies of an axis by "
        "one number; none of them has a period in frames",
    ),
    families=(LTX_2B, LTX_13B),
)
