"""Kandinsky 5 and 6: video attends to itself; text, and sound in 6, come in by cross-attention or beside it.

The latents are [B, T, H, W, C]. Checkpoints that pass their own sparse attention (``attention_type="nabla"``) are
refused at the first sparse call; ``pipe.transformer.register_to_config(attention_type="regular")`` makes them dense.
Kandinsky 6 appends a reference image as a last frame, which counts as text.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from dit_accel.adapters import (
    VISUAL_AXES,
    Adapter,
    BlockList,
    Grid,
    Guidance,
    Rope,
    by_config,
    latents_grid,
    read_sizes,
)
from dit_accel.adapters.rope_axes import fixed_lengths

from .released import released


def frames_before_reference(config: Any, inputs: Mapping[str, Any]) -> Grid:
    """Read the grid off the latents; with token types, the last frame is a reference image."""
    frames, height, width, *_ = latents_grid(config, inputs, frames_axis=1, channels_last=True)
    reference = inputs.get("visual_token_type_ids") is not None
    return frames - reference, height, width, 0, reference * height * width


kandinsky_sizes = partial(
    read_sizes, layers=("num_visual_blocks",), heads=None, head_dim="axes_dims", width="model_dim", ffn_dim="ff_dim"
)
"""Reads the sizes, by the names of the published code."""

ROPE = Rope(
    owner="visual_rope_embeddings",
    form="angles",
    values="matrix",
    parts=("args_0", "args_1", "args_2"),
    axes=by_config("axes_dims", VISUAL_AXES, 10000.0),
    max_positions=fixed_lengths(frames=128, height=128, width=128),
)

KANDINSKY5 = Adapter(
    name="kandinsky-5",
    transformers=("Kandinsky5Transformer3DModel",),
    guidance=Guidance(
        in_turn=("Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline", "Kandinsky5T2IPipeline", "Kandinsky5I2IPipeline"),
        rows={"visual_rope_pos": None, "text_rope_pos": None},
    ),
    self_attention=("visual_transformer_blocks.*.self_attention",),
    sizes=kandinsky_sizes,
    grid=partial(latents_grid, frames_axis=1, channels_last=True),
    rope=ROPE,
    families=released("kandinsky-5"),
)
KANDINSKY6 = Adapter(
    name="kandinsky-6",
    transformers=("Kandinsky6Transformer3DModel",),
    guidance=Guidance(rows={"visual_rope_pos": None}),
    self_attention=("visual_transformer_blocks.*.video_dec_block.self_attention",),
    blocks=(BlockList(pattern="visual_transformer_blocks.*", takes=("vis", "aud"), gives=(0, 1), joined=True),),
    sizes=kandinsky_sizes,
    grid=frames_before_reference,
    rope=replace(ROPE, parts=("angles_0", "angles_1", "angles_2")),
    families=released("kandinsky-6"),
)
