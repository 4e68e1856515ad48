"""HunyuanVideo, text to video and image to video.

The double blocks join video and text in one attention, the single blocks get the two concatenated: video first. A mask
hides padded text from every key. The text refiner attends over text alone and is left out.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from dit_accel.adapters import VISUAL_AXES, Adapter, Guidance, JoinedText, Rope, by_config, latents_grid

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
