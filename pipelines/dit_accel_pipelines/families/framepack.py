"""HunyuanVideo FramePack: the history stands before the frames that are made, at three resolutions, coarsest first.

Behind them stand the image's tokens and the prompt's; with one row, only the valid ones. History and text stay exact.
Each section of frames is a run of its own, for the methods' warm-up and in the report, which shows the last one.
"""

from collections.abc import Mapping
from typing import Any

from dit_accel.adapters import Adapter, Grid, Guidance, latents_grid, patch_count

from .hunyuan_video import HUNYUAN_ROPE
from .released import released


def _history_grid(config: Any, inputs: Mapping[str, Any]) -> Grid:
    frames, height, width, _, after = latents_grid(
        config, inputs, text="after", joined=("image_embeds", "encoder_hidden_states")
    )
    time, space = config.patch_size_t, config.patch_size
    parts = (("latents_clean", 1), ("latents_history_2x", 2), ("latents_history_4x", 4))
    history = sum(patch_count(inputs.get(name), (time * n, space * n, space * n)) for name, n in parts)
    return frames, height, width, history, after


FRAMEPACK = Adapter(
    name="framepack",
    transformers=("HunyuanVideoFramepackTransformer3DModel",),
    guidance=Guidance(
        in_turn=("HunyuanVideoFramepackPipeline",),
        embedded="guidance_embeds",
        rows=dict.fromkeys(
            ("indices_latents", "indices_latents_clean", "indices_latents_history_2x", "indices_latents_history_4x")
        ),
    ),
    self_attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    grid=_history_grid,
    variable_text_length=True,
    rope=HUNYUAN_ROPE,
    joined_text="it cuts padded text off, so that rows of two texts would attend apart",
    families=released("framepack", forwards_per_step=1),
)
