"""HunyuanImage 2.1 and its refiner: the image first, then the text of both encoders, in every block."""

from collections.abc import Mapping
from typing import Any

from dit_accel.adapters import VISUAL_AXES, Adapter, Grid, Rope, by_config

from .released import released


def image_then_texts(config: Any, inputs: Mapping[str, Any]) -> Grid:
    """Read the grid off latents [B, C, H, W], or the refiner's [B, C, 1, H, W]."""
    sizes = inputs["hidden_states"].shape[2:]
    grid = [size // patch for size, patch in zip(sizes, config.patch_size, strict=True)]
    text, glyphs = inputs["encoder_hidden_states"].shape[1], inputs.get("encoder_hidden_states_2")
    if glyphs is not None and config.text_embed_2_dim is not None:
        text += glyphs.shape[1]
    return (grid[0] if len(grid) == 3 else 1), grid[-2], grid[-1], 0, text


HUNYUAN_IMAGE = Adapter(
    name="hunyuan-image",
    transformers=("HunyuanImageTransformer2DModel",),
    self_attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    grid=image_then_texts,
    rope=Rope(owner="rope", axes=by_config("rope_axes_dim", VISUAL_AXES, 256.0, default=(64, 64))),
    joined_text="it takes the texts of two encoders, of which nag makes no negative one",
    families=released("hunyuan-image", patch=(1, 1, 1)),
    makes_images=True,
)
