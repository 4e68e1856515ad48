"""LTX-Video and LTX-2: packed latents [B, S, C] whose sizes are among the forward's inputs; text by cross-attention."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from dit_accel.adapters import VISUAL_AXES, Adapter, Axis, BlockList, CrossAttention, Grid, Guidance, Rope, read_sizes
from dit_accel.adapters.position_ids import last_video, read_once
from dit_accel.errors import ConfigError

from .released import released


def packed_grid(config: Any, inputs: Mapping[str, Any]) -> Grid | str:
    """Read the grid off ``num_frames``, ``height`` and ``width``, which count tokens; those left over stand behind it.

    Pipelines with conditions give positions as ``video_coords`` [B, 3, S] instead, and some of them sizes of 1 beside
    these: what the video is conditioned on, then the video.
    """
    tokens, coords = inputs["hidden_states"].shape[1], inputs.get("video_coords")
    frames, height, width = (inputs.get(name) for name in ("num_frames", "height", "width"))
    placed = coords is not None and coords.ndim == 3
    if (
        frames is not None
        and height is not None
        and width is not None
        and not (placed and frames * height * width == 1)
    ):
        return frames, height, width, 0, tokens - frames * height * width
    if coords is None:
        return "LTX was given neither num_frames, height and width nor video_coords, so its tokens have no positions"
    if not placed:  # LTX-2's [B, 3, S, 2], of which only the pipeline knows what stands where
        return (
            "LTX was given neither num_frames, height and width nor video_coords [B, 3, S], so it is not known which "
            "of its tokens are the video's"
        )
    return read_once(coords, video_behind_conditions if frames is None else video_before_guides)


def video_behind_conditions(coords: Any) -> Grid | str:
    """Return the grid of the video that coordinates [B, 3, S] end with, or why there is none."""
    try:
        frames, height, width = last_video(coords[0].mT)
    except ConfigError as error:
        return f"LTX's video_coords are those of no video: {error}"
    return frames, height, width, coords.shape[2] - frames * height * width, 0


def video_before_guides(coords: Any) -> Grid | str:
    """Return the grid of the video that coordinates [B, 3, S] begin with: what guides it has earlier times again."""
    falls = (coords[0, 0, 1:] < coords[0, 0, :-1]).nonzero()
    end = int(falls[0]) + 1 if len(falls) else coords.shape[2]
    video = video_behind_conditions(coords[..., :end])
    return video if isinstance(video, str) else (*video[:4], coords.shape[2] - end)


def _modulated_input(transformer: Any, inputs: Mapping[str, Any]) -> Any:
    """Compute the input of the first block's attention."""
    video, block = transformer.proj_in(inputs["hidden_states"]), transformer.transformer_blocks[0]
    time, _ = transformer.time_embed(inputs["timestep"].flatten(), batch_size=len(video), hidden_dtype=video.dtype)
    time = time.view(len(video), -1, len(block.scale_shift_table), video.shape[-1])
    shift, scale = (block.scale_shift_table + time).unbind(2)[:2]
    return block.norm1(video) * (1 + scale) + shift


def fractions(config: Mapping[str, Any]) -> tuple[Axis, ...]:
    """Return LTX's axes, of coordinates in quarter turns that run from -1 to 1 over 20 seconds or 2,048 pixels.

    Frequency j of n is theta^(j / (n - 1)); they are laid over all heads together.
    """
    count = config["num_attention_heads"] * config["attention_head_dim"] // 6
    exponents = tuple(-j / (count - 1) for j in range(count))
    theta = float(config.get("rope_theta", 10000.0))
    return tuple(Axis(name=name, channels=2 * count, theta=theta, exponents=exponents) for name in VISUAL_AXES)


LTX_ROPE = Rope(
    owner="rope",
    form="theta of all axes",
    axes=fractions,
    kinds=("none", "pi"),
    note="positions are coordinates, which turn many times within a frame: divide all frequencies of an axis by one "
    "number; none of them has a period in frames",
)

LTX = Adapter(
    name="ltx",
    transformers=("LTXVideoTransformer3DModel",),
    self_attention=("transformer_blocks.*.attn1",),
    blocks=(BlockList(pattern="transformer_blocks.*", joined=True),),
    sizes=partial(read_sizes, mlp_ratio=4.0),
    grid=packed_grid,
    signal=_modulated_input,
    cross_attention=CrossAttention(modules=("transformer_blocks.*.attn2",), projection="caption_projection"),
    rope=LTX_ROPE,
    families=released("ltx", patch=(1, 1, 1)),
)

# Video and sound in two streams: ``attn1`` is video's own, sound and text come in by cross-attention. Sound is never
# thinned out: its attention and both crossings are left alone. Reference tokens of the IC-LoRA and keyframe pipelines
# stand behind the video and count as text.
LTX2 = Adapter(
    name="ltx-2",
    transformers=("LTX2VideoTransformer3DModel",),
    guidance=Guidance(
        alone=("LTX2DFRPipeline", "LTX2DFRTemporalRefinePipeline", "EchoModularPipeline"),
        converted=("LTX2ModularPipeline",),
    ),
    self_attention=("transformer_blocks.*.attn1",),
    blocks=(
        BlockList(
            pattern="transformer_blocks.*", takes=("hidden_states", "audio_hidden_states"), gives=(0, 1), joined=True
        ),
    ),
    sizes=partial(read_sizes, mlp_ratio=4.0),
    grid=packed_grid,
    rope=replace(LTX_ROPE, note="as LTX; sound, and attention between video and sound, keep their own positions"),
    families=released("ltx-2", patch=(1, 1, 1)),
)
