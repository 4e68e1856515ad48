"""Motif-Video: joint attention over video, then image and text; the last blocks decode over the video twice.

Those decoder blocks attend over their own video tokens and the encoder's, with no text: two grids in one sequence,
which stay dense. Text cross-attention and the token refiner are left out.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from dit_accel.adapters import Adapter, latents_grid

from .hunyuan_video import HUNYUAN_ROPE


def decoder_blocks(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the decoder blocks' attention: the last single blocks."""
    last, count = config["num_single_layers"], config["num_decoder_layers"]
    return tuple(f"single_transformer_blocks.{index}.attn" for index in range(last - count, last))


MOTIF_VIDEO = Adapter(
    name="motif-video",
    transformers=("MotifVideoTransformer3DModel",),
    self_attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    always_dense=decoder_blocks,
    grid=partial(latents_grid, text="after", joined=("image_embeds", "encoder_hidden_states")),
    rope=HUNYUAN_ROPE,
    joined_text="text comes in beside the joined attention too, by cross-attention",
)
