"""Cosmos 1 and Predict 2 and 2.5: video attends to itself in ``attn1``; text comes in by cross-attention.

Given frames keep a timestep of their own, near none; the noisiest frame tells the step.
"""

from collections.abc import Mapping
from typing import Any

from dit_accel.adapters import VISUAL_AXES, Adapter, BlockList, CrossAttention, Guidance, Rope
from dit_accel.adapters.rope_axes import scaled_thirds

from .released import released


def cosmos_lengths(config: Mapping[str, Any]) -> Mapping[str, int]:
    """Return the sizes of Cosmos 1's learned table; without one, the longest for all, as one range serves them."""
    most, patches = config.get("max_size", (128, 240, 240)), config.get("patch_size", (1, 2, 2))
    sizes = [size // patch for size, patch in zip(most, patches, strict=True)]
    if not config.get("extra_pos_embed_type", "learnable"):
        sizes = [max(sizes)] * 3
    return dict(zip(VISUAL_AXES, sizes, strict=True))


COSMOS = Adapter(
    name="cosmos",
    transformers=("CosmosTransformer3DModel",),
    guidance=Guidance(
        in_turn=(
            "CosmosTextToWorldPipeline",
            "CosmosVideoToWorldPipeline",
            "Cosmos2TextToImagePipeline",
            "Cosmos2VideoToWorldPipeline",
            "Cosmos2_5_PredictBasePipeline",
            "Cosmos2_5_TransferPipeline",
        ),
        rows={"padding_mask": None},
    ),
    noise=("exploding", "flow"),  # 1 and 2; 2.5
    self_attention=("transformer_blocks.*.attn1",),
    blocks=(BlockList(pattern="transformer_blocks.*"),),
    cross_attention=CrossAttention(modules=("transformer_blocks.*.attn2",), projection="crossattn_proj"),
    rope=Rope(
        owner="rope",
        parts=("t_ntk_factor", "h_ntk_factor", "w_ntk_factor"),
        axes=scaled_thirds,
        max_positions=cosmos_lengths,
        note="Cosmos 1 adds learned positions to the patches, which do not move",
    ),
    families=released(
        "cosmos",
        {
            "cosmos-1-7b": {"trained_frames": 16},  # and none for the 14B: Predict 2's of this size takes 24
            "cosmos-predict2-2b": {
                "trained_frames": 24,
                "config": {"attention_head_dim": 128, "rope_scale": (1.0, 3.0, 3.0), "extra_pos_embed_type": None},
            },
        },
    ),
)
