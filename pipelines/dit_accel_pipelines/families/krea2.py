"""Krea 2: text first, then the packed image; padded text is masked."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from dit_accel.adapters import Adapter, BlockList, Grid, Guidance, Rope, by_config, read_sizes
from dit_accel.adapters.position_ids import last_row, read_once


def text_then_image(config: Any, inputs: Mapping[str, Any]) -> Grid | str:
    """Read the grid off ``position_ids``, in which all text stands where the image begins."""
    width = read_once(inputs["position_ids"], last_row)
    if isinstance(width, str):
        return width
    tokens = inputs["hidden_states"].shape[1]
    width = width if tokens % width == 0 else tokens
    return 1, tokens // width, width, inputs["encoder_hidden_states"].shape[1], 0


KREA2 = Adapter(
    name="krea2",
    transformers=("Krea2Transformer2DModel",),
    guidance=Guidance(alone=("Krea2TurboModularPipeline",), in_turn=("Krea2Pipeline",), rows={"position_ids": None}),
    self_attention=("transformer_blocks.*.attn",),
    blocks=(BlockList(pattern="transformer_blocks.*", joined=True),),
    sizes=partial(read_sizes, ffn_dim="intermediate_size", gated=True, patch=(1, 2, 2)),
    grid=text_then_image,
    joined_text="its blocks take text of several layers of the encoder",
    makes_images=True,
    rope=Rope(owner="rotary_emb", axes=by_config("axes_dims_rope", ("image", "height", "width"), 1000.0)),
)
