"""Wan 2.1 and 2.2: text to video, image to video, first and last frame, VACE, ChronoEdit, the embedded tiny model.

Sizes are those of the released diffusers configs. Only the self-attention is changed; text and image come in by
cross-attention and stay outside the sequence.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from dit_accel.adapters import Adapter, BlockList, CrossAttention, Guidance, Rope, read_sizes
from dit_accel.adapters.rope_axes import same_length, thirds

from .released import released

# Radial Attention, arXiv 2506.19852: the settings of its released Wan scripts (decay_factor 0.2, 12 of 50 warm-up
# steps as a share, the first block dense, every token sees frame 0). Its published sparsities belong to near="half".
RADIAL_WAN = {
    "decay_factor": 0.2,
    "block_size": 128,
    "near": "half",
    "sink": True,
    "dense_steps": 0.24,
    "dense_layers": 1,
}
# The same for Wan 2.2 A14B: 11 of 40 steps, counted over both experts.
RADIAL_WAN22 = {**RADIAL_WAN, "decay_factor": 0.8, "block_size": 64, "dense_steps": 0.275}

# UltraViCo, arXiv 2511.20123: the same at 2, 3 and 4 times the length on Wan 2.1 1.3B, whose attention does not repeat;
# the autoencoder codes the first frame by itself.
ULTRAVICO_WAN = {"first_frame": True, "by_ratio": ((2.0, 0.9, None),)}

# WanPipeline asks for multiples of 16, whatever the autoencoder. The attention of Wan 2.1 and its kin does not repeat,
# so that RIFLEx costs quality (arXiv 2511.20123).
WAN21: dict[str, Any] = {"size_multiple": 16, "in_channels": 16, "not_advised": ("rope",)}
WAN_RADIAL: dict[str, Any] = {**WAN21, "recipes": {"radial": RADIAL_WAN}}

_IMAGE = {"in_channels": 36}  # noise, mask and image
_TWO_EXPERTS = {"experts": 2, "recipes": {"radial": RADIAL_WAN22}}
# The embedded models have 64 tokens a frame, so the tiles are small; sol's beta of 1 costs another 5 dB.
_EMBEDDED = {
    "radial": {**RADIAL_WAN, "decay_factor": 1.0, "block_size": 16, "near": "full"},
    "sol": {"block_size": 16},
    "lvsa": {"block_size": 64},
}
FURTHER: dict[str, dict[str, Any]] = {
    "wan2.1-i2v-14b-480p": _IMAGE,
    "wan2.1-i2v-14b-720p": _IMAGE,
    "wan2.1-flf2v-14b": _IMAGE,
    # as released, with shift 12 and 5
    "wan2.2-a14b": {**_TWO_EXPERTS, "first_expert": 26 / 40},
    "wan2.2-i2v-a14b": {**_TWO_EXPERTS, **_IMAGE, "first_expert": 15 / 40},
    "wan2.2-ti2v-5b": {"in_channels": 48, "trained_frames": 31},
    "wan-tiny": {
        "in_channels": None,
        "not_advised": (),
        "trained_frames": 9,
        "config": {"attention_head_dim": 64, "rope_max_seq_len": 256},
        "recipes": _EMBEDDED,
    },
    "wan-plain": {
        "in_channels": None,
        "not_advised": (),
        "trained_frames": 17,  # half of its clips have 33 output frames, the others 17
        "config": {"attention_head_dim": 32, "rope_max_seq_len": 256},
        "recipes": {**_EMBEDDED, "sol": {"beta": 0.5, "block_size": 16}},
    },
}
FURTHER |= {f"wan-tiny-{n}": {**FURTHER["wan-tiny"], "forwards_per_step": 1} for n in (4, 8)}  # without guidance


def timestep_embedding(transformer: Any, inputs: Mapping[str, Any]) -> Any:
    """Return the timestep's embedding, in the type that it is computed in."""
    embed = transformer.condition_embedder
    projected = embed.timesteps_proj(inputs["timestep"].flatten())
    return embed.time_embedder(projected.to(next(embed.time_embedder.parameters()).dtype))


def projected_timestep(transformer: Any, inputs: Mapping[str, Any]) -> Any:
    """Return the timestep's embedding, projected to what shifts and scales in every block."""
    embed = transformer.condition_embedder
    return embed.time_proj(embed.act_fn(timestep_embedding(transformer, inputs)))


# The text's cross-attention; in image-to-video models it takes the picture's tokens too, which stand in front.
TEXT_WAN = CrossAttention(
    modules=("blocks.*.attn2", "vace_blocks.*.attn2"), projection="condition_embedder.text_embedder"
)
# Normalized Attention Guidance, arXiv 2505.21179: what its users settled on for models of Wan's kind.
NAG_WAN = {"tau": 3.5, "alpha": 0.5}

WAN = Adapter(
    name="wan",
    transformers=("WanTransformer3DModel", "WanVACETransformer3DModel", "ChronoEditTransformer3DModel"),
    guidance=Guidance(in_turn=("WanVideoToVideoPipeline", "ChronoEditPipeline")),
    flow=True,
    self_attention=("blocks.*.attn1",),
    split_text="none",
    side_attention=("vace_blocks.*.attn1",),
    blocks=(
        BlockList(pattern="blocks.*"),
        BlockList(pattern="vace_blocks.*", takes=("control_hidden_states",), gives=(None, 0), beside=True),
    ),
    sizes=partial(read_sizes, layers=("num_layers", "vace_layers")),
    signal=timestep_embedding,
    projected_signal=projected_timestep,
    cross_attention=TEXT_WAN,
    references="VACE denoises the frames of its reference images with the clip's",
    rope=Rope(
        owner="rope",
        form="tables",
        parts=("freqs_cos", "freqs_sin"),
        axes=thirds,
        max_positions=same_length("rope_max_seq_len", 1024),
    ),
    families=released("wan", FURTHER, trained_frames=21, **WAN_RADIAL),
    recipes={"radial": RADIAL_WAN, "ultravico": ULTRAVICO_WAN, "nag": NAG_WAN},
)
