"""Models made from Wan 2.1: SkyReels-V2, AnyFlow, Wan 2.2 Animate and Helios, each with Wan's blocks."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from dit_accel.adapters import (
    VISUAL_AXES,
    Adapter,
    BlockList,
    Grid,
    Guidance,
    Rope,
    by_config,
    latents_grid,
    patch_count,
)
from dit_accel.adapters.rope_axes import same_length, thirds

from .released import released
from .wan import NAG_WAN, RADIAL_WAN, TEXT_WAN, ULTRAVICO_WAN, WAN, WAN21, WAN_RADIAL

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


def _history_grid(config: Any, inputs: Mapping[str, Any]) -> Grid:
    frames, height, width, *_ = latents_grid(config, inputs)
    parts = (("latents_history_short", 1), ("latents_history_mid", 2), ("latents_history_long", 4))
    history = sum(patch_count(inputs.get(name), [size * n for size in config.patch_size]) for name, n in parts)
    return frames, height, width, history, 0


# The history stands before the frames that are made, at three resolutions, coarsest first, and stays exact. Each chunk
# of frames is a run of its own, for the methods' warm-up and in the report, which shows the last one.
HELIOS = Adapter(
    name="helios",
    transformers=("HeliosTransformer3DModel",),
    self_attention=("blocks.*.attn1",),
    blocks=(BlockList(pattern="blocks.*", joined=True),),
    grid=_history_grid,
    rope=Rope(
        owner="rope",
        form="frequencies",
        values="halves",
        parts=("freqs_base_t", "freqs_base_y", "freqs_base_x"),
        axes=by_config("rope_dim", VISUAL_AXES, 10000.0),
    ),
    families=released("helios", **WAN21),
)
