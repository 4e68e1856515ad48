"""Lumina Image 2.0: valid text first, then the image; padded text is cut off before the blocks."""

from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from typing import Any

from dit_accel.adapters import Adapter, BlockList, Grid, Guidance, Rope, Sizes, by_config, read_sizes
from dit_accel.adapters.position_ids import read_once
from dit_accel.adapters.rope_axes import lengths_of_image

from .released import released


def lengths(mask: Any) -> tuple[int, ...]:
    """Return the tokens of each prompt of a mask [B, S]."""
    return tuple(mask.sum(1).tolist())


def valid_text_first(config: Any, inputs: Mapping[str, Any]) -> Grid | str:
    """Read the grid off latents [B, C, H, W] and the prompts' lengths, which must be equal."""
    counts = read_once(inputs["encoder_attention_mask"], lengths)
    if isinstance(counts, str):
        return counts
    if len(set(counts)) > 1:
        return f"each image of a batch begins behind its own prompt ({counts} tokens); make one image per call"
    latents, patch = inputs["hidden_states"], config.patch_size
    return 1, latents.shape[-2] // patch, latents.shape[-1] // patch, counts[0], 0


def lumina_sizes(config: Mapping[str, Any], mlp_ratio: float | Fraction) -> Sizes:
    """Read the sizes of the Lumina models, whose width of the feed-forward may be multiplied and is rounded up."""
    multiplier, multiple = config.get("ffn_dim_multiplier") or 1, config.get("multiple_of") or 256
    hidden = -(-int(multiplier * int(config["hidden_size"] * mlp_ratio)) // multiple) * multiple
    return read_sizes({**config, "ffn_dim": hidden}, head_dim=None, width="hidden_size", gated=True)


LUMINA2 = Adapter(
    name="lumina2",
    transformers=("Lumina2Transformer2DModel",),
    guidance=Guidance(
        in_turn=("Lumina2Pipeline",),
        rescales={"Lumina2*": "it rescales the guided prediction to the conditional one's norm"},
    ),
    self_attention=("layers.*.attn",),
    blocks=(BlockList(pattern="layers.*", joined=True),),
    sizes=partial(lumina_sizes, mlp_ratio=4),
    grid=valid_text_first,
    rope=Rope(
        owner="rope_embedder",
        method="_get_freqs_cis",
        form="tables",
        values="complex",
        parts=("freqs_cis",),
        axes=by_config("axes_dim_rope", ("text", "height", "width"), 10000.0),
        max_positions=lengths_of_image("axes_lens", (512, 512)),
    ),
    joined_text="it cuts padded text off before the blocks, row by row",
    families=released("lumina2"),
    makes_images=True,
)
