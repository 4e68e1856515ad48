"""CogView3+, CogView4 and GLM-Image: text first, then the image, in every block.

GLM-Image's reference images run once by themselves and stay as cached keys and values, in front of the text.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from dit_accel.adapters import (
    JOINT,
    NO_STEP,
    Adapter,
    BlockList,
    Grid,
    Guidance,
    JoinedText,
    Rope,
    latents_grid,
    read_sizes,
)
from dit_accel.adapters.rope_axes import even

from .released import released

text_first = partial(latents_grid, frames_axis=None, text="before")


def _with_cached_references(config: Any, inputs: Mapping[str, Any]) -> Grid:
    """Read the grid as CogView does; cached keys count as text. A forward that fills the cache is no denoising step."""
    grid, caches = text_first(config, inputs), inputs.get("kv_caches")
    if caches is None:
        return grid
    if caches[0].mode == "write":
        return NO_STEP
    cached = caches[0].k_caches[0].shape[1] if caches[0].mode == "read" and caches[0].k_caches else 0
    return *grid[:3], grid[3] + cached, 0


COGVIEW = Adapter(
    name="cogview",
    transformers=("CogView3PlusTransformer2DModel", "CogView4Transformer2DModel"),
    guidance=Guidance(together=("CogView3PlusPipeline",), in_turn=("CogView4ControlPipeline",)),
    noise=("flow", "none"),  # 4; 3
    self_attention=("transformer_blocks.*.attn1",),
    blocks=(BlockList(pattern="transformer_blocks.*", takes=JOINT, gives=(0, 1)),),
    sizes=partial(read_sizes, mlp_ratio=4.0),
    grid=text_first,
    rope=Rope(
        owner="rope",
        axes=lambda config: even(("height", "width"), config["attention_head_dim"] // 2),
        absent=lambda config: (
            None if "rope_axes_dim" in config else "CogView3+ adds sinusoidal positions to the patches"
        ),
        fitted=("height", "width"),
    ),
    joined_text=JoinedText(place="before"),
    families=released(
        "cogview",
        {
            "cogview4-6b": {"config": {"attention_head_dim": 128, "rope_axes_dim": (256, 256)}},
            "cogview3-plus-3b": {"config": {"attention_head_dim": 40}},
        },
    ),
    makes_images=True,
)
GLM_IMAGE = replace(
    COGVIEW,
    name="glm-image",
    transformers=("GlmImageTransformer2DModel",),
    guidance=Guidance(in_turn=("GlmImagePipeline",)),
    grid=_with_cached_references,
    rope=Rope(owner="rope", axes=lambda config: even(("height", "width"), config["attention_head_dim"] // 2)),
    joined_text="cached keys of its reference images are those of the prompt alone",
    families=(),
)
