"""AnyFlow, distilled from Wan 2.1: a flow map over all frames at once; the latents are [B, T, C, H, W]."""

from dataclasses import replace
from functools import partial

from dit_accel.adapters.adapter import Adapter, latents_grid
from dit_accel.adapters.blocks import BlockList
from dit_accel.adapters.guidance import Guidance
from dit_accel.adapters.rope_axes import same_length, thirds
from dit_accel.adapters.rotary import Rope

from .wan import NAG_WAN, RADIAL_WAN, TEXT_WAN, ULTRAVICO_WAN, WAN21_14B

ANYFLOW_14B = replace(
    WAN21_14B,
    name="anyflow-14b",
    repo="nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers",
    height=480,
    width=832,
    num_inference_steps=4,
    forwards_per_step=1,
)

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
        form="theta",
        caches=("_freqs_cache",),
        values="complex",
        axes=thirds,
        max_positions=same_length("rope_max_seq_len", 1024),
    ),
    families=(ANYFLOW_14B,),
    recipes={"radial": RADIAL_WAN, "ultravico": ULTRAVICO_WAN, "nag": NAG_WAN},
)
