"""Wan 2.2 Animate: Wan 2.1's blocks; the character's image stands before the video as a frame of its own.

That frame counts as text: exact in rows and columns. The face adapters are cross-attention and left out. Each segment
is a run of its own, for the methods' warm-up and in the report, which shows the last one.
"""

from functools import partial

from dit_accel.adapters import Adapter, BlockList, latents_grid

from .released import released
from .wan import NAG_WAN, RADIAL_WAN, TEXT_WAN, WAN, WAN_RADIAL

WAN_ANIMATE = Adapter(
    name="wan-animate",
    transformers=("WanAnimateTransformer3DModel",),
    self_attention=("blocks.*.attn1",),
    blocks=(BlockList(pattern="blocks.*", joined=True),),
    cross_attention=TEXT_WAN,
    grid=partial(latents_grid, reference_frames=1),
    rope=WAN.rope,
    families=released("wan-animate", forwards_per_step=1, **{**WAN_RADIAL, "in_channels": 36}),
    recipes={"radial": RADIAL_WAN, "nag": NAG_WAN},
)
