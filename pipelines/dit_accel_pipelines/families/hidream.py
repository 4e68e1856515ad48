"""HiDream-I1: the image first, then the tokens of T5 and twice those of Llama.

An image that is not square is padded to ``max_resolution`` with tokens that are not hidden: they count as text.
"""

from collections.abc import Mapping
from typing import Any

from dit_accel.adapters import JOINT, Adapter, BlockList, Grid, Guidance, Rope, Sizes, by_config, read_sizes

from .released import released


def padded_image(config: Any, inputs: Mapping[str, Any]) -> Grid | str:
    """Read the grid off latents [B, C, H, W]."""
    latents, patch = inputs["hidden_states"], config.patch_size
    if latents.ndim != 4:
        return "its latents are patches already, whose positions are not given; pass them as [B, C, H, W]"
    rows, columns = latents.shape[-2:]
    height, width = rows // patch, columns // patch
    padding = 0 if rows == columns else config.max_resolution[0] * config.max_resolution[1] // patch**2 - height * width
    text = inputs["encoder_hidden_states_t5"].shape[1] + 2 * inputs["encoder_hidden_states_llama3"][0].shape[1]
    return 1, height, width, 0, padding + text


def _expert_sizes(config: Mapping[str, Any]) -> Sizes:
    """Read the sizes, where a token passes its activated experts and one of half their width that all share."""
    hidden = 4 * config["num_attention_heads"] * config["attention_head_dim"]
    expert, shared = (-(-(2 * size // 3) // 256) * 256 for size in (hidden, hidden // 2))
    return read_sizes({**config, "ffn_dim": config["num_activated_experts"] * expert + shared}, gated=True)


HIDREAM = Adapter(
    name="hidream",
    transformers=("HiDreamImageTransformer2DModel",),
    guidance=Guidance(together=("HiDreamImagePipeline",), rows={"encoder_hidden_states_llama3": 1}),
    self_attention=("double_stream_blocks.*.block.attn1", "single_stream_blocks.*.block.attn1"),
    blocks=(
        BlockList(pattern="double_stream_blocks.*", takes=JOINT, gives=(0, 1)),
        BlockList(pattern="single_stream_blocks.*", joined=True),
    ),
    sizes=_expert_sizes,
    grid=padded_image,
    timestep="timesteps",
    rope=Rope(
        owner="pe_embedder", values="matrix", axes=by_config("axes_dims_rope", ("image", "height", "width"), 10000.0)
    ),
    joined_text="it takes the texts of two encoders, of which nag makes no negative one",
    families=released("hidream"),
    makes_images=True,
)
