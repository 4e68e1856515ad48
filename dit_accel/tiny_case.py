"""Inputs of tiny transformers for `dit_accel.testing`: one row of them, and in float64."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .watching import WIDE


def rows_of(value: Any, row: int, batch: int) -> Any:
    """Take one row of tensors, and of lists that have one entry a row."""
    if isinstance(value, Tensor):
        return value[row : row + 1] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {name: rows_of(x, row, batch) for name, x in value.items()}
    if isinstance(value, list):
        return value[row : row + 1] if len(value) == batch else [rows_of(x, row, batch) for x in value]
    return value


def wide_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs with floating-point tensors in float64."""
    return {name: _widened(x) for name, x in inputs.items()}


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(WIDE) if value.is_floating_point() else value
    return type(value)(_widened(item) for item in value) if isinstance(value, (tuple, list)) else value
