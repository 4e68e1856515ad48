"""FLUX.2 and FLUX.3: text, the packed image, reference images.

FLUX.2's reference images may stand before the image, or come from a key-value cache (Klein KV). FLUX.3's first blocks
see the image alone.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from dit_accel.adapters import JOINT, Adapter, BlockList, Grid, Guidance, JoinedText, Rope, by_config, read_sizes
from dit_accel.adapters.position_ids import ids_grid, last_image, read_once

from .flux import DOUBLE_THEN_JOINED
from .released import released


def _with_cached_references(config: Any, inputs: Mapping[str, Any]) -> Grid | str:
    """Read the grid as `ids_grid` does; with ``kv_cache_mode``, reference images stand between text and image."""
    mode = inputs.get("kv_cache_mode")
    if mode is None:
        return ids_grid(config, inputs)
    image = read_once(inputs["img_ids"], last_image)
    if isinstance(image, str):
        return image
    height, width = image
    before = inputs["encoder_hidden_states"].shape[1] + inputs["hidden_states"].shape[1] - height * width
    if mode == "cached":
        before += inputs["kv_cache"].num_ref_tokens
    return 1, height, width, before, 0


def with_own_references(config: Any, inputs: Mapping[str, Any]) -> Grid | str:
    """Read the grid as `ids_grid` does; reference images are an input of their own."""
    grid, references = ids_grid(config, inputs), inputs.get("image_cond_hidden_states")
    if isinstance(grid, str) or references is None:
        return grid
    return *grid[:4], references.shape[1]


FLUX2 = Adapter(
    name="flux2",
    transformers=("Flux2Transformer2DModel",),
    guidance=Guidance(
        alone=("Flux2Pipeline", "Flux2KleinKVPipeline", "Flux2ModularPipeline"), embedded="guidance_embeds"
    ),
    self_attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    blocks=DOUBLE_THEN_JOINED,
    sizes=partial(read_sizes, gated=True, patch=(1, 2, 2)),
    grid=_with_cached_references,
    separate_text_attention=True,  # while the cache is filled, references attend to themselves
    rope=Rope(owner="pos_embed", axes=by_config("axes_dims_rope", ("image", "height", "width", "text"), 2000.0)),
    joined_text=JoinedText(place="before", alone=("kv_cache",)),
    references=("hidden_states", "img_ids"),
    split_text="before",
    families=released("flux2", forwards_per_step=1),
    makes_images=True,
)
FLUX3 = Adapter(
    name="flux3",
    transformers=("Flux3Transformer2DModel",),
    guidance=Guidance(
        alone=("Flux3DistilledModularPipeline",), rows={"txt_ids": None, "img_ids": None, "image_cond_ids": None}
    ),
    self_attention=("mode_blocks.image.*.attn", "single_transformer_blocks.*.attn"),
    blocks=(
        BlockList(pattern="mode_blocks.image.*"),
        BlockList(pattern="single_transformer_blocks.*", takes=JOINT, gives=(1, 0)),
    ),
    sizes=partial(read_sizes, gated=True, patch=(1, 2, 2)),
    grid=with_own_references,
    variable_text_length=True,
    joined_text=JoinedText(place="before"),
    makes_images=True,
    rope=Rope(owner="pos_embed", axes=by_config("axes_dims_rope", ("image", "height", "width", "text"), 10000.0)),
)
