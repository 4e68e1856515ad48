"""Cosmos 3: text attends to itself, causally; vision, then sound and actions, attend to text and to one another.

The two calls are one processor's. The second one's queries leave text out, so text is in its columns alone; sound and
actions stand behind the vision tokens, earlier vision items (images that are given) before them, and all stay exact.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from dit_accel.adapters import Adapter, Grid, Rope, read_sizes
from dit_accel.adapters.rope_axes import interleaved


def last_vision_item(config: Any, inputs: Mapping[str, Any]) -> Grid:
    """Read the grid off ``vision_token_shapes``, which count tokens: the last item is the one that is made."""
    *shapes, (frames, height, width) = inputs["vision_token_shapes"]
    before = inputs["und_len"] + sum(math.prod(shape) for shape in shapes)
    return frames, height, width, before, inputs["sequence_length"] - before - frames * height * width


COSMOS3 = Adapter(
    name="cosmos-3",
    transformers=("Cosmos3OmniTransformer",),
    self_attention=("layers.*.self_attn",),
    sizes=partial(
        read_sizes,
        layers=("num_hidden_layers",),
        head_dim="head_dim",
        width="hidden_size",
        ffn_dim="intermediate_size",
        gated=True,
        patch="latent_patch_size",
    ),
    grid=last_vision_item,
    latents="vision_tokens",
    timestep="vision_timesteps",
    separate_text_attention=True,
    rope=Rope(
        owner="rotary_emb",
        form="frequencies",
        parts=("inv_freq",),
        axes=lambda config: interleaved(config["rope_axes_dim"], config["head_dim"], config["rope_theta"]),
        text=lambda inputs: inputs["und_len"],
        note="sound and actions share the video's time axis and move with it",
    ),
    joined_text="text, vision and sound are packed into one sequence for the prompt",
)
