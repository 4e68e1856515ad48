"""Mochi 1: its processor attends row by row, over the video and the valid text behind it."""

from fractions import Fraction
from functools import partial

from dit_accel.adapters.adapter import Adapter, Family, latents_grid
from dit_accel.adapters.rope import Rope
from dit_accel.adapters.rope_axes import learned
from dit_accel.adapters.sizes import read_sizes

MOCHI_1 = Family(
    name="mochi-1",
    repo="genmo/mochi-1-preview",
    layers=48,
    heads=24,
    head_dim=128,
    ffn_dim=12288,  # SwiGLU of 8192: its three matrices cost what two of 12288 do
    patch=(1, 2, 2),
    vae=(6, 8),
    text_tokens=256,
    height=480,
    width=848,
    num_frames=163,
    trained_frames=28,
    num_inference_steps=64,
)

MOCHI = Adapter(
    name="mochi",
    transformers=("MochiTransformer3DModel",),
    self_attention=("transformer_blocks.*.attn1",),
    sizes=partial(read_sizes, mlp_ratio=Fraction(8, 3), gated=True),
    grid=partial(latents_grid, text="after"),
    ragged_text=True,
    rising_timesteps=True,
    rope=Rope(
        owner="rope",
        form="learned",
        axes=learned,
        note="each head has learned frequencies of its own: no index of a dominant period fits them all",
    ),
    families=(MOCHI_1,),
)
