"""Images with text in a cross-attention: PixArt, HunyuanDiT and Lumina-Next."""

from dataclasses import replace
from fractions import Fraction
from functools import partial

from dit_accel.adapters import Adapter, BlockList, CrossAttention, Guidance, Rope, latents_grid, read_sizes
from dit_accel.adapters.rope_axes import even, fixed_lengths

from .lumina2 import lumina_sizes
from .released import released

PIXART = Adapter(
    name="pixart",
    transformers=("PixArtTransformer2DModel",),
    guidance=Guidance(
        together=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
        own={"PixArtSigmaPAGPipeline": "it guides by perturbed attention of its own"},
    ),
    self_attention=("transformer_blocks.*.attn1",),
    sizes=partial(read_sizes, mlp_ratio=4.0),
    grid=partial(latents_grid, frames_axis=None),
    cross_attention=CrossAttention(modules=("transformer_blocks.*.attn2",), projection="caption_projection"),
    rope="PixArt adds sinusoidal positions to the patches",
    noise=("exploding",),
    families=released("pixart"),
    makes_images=True,
)
HUNYUAN_DIT = replace(
    PIXART,
    name="hunyuan-dit",
    transformers=("HunyuanDiT2DModel",),
    guidance=Guidance(
        together=("HunyuanDiTPipeline", "HunyuanDiTControlNetPipeline"),
        own={"HunyuanDiTPAGPipeline": "it guides by perturbed attention of its own"},
        rows={"image_rotary_emb": None},
        share_prefix=False,  # its second half takes what the first gave, besides its stream
    ),
    noise=("none",),
    self_attention=("blocks.*.attn1",),
    blocks=(BlockList(pattern="blocks.*"),),
    recipes={"pag": {"layers": ("L1",)}},
    sizes=read_sizes,
    cross_attention="it attends to the texts of two encoders at once, of which nag makes no negative one",
    rope=Rope(
        input="image_rotary_emb",
        form="pairs",
        axes=lambda config: even(("width", "height"), config["attention_head_dim"] // 2),
        fitted=("height", "width"),
    ),
    families=(),
)
LUMINA_NEXT = replace(
    PIXART,
    name="lumina-next",
    transformers=("LuminaNextDiT2DModel",),
    guidance=Guidance(together=("LuminaPipeline",), first_rows="cond", rows={"image_rotary_emb": None}),
    noise=("flow",),
    self_attention=("layers.*.attn1",),
    blocks=(BlockList(pattern="layers.*"),),
    sizes=partial(lumina_sizes, mlp_ratio=Fraction(8, 3)),
    cross_attention="its attention to text is gated in the block, which nag does not know",
    rope=Rope(
        input="image_rotary_emb",
        form="plane",
        values="complex",
        axes=lambda config: even(("height", "width"), config["hidden_size"] // config["num_attention_heads"] // 2),
        max_positions=fixed_lengths(height=384, width=384),
        note="the pipeline scales the frequencies itself, differently early and late; a change comes on top",
    ),
    families=(),
)
