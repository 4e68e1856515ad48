"""HunyuanVideo, 1.5 and FramePack: text to video and image to video.

The double blocks join video and text in one attention, the single blocks get the two concatenated: video first. A mask
hides padded text from every key. The text refiner attends over text alone and is left out.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from dit_accel.adapters import (
    JOINT,
    VISUAL_AXES,
    Adapter,
    BlockList,
    Grid,
    Guidance,
    JoinedText,
    Rope,
    by_config,
    latents_grid,
    patch_count,
)

from .released import released

# Radial Attention's released script, arXiv 2506.19852: no sink since 2025-07-06, 12 of 50 steps dense.
RADIAL_HUNYUAN = {
    "decay_factor": 0.95,
    "block_size": 128,
    "near": "full",
    "sink": False,
    "dense_steps": 0.24,
    "dense_layers": 0,
}

# UltraViCo, arXiv 2511.20123; its code puts the bands at multiples of 50 frames, 4 to either side, at every ratio.
ULTRAVICO_HUNYUAN = {
    "period": 50.0,
    "gamma": 4.0,
    "by_ratio": ((2.0, 0.95, 0.6), (3.0, 0.9, 0.6), (4.0, 0.9, 0.8), (5.0, 0.9, 0.8)),
}


def _modulated_input(transformer: Any, inputs: Mapping[str, Any]) -> Any:
    """Compute the video's input of the first block's attention; a given first frame is modulated by itself."""
    latents, pooled = inputs["hidden_states"], inputs["pooled_projections"]
    patch, norm = transformer.config.patch_size, transformer.transformer_blocks[0].norm1
    time, first_frame = transformer.time_text_embed(inputs["timestep"], pooled, inputs.get("guidance"))
    video = transformer.x_embedder(latents)
    if first_frame is None:
        return norm(video, emb=time)[0]
    return norm(video, time, first_frame, (latents.shape[-2] // patch) * (latents.shape[-1] // patch))[0]


HUNYUAN_ROPE = Rope(owner="rope", axes=by_config("rope_axes_dim", VISUAL_AXES, 256.0, default=(16, 56, 56)))

HUNYUAN_VIDEO = Adapter(
    name="hunyuan-video",
    transformers=("HunyuanVideoTransformer3DModel",),
    guidance=Guidance(
        in_turn=("HunyuanSkyreelsImageToVideoPipeline", "HunyuanVideoImageToVideoPipeline"), embedded="guidance_embeds"
    ),
    self_attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    grid=partial(latents_grid, text="after"),
    split_text="after",
    signal=_modulated_input,
    rope=HUNYUAN_ROPE,
    joined_text=JoinedText(place="after", mask="encoder_attention_mask"),
    families=released(
        "hunyuan-video",
        trained_frames=33,
        forwards_per_step=1,  # guidance is distilled into the model
        recipes={"radial": RADIAL_HUNYUAN, "ultravico": ULTRAVICO_HUNYUAN},
    ),
    recipes={"radial": RADIAL_HUNYUAN},
)

# One attention over video, then image, glyph and prompt tokens. The mask pairs valid queries with valid keys, with the
# padded tokens sorted to the end; the text refiner is left out.
HUNYUAN_VIDEO15 = Adapter(
    name="hunyuan-video-1.5",
    transformers=("HunyuanVideo15Transformer3DModel",),
    self_attention=("transformer_blocks.*.attn",),
    blocks=(BlockList(pattern="transformer_blocks.*", takes=JOINT, gives=(0, 1)),),
    grid=partial(
        latents_grid, text="after", joined=("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    ),
    outer_masks=True,
    rope=HUNYUAN_ROPE,
    joined_text="it takes the texts of two encoders, of which nag makes no negative one",
    families=released("hunyuan-video-1.5", patch=(1, 1, 1), trained_frames=31),
)


def _history_grid(config: Any, inputs: Mapping[str, Any]) -> Grid:
    frames, height, width, _, after = latents_grid(
        config, inputs, text="after", joined=("image_embeds", "encoder_hidden_states")
    )
    time, space = config.patch_size_t, config.patch_size
    parts = (("latents_clean", 1), ("latents_history_2x", 2), ("latents_history_4x", 4))
    history = sum(patch_count(inputs.get(name), (time * n, space * n, space * n)) for name, n in parts)
    return frames, height, width, history, after


# The history stands before the frames that are made, at three resolutions, coarsest first; behind them stand the
# image's tokens and the prompt's; with one row, only the valid ones. History and text stay exact. Each section of
# frames is a run of its own, for the methods' warm-up and in the report, which shows the last one.
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
