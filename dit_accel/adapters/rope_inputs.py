"""How rotary positions are changed that the pipeline makes and the forward is given.

- ``pairs``: (cos, sin), each [tokens, channels], neighbouring channels equal.
- ``tables of axes``: (cos, sin) [positions, channels] for each axis, halves equal; then the tokens' places in them.
- ``plane``: complex [height, width, channels / 2], the two axes' frequencies taking turns.

The positions are read off the values, and the values turned by position x (new - own frequency): where nothing changes,
nothing is rounded.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .rotary import Axis, Resolve, Rope

UNREADABLE = 1e-3
"""How far cos and sin may be from those of the positions that are read off them; float16 keeps within it."""


def change_input(
    rope: Rope, transformer: Any, axes: tuple[Axis, ...], resolve: Resolve
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Return a function of a forward's inputs by name that changes the positions among them.

    The function raises `ConfigError` where the positions are missing or can't be read.
    """
    make = {"pairs": _pairs, "tables of axes": _tables_of_axes, "plane": _plane}[rope.form]
    last: list[Any] = []  # pipelines give the same tensors at every step

    def inputs(arguments: Mapping[str, Any]) -> dict[str, Any]:
        value = arguments.get(rope.input)
        if value is None:
            raise ConfigError(
                f"{type(transformer).__name__} was given no {rope.input}, whose frequencies are to change; give it, or "
                "detach"
            )
        if not last or last[0] is not value:
            last[:] = [value, make(value, axes, resolve)]
        return {**arguments, rope.input: last[1]}

    return inputs


def _own(axis: Axis, device: torch.device) -> Tensor:
    return torch.from_numpy(axis.frequencies()).to(device)


def _turned(values: Tensor, axis: Axis, index: int, resolve: Resolve) -> Tensor:
    """Return cos + i sin [n, frequencies] of other frequencies, complex128; equal where the frequencies are."""
    freqs = _own(axis, values.device)
    places = _read_positions(values, freqs, axis)
    return values * torch.polar(torch.ones(()).to(freqs), places[:, None] * (resolve(index, freqs) - freqs))


def _read_positions(values: Tensor, freqs: Tensor, axis: Axis) -> Tensor:
    """Return the positions [n] that cos + i sin [n, frequencies] are made from, from the slowest frequency on."""
    angles, turn = values.angle(), 2 * torch.pi
    places = angles[:, -1] / freqs[-1]
    for j in reversed(range(len(freqs) - 1)):
        places = (angles[:, j] + turn * ((places * freqs[j] - angles[:, j]) / turn).round()) / freqs[j]
    error = (torch.polar(torch.ones(()).to(freqs), places[:, None] * freqs) - values).abs().max()
    if not error < UNREADABLE:
        raise ConfigError(
            f"the given cos and sin along {axis.name} are {float(error):.2g} away from those of any positions with "
            f"theta {axis.theta} over {axis.channels} channels; give those that the model's pipeline makes"
        )
    return places


def _pairs(value: tuple[Tensor, Tensor], axes: tuple[Axis, ...], resolve: Resolve) -> tuple[Tensor, Tensor]:
    cos, sin = (part.clone() for part in value)
    ends = list(itertools.accumulate(axis.channels for axis in axes))
    for index, (axis, end) in enumerate(zip(axes, ends, strict=True)):
        at = slice(end - axis.channels, end)
        turned = _turned(torch.complex(cos[:, at][:, ::2].double(), sin[:, at][:, ::2].double()), axis, index, resolve)
        for part, new in ((cos, turned.real), (sin, turned.imag)):
            part[:, at] = new.repeat_interleave(2, 1).to(part.dtype)
    return cos, sin


def _tables_of_axes(value: tuple[Any, Any], axes: tuple[Axis, ...], resolve: Resolve) -> tuple[Any, Any]:
    tables, positions = value
    changed = []
    for index, (axis, (cos, sin)) in enumerate(zip(axes, tables, strict=True)):
        half = axis.channels // 2
        turned = _turned(torch.complex(cos[:, :half].double(), sin[:, :half].double()), axis, index, resolve)
        new = (turned.real, turned.imag)
        changed.append(tuple(torch.cat([x, x], -1).to(old.dtype) for x, old in zip(new, (cos, sin), strict=True)))
    return changed, positions


def _plane(value: Tensor, axes: tuple[Axis, ...], resolve: Resolve) -> Tensor:
    """The pipeline scales these frequencies from step to step, so they are read off the values themselves."""
    changed = value.to(torch.complex128)
    for index in range(len(axes)):
        line = changed.select(1 - index, 0)[:, index::2]
        freqs, place = line[1].angle(), 1
        while 2 * place < len(line):
            place *= 2
            angle, turn = line[place].angle(), 2 * torch.pi
            freqs = (angle + turn * ((place * freqs - angle) / turn).round()) / place
        places = torch.arange(len(line), dtype=freqs.dtype, device=freqs.device)
        turned = torch.polar(torch.ones(()).to(freqs), torch.outer(places, resolve(index, freqs) - freqs))
        changed[..., index::2] *= turned[:, None] if index == 0 else turned[None]
    return changed.to(value.dtype)
