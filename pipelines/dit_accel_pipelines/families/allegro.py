"""Allegro: video attends to itself under an additive mask of padded latents; text comes in by cross-attention."""

from functools import partial

from dit_accel.adapters import VISUAL_AXES, Adapter, BlockList, CrossAttention, Guidance, Rope, read_sizes
from dit_accel.adapters.rope_axes import even

ALLEGRO = Adapter(
    name="allegro",
    transformers=("AllegroTransformer3DModel",),
    guidance=Guidance(together=("AllegroPipeline",), rows={"image_rotary_emb": None}),
    noise=("exploding",),
    self_attention=("transformer_blocks.*.attn1",),
    blocks=(BlockList(pattern="transformer_blocks.*"),),
    sizes=partial(read_sizes, mlp_ratio=4.0),
    cross_attention=CrossAttention(modules=("transformer_blocks.*.attn2",), projection="caption_projection"),
    rope=Rope(
        input="image_rotary_emb",
        form="tables of axes",
        axes=lambda config: even(VISUAL_AXES, config["attention_head_dim"] // 3),
    ),
)
