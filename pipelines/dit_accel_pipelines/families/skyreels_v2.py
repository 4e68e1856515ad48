"""SkyReels-V2, made from Wan 2.1: text to video, image to video, and diffusion forcing with a timestep for each frame.

With causal blocks (``causal_block_size``) the model masks later frames out of earlier ones; no key validity can say
that, so sparse calls refuse such a mask.
"""

from dataclasses import replace

from dit_accel.adapters.adapter import Adapter
from dit_accel.adapters.blocks import BlockList

from .wan import NAG_WAN, RADIAL_WAN, TEXT_WAN, ULTRAVICO_WAN, WAN, WAN21_1B, WAN21_14B

# The large models are of one size, and of clips of 25 and of 31 latent frames.
_540P = {"height": 544, "width": 960, "num_frames": 97, "trained_frames": None}
SKYREELS_V2_1B = replace(
    WAN21_1B,
    name="skyreels-v2-1.3b",
    repo="Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers",
    **{**_540P, "trained_frames": 25},
)
SKYREELS_V2_14B = replace(
    WAN21_14B, name="skyreels-v2-14b-540p", repo="Skywork/SkyReels-V2-T2V-14B-540P-Diffusers", **_540P
)
SKYREELS_V2_14B_720P = replace(
    WAN21_14B,
    name="skyreels-v2-14b-720p",
    repo="Skywork/SkyReels-V2-T2V-14B-720P-Diffusers",
    num_frames=121,
    trained_frames=None,
)

SKYREELS_V2 = Adapter(
    name="skyreels-v2",
    transformers=("SkyReelsV2Transformer3DModel",),
    self_attention=("blocks.*.attn1",),
    blocks=(BlockList(pattern="blocks.*"),),
    cross_attention=TEXT_WAN,
    rope=WAN.rope,
    families=(SKYREELS_V2_1B, SKYREELS_V2_14B, SKYREELS_V2_14B_720P),
    recipes={"radial": RADIAL_WAN, "ultravico": ULTRAVICO_WAN, "nag": NAG_WAN},
)
