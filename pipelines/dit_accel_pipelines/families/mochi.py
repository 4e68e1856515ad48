"""Mochi 1: its processor attends row by row, over the video and the valid text behind it."""

from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from typing import Any

from dit_accel.adapters import VISUAL_AXES, Adapter, Axis, Rope, latents_grid, read_sizes

from .released import released


def _modulated_input(transformer: Any, inputs: Mapping[str, Any]) -> Any:
    """Compute the video's input of the first block's attention."""
    latents, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
    mask = inputs["encoder_attention_mask"]
    time, _ = transformer.time_embed(inputs["timestep"], text, mask, hidden_dtype=latents.dtype)
    frames = transformer.patch_embed(latents.transpose(1, 2).flatten(0, 1))
    return transformer.transformer_blocks[0].norm1(frames.unflatten(0, (len(latents), -1)).flatten(1, 2), time)[0]


def learned(config: Mapping[str, Any]) -> tuple[Axis, ...]:
    """Return Mochi's axes: each rotates all channels, their angles add up."""
    return tuple(Axis(name=name, channels=config["attention_head_dim"], theta=None) for name in VISUAL_AXES)


MOCHI = Adapter(
    name="mochi",
    transformers=("MochiTransformer3DModel",),
    toward_clean=True,
    self_attention=("transformer_blocks.*.attn1",),
    sizes=partial(read_sizes, mlp_ratio=Fraction(8, 3), gated=True),
    grid=partial(latents_grid, text="after"),
    variable_text_length=True,
    signal=_modulated_input,
    rope=Rope(
        owner="rope",
        form="learned",
        axes=learned,
        kinds=("none", "pi", "yarn"),
        fitted=("height", "width"),
        note="each head has learned frequencies of its own: no index of a dominant period fits them all",
    ),
    joined_text="its processor attends row by row, and never sees both texts at once",
    families=released("mochi", trained_frames=28),
)
