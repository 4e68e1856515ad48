"""JoyImage Edit and Edit Plus: the image, then reference images, padding and text."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

from dit_accel.adapters import JOINT, Adapter, BlockList, Grid, Guidance, Rope, by_config, latents_grid, read_sizes


def items_grid(config: Any, inputs: Mapping[str, Any]) -> Grid:
    """Read the grid off latents [B, C, T, H, W], or items [B, N, C, T, H, W], of which the last stands first."""
    frames, height, width, _, text = latents_grid(config, inputs, frames_axis=-3, text="after")
    latents = inputs["hidden_states"]
    items = latents.shape[1] if latents.ndim == 6 else 1
    return frames, height, width, 0, (items - 1) * frames * height * width + text


def first_of_list(config: Any, inputs: Mapping[str, Any]) -> Grid | str:
    """Read the grid off ``shape_list``: the first image of a row; all behind it counts as text."""
    shapes = {tuple(row[0]) for row in inputs["shape_list"]}
    if len(shapes) > 1:
        return f"the rows of the batch make images of different sizes, {sorted(shapes)} tokens; make one image per call"
    (shape,) = shapes
    after = inputs["hidden_states"].shape[1] - prod(shape) + inputs["encoder_hidden_states"].shape[1]
    return *shape, 0, after


joy_sizes = partial(read_sizes, head_dim=None, width="hidden_size", mlp_ratio="mlp_width_ratio")
"""Reads the sizes, by the names of the published code."""

RESCALES = {"JoyImage*": "it rescales the guided prediction to the conditional one's norm"}
ROPE = Rope(
    method="get_rotary_pos_embed",
    axes=by_config("rope_dim_list", ("image", "height", "width"), 256.0, theta_key="theta"),
)

JOY_IMAGE_EDIT = Adapter(
    name="joyimage-edit",
    transformers=("JoyImageEditTransformer3DModel",),
    guidance=Guidance(in_turn=("JoyImageEditPipeline",), rescales=RESCALES),
    self_attention=("double_blocks.*.attn",),
    blocks=(BlockList(pattern="double_blocks.*", takes=JOINT, gives=(0, 1)),),
    sizes=joy_sizes,
    grid=items_grid,
    joined_text="text is packed behind references and padding for the prompt",
    makes_images=True,
    rope=ROPE,
)
JOY_IMAGE_EDIT_PLUS = replace(
    JOY_IMAGE_EDIT,
    name="joyimage-edit-plus",
    transformers=("JoyImageEditPlusTransformer3DModel",),
    guidance=Guidance(together=("JoyImageEditPlusPipeline",), rows={"shape_list": "each"}, rescales=RESCALES),
    grid=first_of_list,
    rope=replace(ROPE, method="_get_rotary_pos_embed_for_range", parts=("config.theta",)),
)
