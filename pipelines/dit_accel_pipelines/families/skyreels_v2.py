"""SkyReels-V2, made from Wan 2.1: text to video, image to video, and diffusion forcing with a timestep for each frame.

With causal blocks (``causal_block_size``) the model masks later frames out of earlier ones; no key validity can say
that, so sparse calls refuse such a mask.
"""

from dit_accel.adapters import Adapter, BlockList

from .released import released
from .wan import NAG_WAN, RADIAL_WAN, TEXT_WAN, ULTRAVICO_WAN, WAN, WAN_RADIAL

# The large models are of one size, and of clips of 25 and of 31 latent frames: no trained length tells them apart.
SKYREELS_V2 = Adapter(
    name="skyreels-v2",
    transformers=("SkyReelsV2Transformer3DModel",),
    self_attention=("blocks.*.attn1",),
    blocks=(BlockList(pattern="blocks.*"),),
    cross_attention=TEXT_WAN,
    rope=WAN.rope,
    families=released("skyreels-v2", {"skyreels-v2-1.3b": {"trained_frames": 25}}, **WAN_RADIAL),
    recipes={"radial": RADIAL_WAN, "ultravico": ULTRAVICO_WAN, "nag": NAG_WAN},
)
