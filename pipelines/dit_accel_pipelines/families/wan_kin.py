"""Models made from Wan 2.1: SkyReels-V2, AnyFlow and Wan 2.2 Animate, each with Wan's blocks."""

from functools import partial

from dit_accel.adapters import Adapter, BlockList, Guidance, Rope, latents_grid
from dit_accel.adapters.rope_axes import same_length, thirds

from .released import released
from .wan import NAG_WAN, RADIAL_WAN, TEXT_WAN, ULTRAVICO_WAN, WAN, WAN_RADIAL

# Text to video, image to video, and diffusion forcing with a timestep for each frame. With causal blocks
# (``causal_block_size``) the model masks later frames out of earlier ones; no key validity can say that, so sparse
# calls refuse such a mask. The large models are of one size, and of clips of 25 and of 31 latent frames: no trained
# length tells them apart.
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

# Distilled from Wan 2.1: a flow map over all frames at once; the latents are [B, T, C, H, W].
ANYFLOW = Adapter(
    name="anyflow",
    transformers=("AnyFlowTransformer3DModel",),
    guidance=Guidance(together=("AnyFlowPipeline",)),
    self_attention=("blocks.*.attn1",),
    blocks=(BlockList(pattern="blocks.*"),),
    cross_attention=TEXT_WAN,
    grid=partial(latents_grid, frames_axis=1),
    rope=Rope(
        owner="rope",
        method="_build_freqs",
        caches=("_freqs_cache",),
        values="complex",
        axes=thirds,
        max_positions=same_length("rope_max_seq_len", 1024),
    ),
    families=released("anyflow", forwards_per_step=1, trained_frames=21, **WAN_RADIAL),
    recipes={"radial": RADIAL_WAN, "ultravico": ULTRAVICO_WAN, "nag": NAG_WAN},
)

# The character's image stands before the video as a frame of its own, which counts as text: exact in rows and columns.
# The face adapters are cross-attention and left out. Each segment is a run of its own, for the methods' warm-up and in
# the report, which shows the last one.
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
