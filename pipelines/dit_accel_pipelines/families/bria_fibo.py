"""Bria Fibo 1 and 2. Fibo 1: FLUX.1's sequence. Fibo 2: gist tokens, the image, images to edit.

Where the rows of a batch have different numbers of gist tokens, these stand last.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dit_accel.adapters import Adapter, BlockList, Grid, Guidance, Sizes, read_sizes
from dit_accel.adapters.position_ids import read_once

from .flux import DOUBLE_THEN_JOINED, FLUX
from .lumina2 import lengths
from .z_image import Z_IMAGE


def behind_the_gist(config: Any, inputs: Mapping[str, Any]) -> Grid | str:
    """Read the grid off latents [B, C, H, W] and count the gist tokens, which follow the prompts' lengths."""
    from diffusers.models.transformers.transformer_bria_fibo2 import compute_gist_count

    text, mask = inputs["encoder_hidden_states"], inputs.get("encoder_attention_mask")
    tokens: Any = (text.shape[2],) if mask is None else read_once(mask, lengths)
    if isinstance(tokens, str):
        return tokens
    counts = compute_gist_count(
        list(tokens), config.min_num_gist_tokens, config.max_num_gist_tokens, config.gist_step,
        config.gist_min_text_len, config.gist_max_text_len,
    )  # fmt: skip
    gist, patch = max(counts), config.patch_size
    height, width = (size // patch for size in inputs["hidden_states"].shape[-2:])
    context = [latents.shape for latents in inputs.get("context_latents") or ()]
    after = sum((shape[2] // patch) * (shape[3] // patch) for shape in context)
    return (1, height, width, gist, after) if min(counts) == gist else (1, height, width, 0, after + gist)


def gated_sizes(config: Mapping[str, Any]) -> Sizes:
    """Read the sizes of Bria Fibo 2, whose feed-forward is 8/3 of its width, in whole 64s."""
    hidden = config["dim"] * 8 // 3 // 64 * 64
    return read_sizes(
        {**config, "ffn_dim": hidden}, layers=("n_layers",), heads="n_heads", head_dim=None, width="dim", gated=True
    )


BRIA_FIBO = replace(
    FLUX,
    name="bria-fibo",
    transformers=("BriaFiboTransformer2DModel",),
    guidance=Guidance(together=("BriaFiboPipeline", "BriaFiboEditPipeline"), rows={"txt_ids": None, "img_ids": None}),
    blocks=DOUBLE_THEN_JOINED,
    signal=None,
    joined_text="its blocks take text of all layers of the encoder",
    families=(),
)
BRIA_FIBO_2 = Adapter(
    name="bria-fibo-2",
    transformers=("BriaFibo2Transformer2DModel",),
    guidance=Guidance(in_turn=("BriaFibo2Pipeline",)),
    self_attention=("layers.*.attention",),
    blocks=(BlockList(pattern="layers.*", takes=("x",), joined=True),),
    sizes=gated_sizes,
    grid=behind_the_gist,
    joined_text="its blocks take text of all layers of the encoder",
    makes_images=True,
    rope=Z_IMAGE.rope,
)
