"""Helios: the history stands before the frames that are made, at three resolutions, coarsest first, and stays exact.

Each chunk of frames is a run of its own, for the methods' warm-up and in the report, which shows the last one.
"""

from collections.abc import Mapping
from typing import Any

from dit_accel.adapters import VISUAL_AXES, Adapter, BlockList, Grid, Rope, by_config, latents_grid, patch_count

from .released import released
from .wan import WAN21


def _history_grid(config: Any, inputs: Mapping[str, Any]) -> Grid:
    frames, height, width, *_ = latents_grid(config, inputs)
    parts = (("latents_history_short", 1), ("latents_history_mid", 2), ("latents_history_long", 4))
    history = sum(patch_count(inputs.get(name), [size * n for size in config.patch_size]) for name, n in parts)
    return frames, height, width, history, 0


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
