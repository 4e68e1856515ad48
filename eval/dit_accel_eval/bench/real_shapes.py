"""Transformers of released models' shapes, by the families' sizes, with random weights and few layers; their inputs."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dit_accel import ConfigError
from dit_accel.adapters import installed
from dit_accel.adapters.adapter import Adapter, Family
from dit_accel.errors import did_you_mean
from dit_accel.estimate.prediction import Prediction
from dit_accel.plan.layout import TokenLayout

Inputs = dict[str, Any]

LATENTS = {
    "cogvideox": "fchw", "flux": "sc", "hunyuan-video": "cfhw", "ltx": "sc", "mochi": "cfhw", "sd3": "chw",
    "wan": "cfhw",
}  # fmt: skip
"""Adapter -> the axes of its latents: channels, frames, height and width, or packed tokens and channels."""

TEXT_WIDTH = 4096  # channels of T5's and Llama's text, which all of these models take
MIDDLE = {"flux": 0.5}  # adapter -> the timestep in the middle of a run, where that is not 500
EXACT = ("timestep", "img_ids", "txt_ids", "guidance")  # inputs that stay in float32


def find_family(name: str) -> tuple[Adapter, Family]:
    """Return a family whose transformers can be made here, with its adapter."""
    adapter, family = installed.described(name)
    if adapter.name not in LATENTS:
        known = [member.name for key in LATENTS for member in installed.adapters()[key].families]
        raise ConfigError(f"bench can't make the inputs of {name} yet; {did_you_mean(name, known)}")
    return adapter, family


def make_model(adapter: Adapter, family: Family, planned: Prediction) -> tuple[Any, Inputs]:
    """Return a transformer with random weights, float32 on the CPU, and the inputs of one forward of one row."""
    import diffusers

    layout, (step, scale) = planned.layout, family.vae
    latents = {
        "f": 1 + (planned.num_frames - 1) // step, "h": planned.height // scale, "w": planned.width // scale,
        "s": layout.visual_tokens,
    }  # fmt: skip
    torch.manual_seed(0)
    model = getattr(diffusers, adapter.transformers[0])
    options, layers = {**_config(family, latents), "num_layers": family.layers}, family.layers
    if "num_single_layers" in _names(model):  # of double and single ones a third and the rest
        if layers < 2:
            raise ConfigError(f"{family.name} has two kinds of blocks, got --layers {layers}; ask for 2 or more")
        double = max(1, round(layers / 3))
        options |= {"num_layers": double, "num_single_layers": layers - double}
    transformer = model(**{name: value for name, value in options.items() if name in _names(model)}).eval()
    latents["c"] = transformer.config.in_channels
    shape = (1, *(latents[axis] for axis in LATENTS[adapter.name]))
    known = _inputs(family, layout, transformer.config, shape, MIDDLE.get(adapter.name, 500.0))
    inputs = {name: value for name, value in known.items() if name in _names(transformer.forward)}
    grid, expected = adapter.grid(transformer.config, inputs), (layout.frames, layout.height, layout.width)
    if isinstance(grid, str) or grid[:3] != expected:
        raise ConfigError(f"a forward of {family.name} has the grid {grid}, but the plan says {expected}")
    return transformer, inputs


def _names(call: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(call).parameters


def _config(family: Family, latents: Mapping[str, int]) -> dict[str, Any]:
    """Return the sizes of a family by all names that diffusers' configs give them; each class takes some of them."""
    width, side = family.heads * family.head_dim, max(192, latents["h"] // 2, latents["w"] // 2)
    sizes = dict(
        num_attention_heads=family.heads, attention_head_dim=family.head_dim, ffn_dim=family.ffn_dim,
        cross_attention_dim=width, caption_projection_dim=width, guidance_embeds=True, pos_embed_max_size=side,
        max_text_seq_length=family.text_tokens, sample_frames=4 * latents["f"] - 3, sample_height=latents["h"],
        sample_width=latents["w"],
    )  # fmt: skip
    return sizes if family.in_channels is None else {**sizes, "in_channels": family.in_channels}


def _inputs(family: Family, layout: TokenLayout, config: Any, latents: tuple[int, ...], time: float) -> Inputs:
    """Return the inputs of a forward by all names that diffusers' transformers give them; each takes some of them."""
    text, (rows, columns) = family.text_tokens or family.cross_tokens, (layout.height, layout.width)
    places = torch.cartesian_prod(torch.arange(1.0), torch.arange(float(rows)), torch.arange(float(columns)))
    return dict(
        hidden_states=torch.randn(latents), timestep=torch.tensor([time]), guidance=torch.tensor([7 * time]),
        encoder_hidden_states=torch.randn(1, text, TEXT_WIDTH), encoder_attention_mask=torch.ones(1, text).bool(),
        pooled_projections=torch.randn(1, config.get("pooled_projection_dim", 1)), txt_ids=torch.zeros(text, 3),
        img_ids=places, num_frames=layout.frames, height=rows, width=columns,
    )  # fmt: skip


def to_device(inputs: Inputs, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Return inputs on a device, floats in the dtype but for `EXACT`."""
    return {
        name: value.to(device, dtype if value.is_floating_point() and name not in EXACT else None)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }
