"""FLUX.1, its variants (fill, control, Kontext) and kin: text, the packed image, a reference image, in every block."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from dit_accel.adapters import JOINT, Adapter, BlockList, Guidance, JoinedText, Rope, Sizes, by_config, read_sizes
from dit_accel.adapters.position_ids import ids_grid

from .released import released

# UltraImage, arXiv 2512.04504, at 3600 x 3600 pixels: its final settings and the turn of its code.
ULTRAIMAGE_FLUX = {"indices": (9,), "turn": 0.85, "focus_min": 1.1, "focus_max": 1.3}
FLUX_LARGER: dict[str, Any] = {
    "trained_size": (128, 128),  # up to 2048 x 2048 pixels
    "beyond": ("tiled_vae", "pinned_shift"),
    "recipes": {"ultraimage": ULTRAIMAGE_FLUX},
}
# The embedded image model: 144 tokens of 8 x 8 pixels, so the tiles are small; guided by a negative prompt, where
# guidance is distilled into the others.
_TINY = {"forwards_per_step": 2, "trained_size": (12, 12), "beyond": (), "recipes": {"sol": {"block_size": 16}}}
_TINIES = {
    "flux-tiny": _TINY,
    **{f"flux-tiny-{steps}": {**_TINY, "forwards_per_step": 1} for steps in (4, 8)},
    "flux-sizes": {**_TINY, "trained_size": (16, 16)},
}


def _modulated_input(transformer: Any, inputs: Mapping[str, Any]) -> Any:
    """Compute the image's input of the first block's attention."""
    image = transformer.x_embedder(inputs["hidden_states"])
    timestep, guidance = inputs["timestep"].to(image.dtype) * 1000, inputs.get("guidance")
    scales = (timestep,) if guidance is None else (timestep, guidance.to(image.dtype) * 1000)
    time = transformer.time_text_embed(*scales, inputs["pooled_projections"])
    return transformer.transformer_blocks[0].norm1(image, emb=time)[0]


FLUX_ROPE = Rope(owner="pos_embed", axes=by_config("axes_dims_rope", ("image", "height", "width"), 10000.0))
DOUBLE_THEN_JOINED = (
    BlockList(pattern="transformer_blocks.*", takes=JOINT, gives=(1, 0)),
    BlockList(pattern="single_transformer_blocks.*", joined=True),
)
"""Blocks of two streams, then of both joined."""

FLUX = Adapter(
    name="flux",
    transformers=("FluxTransformer2DModel",),
    flow=True,
    guidance=Guidance(
        alone=(
            "FluxControlPipeline",
            "FluxControlImg2ImgPipeline",
            "FluxControlInpaintPipeline",
            "FluxControlNetImg2ImgPipeline",
            "FluxControlNetInpaintPipeline",
            "FluxFillPipeline",
            "VisualClozeGenerationPipeline",
            "FluxModularPipeline",
        ),
        in_turn=(
            "FluxControlNetPipeline",
            "FluxImg2ImgPipeline",
            "FluxInpaintPipeline",
            "FluxKontextPipeline",
            "FluxKontextInpaintPipeline",
        ),
        embedded="guidance_embeds",
        rows={"txt_ids": None, "img_ids": None},
    ),
    self_attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    sizes=partial(read_sizes, mlp_ratio=4.0, patch=(1, 2, 2)),
    grid=ids_grid,
    split_text="before",
    separate_text_attention=True,  # IP-Adapters: image queries over their own keys
    signal=_modulated_input,
    rope=FLUX_ROPE,
    joined_text=JoinedText(place="before"),
    references=("hidden_states", "img_ids"),
    families=released("flux", _TINIES, forwards_per_step=1, **FLUX_LARGER),
    makes_images=True,
)


def kin_sizes(config: Mapping[str, Any]) -> Sizes:
    """Read the sizes of FLUX.1's kin; Ovis, which has no pooled prompt, gates its feed-forward."""
    return read_sizes(config, mlp_ratio=4.0, gated="pooled_projection_dim" not in config, patch=(1, 2, 2))


# Models of other makers that kept FLUX.1's blocks and its sequence.
FLUX_KIN = replace(
    FLUX,
    name="flux-kin",
    transformers=("BriaTransformer2DModel", "LongCatImageTransformer2DModel", "OvisImageTransformer2DModel"),
    guidance=Guidance(
        together=("BriaPipeline",),
        rescaling_arguments=("normalize",),
        rows={"txt_ids": None, "img_ids": None},
        rescales={"LongCat*": "it rescales the guided prediction to the conditional one's norm"},
    ),
    blocks=(
        BlockList(pattern="transformer_blocks.*", takes=JOINT, gives=(1, 0)),
        BlockList(pattern="single_transformer_blocks.*", takes=JOINT, gives=(1, 0)),
    ),
    sizes=kin_sizes,
    signal=None,
    # LongCat and Ovis lay text along height and width
    rope=replace(FLUX_ROPE, text=lambda inputs: inputs["txt_ids"].shape[-2]),
    families=(),
)

# A mask of pairs, which diffusers 0.42's pipelines hand over as numbers that attention adds to its logits (its issue
# 12116): padded text is not hidden then, and planned calls refuse the mask. ``encode_prompt`` and then, with its
# embeddings, ``prompt_attention_mask=mask.bool()`` mend both.
CHROMA = replace(
    FLUX,
    name="chroma",
    transformers=("ChromaTransformer2DModel",),
    guidance=Guidance(
        in_turn=("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline"),
        rows={"txt_ids": None, "img_ids": None},
    ),
    blocks=DOUBLE_THEN_JOINED,
    outer_masks=True,
    signal=None,
    joined_text="its mask of pairs is made for the prompt",
    references="its pipelines take none",
    refused={"progressive": "its mask names every token of the picture, which a small one has not"},
    families=released("chroma", **FLUX_LARGER),
)
