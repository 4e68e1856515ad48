"""CogVideoX, CogVideoX 1.5 and EasyAnimate 5.1: text first, then the video, in one attention.

The latents are [B, T, C, H, W]; version 1.5 takes two frames into a token. ConsisID adds attention to a face, left out.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from dit_accel.adapters import (
    JOINT,
    VISUAL_AXES,
    Adapter,
    Axis,
    BlockList,
    Guidance,
    JoinedText,
    Rope,
    latents_grid,
    read_sizes,
)

from .released import released

ROTARY = {"attention_head_dim": 64, "use_rotary_positional_embeddings": True}
# CogVideoX 1.5 was trained on two lengths, of 5 and 10 seconds.
SIZES_15 = {
    "patch": (2, 2, 2),
    "config": {**ROTARY, "patch_size": 2, "patch_size_t": 2, "sample_height": 300, "sample_width": 300},
}
# UltraViCo, arXiv 2511.20123, of the 5B model, whose rotary positions make attention repeat after 20 frames.
ULTRAVICO_COGVIDEOX = {"period": 20.0, "gamma": 1.0, "by_ratio": ((2.0, 0.9, 0.6), (3.0, 0.9, 0.6), (4.0, 0.85, 0.6))}


def _modulated_input(transformer: Any, inputs: Mapping[str, Any]) -> Any:
    """Compute the video's input of the first block's attention."""
    latents, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
    time = transformer.time_embedding(
        transformer.time_proj(inputs["timestep"]).to(latents.dtype), inputs.get("timestep_cond")
    )
    if getattr(transformer, "ofs_embedding", None) is not None:  # CogVideoX 1.5 image to video
        time = time + transformer.ofs_embedding(transformer.ofs_proj(inputs["ofs"]).to(latents.dtype))
    joined = transformer.patch_embed(text, latents)
    length = text.shape[1]
    return transformer.transformer_blocks[0].norm1(joined[:, length:], joined[:, :length], time)[0]


def eighths(config: Mapping[str, Any]) -> tuple[Axis, ...]:
    """Return CogVideoX's axes: a quarter of the head for frames, three eighths for height and for width."""
    head = config["attention_head_dim"]
    channels = zip(VISUAL_AXES, (head // 4, head // 8 * 3, head // 8 * 3), strict=True)
    return tuple(Axis(name=name, channels=width, theta=10000.0) for name, width in channels)


def cogvideox_lengths(config: Mapping[str, Any]) -> Mapping[str, int]:
    """Return CogVideoX 1.5's limits: its positions are cut out of the trained grid; version 1's are scaled to it."""
    if config.get("patch_size_t") is None:
        return {}
    sizes = {axis: config.get(f"sample_{axis}", default) for axis, default in (("height", 60), ("width", 90))}
    return {axis: size // config.get("patch_size", 2) for axis, size in sizes.items()}


COGVIDEOX = Adapter(
    name="cogvideox",
    transformers=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
    guidance=Guidance(together=("ConsisIDPipeline",), rows={"image_rotary_emb": None}),
    noise=("none",),
    self_attention=("transformer_blocks.*.attn1",),
    blocks=(BlockList(pattern="transformer_blocks.*", takes=JOINT, gives=(0, 1)),),
    sizes=partial(read_sizes, mlp_ratio=4.0),
    grid=partial(latents_grid, frames_axis=1, text="before"),
    signal=_modulated_input,
    rope=Rope(
        input="image_rotary_emb",
        form="pairs",
        axes=eighths,
        max_positions=cogvideox_lengths,
        fitted=("height", "width"),
        absent=lambda config: (
            None
            if config.get("use_rotary_positional_embeddings")
            else "this one adds sinusoidal positions to the patches, as CogVideoX-2B does"
        ),
    ),
    joined_text=JoinedText(place="before"),
    families=released(
        "cogvideox",
        {
            "cogvideox-2b": {
                "trained_frames": 13,
                "config": {"attention_head_dim": 64, "use_rotary_positional_embeddings": False},
            },
            "cogvideox-5b": {"trained_frames": 13, "config": ROTARY, "recipes": {"ultravico": ULTRAVICO_COGVIDEOX}},
            "cogvideox1.5-5b": {**SIZES_15, "in_channels": 16},
            "cogvideox1.5-5b-i2v": {**SIZES_15, "in_channels": 32},
        },
    ),
)
EASYANIMATE = Adapter(
    name="easyanimate",
    transformers=("EasyAnimateTransformer3DModel",),
    guidance=Guidance(together=("EasyAnimatePipeline", "EasyAnimateControlPipeline", "EasyAnimateInpaintPipeline")),
    self_attention=("transformer_blocks.*.attn1",),
    blocks=(BlockList(pattern="transformer_blocks.*", takes=JOINT, gives=(0, 1)),),
    sizes=partial(read_sizes, mlp_ratio=4.0),
    grid=partial(latents_grid, text="before", joined=("encoder_hidden_states", "encoder_hidden_states_t5")),
    rope=Rope(owner="rope_embedding", form="theta of a function", parts=("get_3d_rotary_pos_embed",), axes=eighths),
    joined_text="it takes the texts of two encoders, of which nag makes no negative one",
    families=released("easyanimate", trained_frames=13),
)
