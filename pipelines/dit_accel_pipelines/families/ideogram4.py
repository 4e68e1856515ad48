"""Ideogram 4: padding, text, the packed image; the pipeline's second transformer sees the image alone."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from dit_accel.adapters import Adapter, BlockList, Grid, Guidance, Rope, read_sizes
from dit_accel.adapters.position_ids import last_image, read_once
from dit_accel.adapters.rope_axes import interleaved


def image_last(config: Any, inputs: Mapping[str, Any]) -> Grid | str:
    """Read the grid off ``position_ids``, which the image ends; all in front of it counts as text."""
    image = read_once(inputs["position_ids"], last_image)
    if isinstance(image, str):
        return image
    height, width = image
    return 1, height, width, inputs["hidden_states"].shape[1] - height * width, 0


IDEOGRAM4 = Adapter(
    name="ideogram4",
    transformers=("Ideogram4Transformer2DModel",),
    self_attention=("layers.*.attention",),
    blocks=(BlockList(pattern="layers.*", joined=True),),
    sizes=partial(read_sizes, ffn_dim="intermediate_size", gated=True, patch=(1, 2, 2)),
    grid=image_last,
    outer_masks=True,  # padding sees padding, which nobody reads
    guidance=Guidance(
        branch_of={"transformer": "cond", "unconditional_transformer": "uncond"},
        uncond_tokens="last",  # the image, without the prompt in front of it
    ),
    joined_text="text and image are packed into one sequence for the prompt",
    makes_images=True,
    rope=Rope(
        owner="rotary_emb",
        form="frequencies",
        parts=("inv_freq",),
        axes=lambda config: interleaved(config["mrope_section"], config["attention_head_dim"], config["rope_theta"]),
        text=lambda inputs: inputs["position_ids"][..., 0] < 65536,  # where the image's positions begin
        note="the image stands 65,536 positions behind the text, whose angles change with the frequencies",
    ),
)
