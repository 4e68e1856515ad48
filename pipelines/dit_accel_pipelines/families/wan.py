"""Wan 2.1 and 2.2: text to video, image to video, first and last frame, VACE, ChronoEdit, the embedded tiny model.

Sizes are those of the released diffusers configs. Only the self-attention is changed; text and image come in by
cross-attention and stay outside the sequence.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from dit_accel.adapters.adapter import Adapter, Family
from dit_accel.adapters.blocks import BlockList
from dit_accel.adapters.cross_attention import CrossAttention
from dit_accel.adapters.guidance import Guidance
from dit_accel.adapters.rope_axes import same_length, thirds
from dit_accel.adapters.rotary import Rope
from dit_accel.adapters.sizes import read_sizes

from .perturbation import with_perturbation
from .step_caches import with_step_caches

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

WAN21_1B = Family(
    name="wan2.1-1.3b",
    repo="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    layers=30,
    heads=12,
    head_dim=128,
    ffn_dim=8960,
    patch=(1, 2, 2),
    vae=(4, 8),
    size_multiple=16,  # WanPipeline asks for it, whatever the autoencoder
    cross_tokens=512,
    height=480,
    width=832,
    num_frames=81,
    in_channels=16,
    trained_frames=21,
    not_advised=("rope",),  # its attention does not repeat: RIFLEx costs quality (arXiv 2511.20123)
    recipes={"radial": RADIAL_WAN},
)
WAN21_14B = replace(
    WAN21_1B,
    name="wan2.1-14b",
    repo="Wan-AI/Wan2.1-T2V-14B-Diffusers",
    layers=40,
    heads=40,
    ffn_dim=13824,
    height=720,
    width=1280,
)
# The image models add 257 CLIP tokens per image to the cross-attention.
WAN21_I2V_480P = replace(
    WAN21_14B,
    name="wan2.1-i2v-14b-480p",
    repo="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    cross_tokens=512 + 257,
    height=480,
    width=832,
    in_channels=36,  # noise, mask and image
)
WAN21_I2V_720P = replace(
    WAN21_14B,
    name="wan2.1-i2v-14b-720p",
    repo="Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
    cross_tokens=512 + 257,
    in_channels=36,
)
WAN21_FLF2V = replace(
    WAN21_14B,
    name="wan2.1-flf2v-14b",
    repo="Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
    cross_tokens=512 + 2 * 257,
    in_channels=36,
)
# VACE runs control blocks beside the main ones: every 2nd of 30 in the small model, every 5th of 40 in the large one.
WAN21_VACE_1B = replace(WAN21_1B, name="wan2.1-vace-1.3b", repo="Wan-AI/Wan2.1-VACE-1.3B-diffusers", layers=30 + 15)
WAN21_VACE_14B = replace(WAN21_14B, name="wan2.1-vace-14b", repo="Wan-AI/Wan2.1-VACE-14B-diffusers", layers=40 + 8)
WAN22_A14B = replace(
    WAN21_14B,
    name="wan2.2-a14b",
    repo="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    num_inference_steps=40,
    experts=2,
    recipes={"radial": RADIAL_WAN22},
)
WAN22_I2V_A14B = replace(WAN22_A14B, name="wan2.2-i2v-a14b", repo="Wan-AI/Wan2.2-I2V-A14B-Diffusers", in_channels=36)
WAN22_TI2V_5B = replace(
    WAN21_1B,
    name="wan2.2-ti2v-5b",
    repo="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    heads=24,
    ffn_dim=14336,
    vae=(4, 16),
    height=704,
    width=1280,
    num_frames=121,
    in_channels=48,
    trained_frames=31,
)

# The smaller embedded model: 64 tokens a frame at 64 x 64 pixels, so the tiles are small.
WAN_PLAIN = Family(
    name="wan-plain",
    repo="embedded/wan-plain",
    layers=6,
    heads=5,
    head_dim=32,
    ffn_dim=480,
    patch=(1, 2, 2),
    vae=(2, 4),
    size_multiple=16,  # WanPipeline asks for it, whatever the autoencoder
    cross_tokens=512,
    height=64,
    width=64,
    num_frames=17,
    num_inference_steps=20,
    trained_frames=17,  # half of its clips have 33 output frames, the others 17
    config={"attention_head_dim": 32, "rope_max_seq_len": 256},
    recipes={
        "radial": {**RADIAL_WAN, "decay_factor": 1.0, "block_size": 16, "near": "full"},
        "sol": {"beta": 0.5, "block_size": 16},  # beta 1 costs another 5 dB
        "lvsa": {"block_size": 64},  # a frame
    },
)
# The default embedded model, trained on 17 output frames of a richer world.
WAN_TINY = replace(
    WAN_PLAIN,
    name="wan-tiny",
    repo="embedded/wan-tiny",
    layers=12,
    heads=2,
    head_dim=64,
    ffn_dim=512,
    trained_frames=9,
    config={"attention_head_dim": 64, "rope_max_seq_len": 256},
    recipes={"radial": WAN_PLAIN.recipes["radial"], "sol": {"block_size": 16}, "lvsa": {"block_size": 64}},
)


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
    rope=Rope(
        owner="rope",
        form="tables",
        parts=("freqs_cos", "freqs_sin"),
        axes=thirds,
        max_positions=same_length("rope_max_seq_len", 1024),
    ),
    families=with_perturbation(
        *with_step_caches(
            WAN21_1B,
            WAN21_14B,
            WAN21_I2V_480P,
            WAN21_I2V_720P,
            WAN21_FLF2V,
            WAN21_VACE_1B,
            WAN21_VACE_14B,
            WAN22_A14B,
            WAN22_I2V_A14B,
            WAN22_TI2V_5B,
            WAN_TINY,
            WAN_PLAIN,
        )
    ),
    recipes={"radial": RADIAL_WAN, "ultravico": ULTRAVICO_WAN, "nag": NAG_WAN},
)
