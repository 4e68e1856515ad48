"""Rows of a forward that holds two prompts: of its inputs, and of what it gives."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError

Sample = Tensor | list[Tensor]
"""A prediction: [B, ...], or a tensor for each row."""


def halves_alike(latents: Any) -> bool:
    """Tell whether the first half of the rows has the same latents as the second, as guidance in one call has."""
    count = len(latents)
    if count % 2:
        return False
    pairs = zip(latents[: count // 2], latents[count // 2 :], strict=True)
    return all(one.shape == other.shape and torch.equal(one, other) for one, other in pairs)


def rows_of(value: Any, rows: slice, batch: int) -> Any:
    """Return some rows of an input: of tensors, of lists with an entry for each row, and of what holds these.

    A tuple or a list of tensors is several inputs, unless it has an entry for each row, of one row.
    """
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == batch else value
    if isinstance(value, Mapping):
        return {name: rows_of(one, rows, batch) for name, one in value.items()}
    if isinstance(value, list) and len(value) == batch and not any(_has_rows(one, batch) for one in value):
        return value[rows]
    if isinstance(value, (list, tuple)):
        return type(value)(rows_of(one, rows, batch) for one in value) if type(value) in (list, tuple) else value
    return value


def with_rows_again(value: Any, rows: slice, batch: int) -> Any:
    """Return an input with some of its rows once more behind all; what `rows_of` finds no rows in stays."""
    if isinstance(value, Tensor):
        return torch.cat([value, value[rows]]) if value.ndim and len(value) == batch else value
    if isinstance(value, Mapping):
        return {name: with_rows_again(one, rows, batch) for name, one in value.items()}
    if isinstance(value, list) and len(value) == batch and not any(_has_rows(one, batch) for one in value):
        return [*value, *value[rows]]
    if type(value) in (list, tuple):
        return type(value)(with_rows_again(one, rows, batch) for one in value)
    return value


def _has_rows(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1 and len(value) == batch


def sample_rows(sample: Sample, rows: slice | None) -> Sample:
    """Return some rows of a prediction."""
    return sample if rows is None else sample[rows]


def mapped(function: Callable[..., Tensor], *samples: Sample) -> Sample:
    """Return what a function of [B, ...] tensors gives, row by row where the predictions are lists."""
    if isinstance(samples[0], Tensor):
        return function(*samples)
    return [function(*(row[None] for row in rows))[0] for rows in zip(*samples, strict=True)]


def as_rows(sample: Sample) -> list[Tensor]:
    """Return a prediction as a list of tensors."""
    return [sample] if isinstance(sample, Tensor) else sample


def repeated(sample: Sample) -> Sample:
    """Return a prediction twice, one behind the other."""
    return torch.cat([sample, sample]) if isinstance(sample, Tensor) else [*sample, *sample]


def plus(sample: Sample, further: Sample) -> Sample:
    """Return a sum in the first's own dtype; it is formed in the other's."""
    return mapped(lambda one, other: (one.to(other.dtype) + other).to(one.dtype), sample, further)


def shapes(sample: Sample) -> Any:
    """Return a prediction's shape, or its rows'."""
    return sample.shape if isinstance(sample, Tensor) else [row.shape for row in sample]


def require_sample(sample: Any, transformer: str) -> Sample:
    """Return a forward's prediction.

    Raises:
        ConfigError: if it is neither a tensor nor a list of them.
    """
    if isinstance(sample, Tensor) or (isinstance(sample, list) and all(isinstance(row, Tensor) for row in sample)):
        return sample
    raise ConfigError(
        f"{transformer} gives {type(sample).__name__} instead of a prediction, which can't be guided; detach the method"
    )
