"""PRX and Nucleus-Image: only the image asks; its keys are joined by the text's, in front (PRX) or behind (Nucleus)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from dit_accel.adapters.adapter import IMAGE_REFUSED, Adapter, Grid, latents_grid
from dit_accel.adapters.blocks import BlockList
from dit_accel.adapters.rope import Rope
from dit_accel.adapters.rope_axes import by_config

from .qwen_image import QWEN_IMAGE, first_image


def image_then_text(config: Any, inputs: Mapping[str, Any]) -> Grid:
    """Read the grid off ``img_shapes``; text stands behind it."""
    frames, height, width, before, after = first_image(config, inputs)
    return frames, height, width, 0, before + after


PRX = Adapter(
    name="prx",
    transformers=("PRXTransformer2DModel",),
    self_attention=("blocks.*.attention",),
    blocks=(BlockList(pattern="blocks.*"),),
    grid=partial(latents_grid, frames_axis=None, text="before"),
    refused=IMAGE_REFUSED,
    rope=Rope(
        owner="pe_embedder",
        form="theta",
        values="matrix",
        axes=by_config("axes_dim", ("height", "width"), 10000.0, theta_key="theta", default=(32, 32)),
    ),
)
NUCLEUS_IMAGE = Adapter(
    name="nucleus-image",
    transformers=("NucleusMoEImageTransformer2DModel",),
    self_attention=("transformer_blocks.*.attn",),
    blocks=(BlockList(pattern="transformer_blocks.*"),),
    grid=image_then_text,
    refused=IMAGE_REFUSED,
    rope=QWEN_IMAGE.rope,
)
