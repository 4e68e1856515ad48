"""Chroma: FLUX.1's sequence with a mask of pairs.

diffusers 0.42's pipelines hand that mask over as numbers, which attention adds to its logits (its issue 12116): padded
text is not hidden then, and planned calls refuse the mask. ``encode_prompt`` and then, with its embeddings,
``prompt_attention_mask=mask.bool()`` mend both.
"""

from dataclasses import replace

from dit_accel.adapters import Guidance

from .flux import DOUBLE_THEN_JOINED, FLUX, FLUX_LARGER
from .released import released

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
    families=released("chroma", **FLUX_LARGER),
)
