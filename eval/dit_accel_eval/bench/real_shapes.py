"""Transformers of released models' shapes with random weights and few layers, and the inputs of their forwards.

Nothing is downloaded: sizes come from the families, the rest are diffusers' defaults, which are the released models'.
What the layout of a forward must be is what `dit-accel plan` computes for the same size, and is checked.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel import ConfigError
from dit_accel.adapters import installed
from dit_accel.adapters.adapter import Adapter, Family
from dit_accel.errors import did_you_mean
from dit_accel.plan.layout import TokenLayout

Config = dict[str, Any]
Inputs = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a forward is made of.

    Attributes:
        latents: frames, rows and columns of the latents.
    """

    family: Family
    layers: int
    layout: TokenLayout
    latents: tuple[int, int, int]

    @property
    def heads(self) -> Config:
        """The heads, by the names that diffusers' configs give them."""
        return dict(num_attention_heads=self.family.heads, attention_head_dim=self.family.head_dim)

    @property
    def split(self) -> Config:
        """Double and single blocks: a third of the layers and the rest, one of each at least."""
        double = max(1, round(self.layers / 3))
        return dict(num_layers=double, num_single_layers=max(1, self.layers - double))


def _wan(shape: Shape) -> tuple[str, Config, Inputs]:
    channels = shape.family.in_channels or 16
    config = dict(shape.heads, num_layers=shape.layers, ffn_dim=shape.family.ffn_dim, in_channels=channels)
    text = torch.randn(1, 512, 4096)
    return "WanTransformer3DModel", config, dict(_video(shape, channels), encoder_hidden_states=text)


def _hunyuan_video(shape: Shape) -> tuple[str, Config, Inputs]:
    tokens = shape.family.text_tokens
    inputs = dict(
        _video(shape, 16), encoder_hidden_states=torch.randn(1, tokens, 4096), guidance=torch.tensor([6000.0]),
        encoder_attention_mask=torch.ones(1, tokens, dtype=torch.long), pooled_projections=torch.randn(1, 768),
    )  # fmt: skip
    return "HunyuanVideoTransformer3DModel", {**shape.heads, **shape.split, "guidance_embeds": True}, inputs


def _mochi(shape: Shape) -> tuple[str, Config, Inputs]:
    tokens = shape.family.text_tokens
    text = dict(encoder_hidden_states=torch.randn(1, tokens, 4096), encoder_attention_mask=torch.ones(1, tokens).bool())
    return "MochiTransformer3DModel", dict(shape.heads, num_layers=shape.layers), dict(_video(shape, 12), **text)


def _cogvideox(shape: Shape) -> tuple[str, Config, Inputs]:
    frames, height, width = shape.latents
    inputs = dict(
        hidden_states=torch.randn(1, frames, 16, height, width), timestep=torch.tensor([500.0]),
        encoder_hidden_states=torch.randn(1, shape.family.text_tokens, 4096),
    )  # fmt: skip
    config = dict(
        shape.heads, num_layers=shape.layers, sample_height=height, sample_width=width, sample_frames=4 * frames - 3,
        max_text_seq_length=shape.family.text_tokens,
    )  # fmt: skip
    return "CogVideoXTransformer3DModel", config, inputs


def _ltx(shape: Shape) -> tuple[str, Config, Inputs]:
    frames, height, width = shape.latents
    config = dict(shape.heads, num_layers=shape.layers, cross_attention_dim=shape.family.heads * shape.family.head_dim)
    inputs = dict(
        hidden_states=torch.randn(1, frames * height * width, 128), timestep=torch.tensor([500.0]),
        encoder_hidden_states=torch.randn(1, 128, 4096), encoder_attention_mask=torch.ones(1, 128, dtype=torch.long),
        num_frames=frames, height=height, width=width,
    )  # fmt: skip
    return "LTXVideoTransformer3DModel", config, inputs


def _flux(shape: Shape) -> tuple[str, Config, Inputs]:
    rows, columns, text = shape.layout.height, shape.layout.width, shape.family.text_tokens
    places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).flatten(0, 1)
    inputs = dict(
        hidden_states=torch.randn(1, rows * columns, 64), timestep=torch.tensor([0.5]), guidance=torch.tensor([3.5]),
        encoder_hidden_states=torch.randn(1, text, 4096), pooled_projections=torch.randn(1, 768),
        txt_ids=torch.zeros(text, 3), img_ids=torch.cat([torch.zeros(rows * columns, 1), places.float()], 1),
    )  # fmt: skip
    return "FluxTransformer2DModel", {**shape.heads, **shape.split, "guidance_embeds": True}, inputs


def _sd3(shape: Shape) -> tuple[str, Config, Inputs]:
    _, height, width = shape.latents
    inner = shape.family.heads * shape.family.head_dim
    config = dict(
        shape.heads, num_layers=shape.layers, caption_projection_dim=inner, joint_attention_dim=4096,
        pos_embed_max_size=max(192, height // 2, width // 2),
    )  # fmt: skip
    inputs = dict(
        hidden_states=torch.randn(1, 16, height, width), timestep=torch.tensor([500.0]),
        encoder_hidden_states=torch.randn(1, shape.family.text_tokens, 4096), pooled_projections=torch.randn(1, 2048),
    )  # fmt: skip
    return "SD3Transformer2DModel", config, inputs


BUILDERS: dict[str, Callable[[Shape], tuple[str, Config, Inputs]]] = {
    "cogvideox": _cogvideox,
    "flux": _flux,
    "hunyuan-video": _hunyuan_video,
    "ltx": _ltx,
    "mochi": _mochi,
    "sd3": _sd3,
    "wan": _wan,
}
"""Adapter -> what makes the class's name, its config and the inputs of one row."""


def _video(shape: Shape, channels: int) -> Inputs:
    return dict(hidden_states=torch.randn(1, channels, *shape.latents), timestep=torch.tensor([500.0]))


def find_family(name: str) -> tuple[Adapter, Family]:
    """Return a family whose transformers can be made here, with its adapter.

    Raises:
        ConfigError: for an unknown family, or one whose inputs are not described, with those that are.
    """
    family = installed.family(name)
    adapter = next(one for one in installed.adapters().values() if family in one.families)
    if adapter.name not in BUILDERS:
        known = [one.name for key in BUILDERS for one in installed.adapters()[key].families]
        raise ConfigError(f"bench can't make the inputs of {name} yet; {did_you_mean(name, known)}")
    return adapter, family


def make_model(
    adapter: Adapter, family: Family, layers: int, layout: TokenLayout, *, height: int, width: int, num_frames: int
) -> tuple[Any, Inputs]:
    """Return a transformer with random weights, float32 on the CPU, and the inputs of one forward of one row.

    Raises:
        ConfigError: for fewer layers than the model has kinds of blocks, or if the forward's layout is not the plan's.
    """
    import diffusers

    step, scale = family.vae
    latents = (1 + (num_frames - 1) // step, height // scale, width // scale)
    torch.manual_seed(0)
    name, config, inputs = BUILDERS[adapter.name](Shape(family=family, layers=layers, layout=layout, latents=latents))
    made = sum(config.get(key, 0) for key in ("num_layers", "num_single_layers"))
    if made != layers:
        raise ConfigError(f"{family.name} has two kinds of blocks, got --layers {layers}; ask for {made} or more")
    transformer = getattr(diffusers, name)(**config).eval()
    grid = adapter.grid(transformer.config, inputs)
    expected = (layout.frames, layout.height, layout.width)
    if isinstance(grid, str) or grid[:3] != expected:
        raise ConfigError(f"a forward of {family.name} has the grid {grid}, but the plan says {expected}")
    return transformer, inputs


def to_device(inputs: Inputs, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Return inputs on a device, floats in the dtype but for timesteps, ids and guidance."""
    exact = ("timestep", "img_ids", "txt_ids", "guidance")

    def moved(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() and name not in exact else None)

    return {name: moved(name, value) for name, value in inputs.items()}
