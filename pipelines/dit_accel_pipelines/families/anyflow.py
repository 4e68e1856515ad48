"""AnyFlow, distilled from Wan 2.1: a flow map over all frames at once; the latents are [B, T, C, H, W]."""

from functools import partial

from dit_accel.adapters import Adapter, BlockList, Guidance, Rope, latents_grid
from dit_accel.adapters.rope_axes import same_length, thirds

from .released import released
from .wan import NAG_WAN, RADIAL_WAN, TEXT_WAN, ULTRAVICO_WAN, WAN_RADIAL

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
