"""Wan 2.2 Animate: Wan 2.1's blocks; the character's image stands before the video as a frame of its own.

That frame counts as text: exact in rows and columns. The face adapters are cross-attention and left out. Each segment
is a run of its own, for the methods' warm-up and in the report, which shows the last one.
"""

from dataclasses import replace
from functools import partial

from dit_accel.adapters.adapter import Adapter, latents_grid
from dit_accel.adapters.blocks import BlockList

from .wan import NAG_WAN, RADIAL_WAN, TEXT_WAN, WAN, WAN21_I2V_720P

WAN_ANIMATE_14B = replace(
    WAN21_I2V_720P,
    name="wan2.2-animate-14b",
    repo="Wan-AI/Wan2.2-Animate-14B-Diffusers",
    num_frames=77,  # made at a time
    trained_frames=None,  # long clips are made in segments of the trained length
    num_inference_steps=20,
    forwards_per_step=1,
)

WAN_ANIMATE = Adapter(
    name="wan-animate",
    transformers=("WanAnimateTransformer3DModel",),
    self_attention=("blocks.*.attn1",),
    blocks=(BlockList(pattern="blocks.*", joined=True),),
    cross_attention=TEXT_WAN,
    grid=partial(latents_grid, reference_frames=1),
    rope=WAN.rope,
    families=(WAN_ANIMATE_14B,),
    recipes={"radial": RADIAL_WAN, "nag": NAG_WAN},
)
