"""MiniMax-H3: text, keyframes, sound and, last, the video in one packed sequence and one attention.

Only the video's own rows and columns can be thinned out: all that stands before it counts as text and stays exact. The
refiner attends over text alone and is left out.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from dit_accel.adapters import VISUAL_AXES, Adapter, BlockList, Grid, Guidance, Rope, read_sizes
from dit_accel.adapters.position_ids import last_video, read_once
from dit_accel.adapters.rope_axes import even


def packed_video(config: Any, inputs: Mapping[str, Any]) -> Grid | str:
    """Read the grid off ``position_ids``: no shape tells the video's frames, height and width."""
    video = read_once(inputs["position_ids"], last_video)
    if isinstance(video, str):
        return video
    frames, height, width = video
    return frames, height, width, inputs["position_ids"].shape[0] - frames * height * width, 0


INDICES = [f"{of}_indices" for of in ("timestep", "video", "audio", "text")]

MINIMAX_H3 = Adapter(
    name="minimax-h3",
    transformers=("MiniMaxH3Transformer3DModel",),
    guidance=Guidance(
        alone=("MiniMaxH3ModularPipeline",), rows=dict.fromkeys(("timestep", "token_tags", "position_ids", *INDICES))
    ),
    toward_clean=True,
    self_attention=("transformer_blocks.*.attn",),
    blocks=(BlockList(pattern="transformer_blocks.*", joined=True),),
    sizes=partial(read_sizes, width="hidden_size", gated=True),
    grid=packed_video,
    split_text="none",
    rope=Rope(
        owner="rope",
        form="frequencies of all axes",
        parts=("inv_freq",),
        axes=lambda config: even(VISUAL_AXES, 2 * config["rope_freq_dim"], config["rope_theta"]),
        text=lambda inputs: len(inputs["text_indices"]),
        note="sound shares the video's time axis and moves with it",
    ),
    joined_text="text, sound and video are packed into one sequence for the prompt",
)
