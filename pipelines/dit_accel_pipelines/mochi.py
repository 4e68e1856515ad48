"""Mochi 1: sizes for `plan`."""

from dit_accel.adapter import Adapter, Family

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
    num_inference_steps=64,
)

MOCHI = Adapter(name="mochi", transformers=(), self_attention=(), families=(MOCHI_1,))
