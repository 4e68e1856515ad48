"""Tiny models of every family for `check_adapter`: configs and inputs with all three grid sizes different."""

from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from wan_tiny import TINY as WAN_TINY

from dit_accel.testing import TinyModel


def _steps(batch: int, value: float = 500.0) -> torch.Tensor:
    return torch.full((batch,), value)


def _wan(batch: int) -> Mapping[str, Any]:
    return dict(
        hidden_states=torch.randn(batch, 12, 7, 8, 10), timestep=_steps(batch),
        encoder_hidden_states=torch.randn(batch, 6, 64),
    )  # fmt: skip


def _wan_image(batch: int) -> Mapping[str, Any]:
    return dict(
        _wan(batch), hidden_states=torch.randn(batch, 28, 7, 8, 10),
        encoder_hidden_states=torch.randn(batch, 512, 64), encoder_hidden_states_image=torch.randn(batch, 7, 24),
    )  # fmt: skip


def _wan_vace(batch: int) -> Mapping[str, Any]:
    return dict(_wan(batch), control_hidden_states=torch.randn(batch, 20, 7, 8, 10))


WAN = (
    TinyModel(
        transformer=diffusers.WanTransformer3DModel, config=WAN_TINY, inputs=_wan, left_alone=("blocks.*.attn2",)
    ),
    TinyModel(
        transformer=diffusers.WanTransformer3DModel,
        config={**WAN_TINY, "in_channels": 28, "image_dim": 24, "added_kv_proj_dim": 32},
        inputs=_wan_image,
        left_alone=("blocks.*.attn2",),
    ),
    TinyModel(
        transformer=diffusers.WanVACETransformer3DModel,
        config={**WAN_TINY, "vace_layers": [0, 2], "vace_in_channels": 20},
        inputs=_wan_vace,
        left_alone=("*blocks.*.attn2",),
    ),
)

MODELS = {"wan": WAN}
"""Adapter name -> its tiny models."""
