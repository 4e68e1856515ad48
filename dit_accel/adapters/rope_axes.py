"""How models share a head's channels among axes, and how long their tables are; for the data of `Rope`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .rotary import VISUAL_AXES, Axis

Axes = Callable[[Mapping[str, Any]], tuple[Axis, ...]]
"""`Rope.axes`: transformer config -> the axes."""

Lengths = Callable[[Mapping[str, Any]], Mapping[str, int]]
"""`Rope.max_positions`: transformer config -> axis -> tokens; what a config lacks is the class's default."""


def even(names: Sequence[str], channels: int, theta: float = 10000.0) -> tuple[Axis, ...]:
    """Return axes of as many channels each."""
    return tuple(Axis(name=name, channels=channels, theta=theta) for name in names)


def by_config(
    key: str, names: Sequence[str], theta: float, *, theta_key: str = "rope_theta", default: Sequence[int] | None = None
) -> Axes:
    """Return ``axes`` for configs that tell each axis's channels.

    Args:
        key: the config's name of the channels.
        names: of the axes; the last ones, where a config has fewer.
        theta_key: the config's name of the base, which is ``theta`` where it has none.
        default: channels where a config does not tell them; None: it always does.
    """

    def axes(config: Mapping[str, Any]) -> tuple[Axis, ...]:
        channels = config[key] if default is None else config.get(key) or default
        base = float(config.get(theta_key, theta))
        pairs = zip(names[len(names) - len(channels) :], channels, strict=True)
        return tuple(Axis(name=name, channels=width, theta=base) for name, width in pairs)

    return axes


def thirds(config: Mapping[str, Any]) -> tuple[Axis, ...]:
    """Return Wan's axes: a third of the head for height and for width, in whole pairs, the rest for frames."""
    head = config["attention_head_dim"]
    side = 2 * (head // 6)
    channels = zip(VISUAL_AXES, (head - 2 * side, side, side), strict=True)
    return tuple(Axis(name=name, channels=width, theta=10000.0) for name, width in channels)


def scaled_thirds(config: Mapping[str, Any]) -> tuple[Axis, ...]:
    """Return Cosmos's axes: Wan's, with bases that ``rope_scale`` raises as NTK does."""
    return tuple(
        Axis(name=axis.name, channels=axis.channels, theta=10000.0 * scale ** (axis.channels / (axis.channels - 2)))
        for axis, scale in zip(thirds(config), config["rope_scale"], strict=True)
    )


def interleaved(sections: Sequence[int], dim: int, theta: float) -> tuple[Axis, ...]:
    """Return axes that take turns over the frequencies of one, until height and width have theirs.

    Frequency j is height's for j = 1, 4, 7 ... below 3 x its section, width's for j = 2, 5, 8 ..., else frames'.

    ``sections``: frequencies of (frames, height, width).
    """
    places: list[list[int]] = [[], [], []]
    for place in range(dim // 2):
        turn = place % 3
        places[turn if place < 3 * sections[turn] else 0].append(place)
    return tuple(
        Axis(name=name, channels=2 * len(indices), theta=theta, exponents=tuple(2 * place / dim for place in indices))
        for name, indices in zip(VISUAL_AXES, places, strict=True)
    )


def same_length(key: str, default: int) -> Lengths:
    """Return ``max_positions`` for configs that tell one length for all axes; ``default`` is the class's own."""
    return lambda config: dict.fromkeys(VISUAL_AXES, config.get(key, default))


def lengths_of_image(key: str, default: tuple[int, int]) -> Lengths:
    """Return ``max_positions`` for configs that tell all axes' lengths, text's first, or else the class's own."""
    return lambda config: dict(zip(("height", "width"), config.get(key, default)[-2:], strict=True))


def fixed_lengths(**lengths: int) -> Lengths:
    """Return ``max_positions`` for lengths that the model's code fixes."""
    return lambda config: lengths
