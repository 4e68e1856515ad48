"""A forward's inputs, taken row by row, widened, or with other latents; for `dit_accel.testing`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter
from .watching import WIDE


def own_name(adapter: Adapter, usual: str) -> str:
    """Return the model's own name of an input."""
    return next((own for own, name in adapter.names.items() if name == usual), usual)


def rows(value: Any, row: int, batch: int) -> Any:
    """Take one row of tensors, and of lists that have one entry a row."""
    if isinstance(value, Tensor):
        return value[row : row + 1] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {name: rows(x, row, batch) for name, x in value.items()}
    if isinstance(value, list):
        return value[row : row + 1] if len(value) == batch else [rows(x, row, batch) for x in value]
    return value


def widened(value: Any) -> Any:
    """Return floating-point tensors in float64, in lists too."""
    if isinstance(value, Tensor):
        return value.to(WIDE) if value.is_floating_point() else value
    return type(value)(widened(item) for item in value) if isinstance(value, (tuple, list)) else value


def wide_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs in float64."""
    return {name: widened(x) for name, x in inputs.items()}


def as_tensor(value: Tensor | list[Tensor]) -> Tensor:
    """Return one tensor of latents or results that may come as a list, one a row."""
    return torch.stack(value) if isinstance(value, list) else value


def with_latents(adapter: Adapter, inputs: Mapping[str, Any], latents: Tensor) -> dict[str, Any]:
    """Return the inputs with other latents, in the form that they have."""
    name = own_name(adapter, "hidden_states")
    return {**inputs, name: list(latents) if isinstance(inputs[name], list) else latents}


def with_other_padding(adapter: Adapter, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the inputs with other text where a mask hides it, or None where nothing is hidden."""
    masks = ("encoder_attention_mask", "encoder_hidden_states_mask", "attention_mask")
    mask = next((inputs[name] for name in masks if inputs.get(name) is not None), None)
    name = own_name(adapter, "encoder_hidden_states")
    text = inputs[name]
    if mask is None or not isinstance(text, Tensor):
        return None
    axis = 1 if text.shape[1] <= mask.shape[1] else 2
    visible = mask.bool()[:, : text.shape[axis]]
    if bool(visible.all()):
        return None
    shape = [text.shape[0], *(text.shape[axis] if i == axis else 1 for i in range(1, text.ndim))]
    return {**inputs, name: torch.where(visible.reshape(shape), text, 3.0)}
