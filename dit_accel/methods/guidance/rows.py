"""Rows of a forward that holds two prompts: of its inputs, and of what it gives."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ...adapters.adapter import Adapter
from ...errors import ConfigError

Sample = Tensor | list[Tensor]
"""A prediction: [B, ...], or a tensor for each row."""

Axis = int | Literal["each"] | None
"""Where an input holds its rows: see `Guidance.rows`."""


def rows_of(inputs: Mapping[str, Any], rows: slice, batch: int, adapter: Adapter | None = None) -> dict[str, Any]:
    """Return a forward's inputs with some of their rows; what holds no rows stays.

    ``adapter``: says where inputs hold their rows; None: all along the first axis.
    """
    return _each_input(inputs, batch, adapter, lambda value, axis: value[_index(rows, axis)])


def with_rows_again(inputs: Mapping[str, Any], rows: slice, batch: int, adapter: Adapter) -> dict[str, Any]:
    """Return a forward's inputs with some of their rows once more behind all; what holds no rows stays."""

    def again(value: Any, axis: int) -> Any:
        more = value[_index(rows, axis)]
        return torch.cat([value, more], dim=axis) if isinstance(value, Tensor) else [*value, *more]

    return _each_input(inputs, batch, adapter, again)


def _index(rows: slice, axis: int) -> Any:
    return (slice(None),) * axis + (rows,) if axis else rows


def _each_input(
    inputs: Mapping[str, Any], batch: int, adapter: Adapter | None, change: Callable[[Any, int], Any]
) -> dict[str, Any]:
    """Return inputs, changed where they hold a row for each of the batch."""

    def of(name: str, value: Any) -> Any:
        axis = axis_of(name, value, adapter)
        if axis == "each" and isinstance(value, (list, tuple)):
            return change(value, 0)
        return value if axis is None else _change_rows(value, 0 if axis == "each" else axis, batch, change)

    return {name: of(name, value) for name, value in inputs.items()}


def _change_rows(value: Any, axis: int, batch: int, change: Callable[[Any, int], Any]) -> Any:
    """Change the tensors of an input that hold the batch along an axis; a tensor of another size holds no rows."""
    if isinstance(value, Tensor):
        return change(value, axis) if value.ndim > axis and value.shape[axis] == batch else value
    if isinstance(value, Mapping):
        return {name: _change_rows(entry, axis, batch, change) for name, entry in value.items()}
    if type(value) not in (list, tuple):
        return value
    inner = max(0, axis - 1)  # a list counts as an axis
    return type(value)(_change_rows(entry, inner, batch, change) for entry in value)


def axis_of(name: str, value: Any, adapter: Adapter | None) -> Axis:
    """Return an input's axis of rows: as the adapter says, latents in a list one by one, else the first."""
    if adapter is None:
        return 0
    if name in adapter.guidance.rows:
        return adapter.guidance.rows[name]
    return "each" if name == adapter.latents and isinstance(value, list) else 0


def mapped(function: Callable[..., Tensor], *samples: Sample) -> Sample:
    """Apply a function of [B, ...] tensors, row by row where the predictions are lists."""
    if isinstance(samples[0], Tensor):
        return function(*samples)
    return [function(*(row[None] for row in rows))[0] for rows in zip(*samples, strict=True)]


def as_rows(sample: Sample) -> list[Tensor]:
    """Return a prediction as a list of tensors."""
    return [sample] if isinstance(sample, Tensor) else sample


def joined(first: Any, second: Any) -> Any:
    """Return two forwards' outputs as that of one forward, the rows of the second behind those of the first."""

    def behind(one: Any, other: Any) -> Any:
        return torch.cat([one, other]) if isinstance(one, Tensor) else one and [*one, *other]

    return tree_map(behind, first, second, is_leaf=lambda part: isinstance(part, list))


def plus(sample: Sample, further: Sample) -> Sample:
    """Return the sum in the first sample's dtype, computed in the second's."""
    return mapped(lambda first, other: (first.to(other.dtype) + other).to(first.dtype), sample, further)


def shapes(sample: Sample) -> Any:
    """Return a prediction's shape, or its rows'."""
    return sample.shape if isinstance(sample, Tensor) else [row.shape for row in sample]


def require_sample(sample: Any, transformer: str) -> Sample:
    """Return a forward's prediction; raise `ConfigError` if it is neither a tensor nor a list of them."""
    if isinstance(sample, Tensor) or (isinstance(sample, list) and all(isinstance(row, Tensor) for row in sample)):
        return sample
    raise ConfigError(
        f"{transformer} gives {type(sample).__name__} instead of a prediction, which can't be guided; detach the method"
    )
