"""LTX-Video: sizes for `plan`."""

from dataclasses import replace

from dit_accel.adapter import Adapter, Family

LTX_2B = Family(
    name="ltx-video-2b",
    repo="Lightricks/LTX-Video",
    layers=28,
    heads=32,
    head_dim=64,
    ffn_dim=8192,
    patch=(1, 1, 1),
    vae=(8, 32),
    cross_tokens=128,
    height=512,
    width=704,
    num_frames=161,
)
LTX_13B = replace(
    LTX_2B, name="ltx-video-13b", repo="Lightricks/LTX-Video-0.9.7-dev", layers=48, head_dim=128, ffn_dim=16384
)

LTX = Adapter(name="ltx", transformers=(), self_attention=(), families=(LTX_2B, LTX_13B))
