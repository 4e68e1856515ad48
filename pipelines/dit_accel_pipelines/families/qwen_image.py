"""Qwen-Image with Edit and Layered: text first, then the packed image and, behind it, further images."""

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

from dit_accel.adapters import Adapter, BlockList, Grid, Guidance, JoinedText, Rope, by_config, read_sizes
from dit_accel.adapters.rope_axes import fixed_lengths

from .released import released

# UltraImage, arXiv 2512.04504, at 4096 x 4096 pixels and more.
ULTRAIMAGE_QWEN = {"indices": (8, 9), "focus_min": 1.0, "focus_max": 1.3}


def first_listed_image(config: Any, inputs: Mapping[str, Any]) -> Grid:
    """Read the grid off ``img_shapes``: the first image of a row; further ones count as text behind it.

    Layered makes all images but the last; they are equally large, and count as frames.
    """
    shapes = inputs["img_shapes"][0]
    frames, height, width = shapes if isinstance(shapes[0], int) else shapes[0]
    if getattr(config, "use_layer3d_rope", False):
        frames = len(shapes) - 1
    after = inputs["hidden_states"].shape[1] - frames * height * width
    return frames, height, width, inputs["encoder_hidden_states"].shape[1], after


QWEN_IMAGE = Adapter(
    name="qwen-image",
    transformers=("QwenImageTransformer2DModel",),
    flow=True,
    guidance=Guidance(
        rows={"img_shapes": "each"},
        rescales={"QwenImage*": "it rescales the guided prediction to the conditional one's norm"},
    ),
    self_attention=("transformer_blocks.*.attn",),
    sizes=partial(read_sizes, mlp_ratio=4.0),
    grid=first_listed_image,
    rope=Rope(
        owner="pos_embed",
        form="tables behind methods",
        values="complex",
        parts=("_compute_video_freqs", "_compute_condition_freqs"),
        asks=(0, 1, 2, 0, 1, 2),  # positions from 0 on, then those below
        axes=by_config("axes_dims_rope", ("image", "height", "width"), 10000.0),
        max_positions=fixed_lengths(height=8192, width=8192),
    ),
    joined_text=JoinedText(place="before", mask="encoder_hidden_states_mask"),
    references=("hidden_states", "img_shapes"),
    split_text="before",
    families=released(
        "qwen-image",
        trained_size=(83, 83),
        beyond=("tiled_vae", "pinned_shift"),
        recipes={"ultraimage": ULTRAIMAGE_QWEN},
    ),
    makes_images=True,
)


def _last_image(config: Any, inputs: Mapping[str, Any]) -> Grid:
    """Read the grid off ``img_shapes``, whose last image is made; text and earlier images stand in front of it.

    Each of the encoder's image slots becomes four tokens.
    """
    shapes = [prod(shape) for shape in inputs["img_shapes"][0]]
    tokens = inputs["img_mask"].shape[1] + 3 * (sum(shapes) // 4)
    return *inputs["img_shapes"][0][-1], tokens - shapes[-1], 0


# Text and earlier images see only what stands before them; the image sees all. So the processor calls attention piece
# by piece, and only the image's call is planned; the others' keys and values are cached after the first step.
QWEN_IMAGE_21 = Adapter(
    name="qwen-image-2.1",
    transformers=("QwenImage21Transformer2DModel",),
    guidance=Guidance(converted=("QwenImage21ModularPipeline",), uncond_tokens="last", rows={"img_shapes": "each"}),
    self_attention=("transformer_blocks.*.attn",),
    blocks=(BlockList(pattern="transformer_blocks.*", joined=True),),
    sizes=partial(read_sizes, gated=True),
    grid=_last_image,
    separate_text_attention=True,
    joined_text="it attends piece by piece, and caches keys of the prompt alone",
    makes_images=True,
    rope=Rope(
        owner="pos_embed",
        form="tables",
        values="complex",
        parts=("freqs",),
        asks=(0, 0, 1, 1, 2, 2),  # positions from 0 on, then those below
        axes=by_config("axes_dims_rope", ("text", "height", "width"), 10000.0),
        text=lambda inputs: ~inputs["img_mask"][0].repeat_interleave(1 + 3 * inputs["img_mask"][0]),
        max_positions=fixed_lengths(height=2048, width=2048),
    ),
)
