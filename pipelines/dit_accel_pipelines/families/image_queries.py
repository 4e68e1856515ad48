"""PRX and Nucleus-Image: only the image has queries; text joins its keys, in front (PRX) or behind (Nucleus)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from dit_accel.adapters import Adapter, BlockList, Grid, Guidance, Rope, Sizes, by_config, latents_grid, read_sizes

from .qwen_image import QWEN_IMAGE, first_listed_image


def image_then_text(config: Any, inputs: Mapping[str, Any]) -> Grid:
    """Read the grid off ``img_shapes``; text stands behind it."""
    frames, height, width, before, after = first_listed_image(config, inputs)
    return frames, height, width, 0, before + after


PRX = Adapter(
    name="prx",
    transformers=("PRXTransformer2DModel",),
    guidance=Guidance(together=("PRXPipeline", "PRXPixelPipeline")),
    self_attention=("blocks.*.attention",),
    blocks=(BlockList(pattern="blocks.*"),),
    sizes=partial(read_sizes, layers=("depth",), heads="num_heads", head_dim=None, width="hidden_size", gated=True),
    grid=partial(latents_grid, frames_axis=None, text="before"),
    joined_text="its text has keys alone, and no stream to lay another beside",
    makes_images=True,
    rope=Rope(
        owner="pe_embedder",
        values="matrix",
        axes=by_config("axes_dim", ("height", "width"), 10000.0, theta_key="theta", default=(32, 32)),
    ),
)


DENSE_LAYERS = {
    "leave_first_three_and_last_block_dense": 4,
    "leave_first_three_blocks_dense": 3,
    "leave_first_block_dense": 1,
}
"""``dense_moe_strategy`` -> blocks without experts; any other strategy leaves none."""


def _expert_sizes(config: Mapping[str, Any]) -> Sizes:
    """Read the sizes of Nucleus-Image; the feed-forward's is the mean over blocks with and without experts.

    Experts choose their tokens, ``capacity_factors`` experts a token on average; another one is shared by all.
    """
    layers, width = config["num_layers"], config["num_attention_heads"] * config["attention_head_dim"]
    strategy = config["dense_moe_strategy"] if config["moe_enabled"] else "all_dense"
    dense = layers if strategy == "all_dense" else min(layers, DENSE_LAYERS.get(strategy, 0))
    factors = config["capacity_factors"]
    factor = sum(factors) / len(factors) if isinstance(factors, (list, tuple)) else factors
    routed = round((factor + 1) * config["moe_intermediate_dim"])
    hidden = int(width * config["mlp_ratio"] * 2 / 3) // 128 * 128
    return read_sizes({**config, "ffn_dim": (dense * hidden + (layers - dense) * routed) // layers}, gated=True)


NUCLEUS_IMAGE = Adapter(
    name="nucleus-image",
    transformers=("NucleusMoEImageTransformer2DModel",),
    guidance=Guidance(
        in_turn=("NucleusMoEImagePipeline",),
        rows={"img_shapes": "each"},
        rescales={"NucleusMoE*": "it rescales the guided prediction to the conditional one's norm"},
    ),
    self_attention=("transformer_blocks.*.attn",),
    blocks=(BlockList(pattern="transformer_blocks.*"),),
    sizes=_expert_sizes,
    grid=image_then_text,
    joined_text="its text has keys alone, and no stream to lay another beside",
    makes_images=True,
    rope=QWEN_IMAGE.rope,
)
