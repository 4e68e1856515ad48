"""How models share a head's channels among axes, and how long their tables are; for the data of `Rope`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .rope import VISUAL_AXES, Axis

Axes = Callable[[Mapping[str, Any]], tuple[Axis, ...]]
"""`Rope.axes`: transformer config -> the axes."""

Lengths = Callable[[Mapping[str, Any]], Mapping[str, int]]
"""`Rope.max_positions`: transformer config -> axis -> tokens; what a config lacks is the class's default."""


def even(names: Sequence[str], channels: int, theta: float = 10000.0) -> tuple[Axis, ...]:
    """Return axes of as many channels each."""
    return tuple(Axis(name=name, channels=channels, theta=theta) for name in names)


def by_config(
    key: str, names: Sequence[str], theta: float, *, theta_key: str = "", default: Sequence[int] | None = None
) -> Axes:
    """Return ``axes`` for configs that tell each axis's channels.

    Args:
        key: the config's name of the channels.
        names: of the axes; the last ones, where a config has fewer.
        theta: the base.
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


def eighths(config: Mapping[str, Any]) -> tuple[Axis, ...]:
    """Return CogVideoX's axes: a quarter of the head for frames, three eighths for height and for width."""
    head = config["attention_head_dim"]
    channels = zip(VISUAL_AXES, (head // 4, head // 8 * 3, head // 8 * 3), strict=True)
    return tuple(Axis(name=name, channels=width, theta=10000.0) for name, width in channels)


def fractions(config: Mapping[str, Any]) -> tuple[Axis, ...]:
    """Return LTX's axes, of coordinates in quarter turns that run from -1 to 1 over 20 seconds or 2,048 pixels.

    Frequency j of n is theta^(j / (n - 1)); they are laid over all heads together.
    """
    count = config["num_attention_heads"] * config["attention_head_dim"] // 6
    exponents = tuple(-j / (count - 1) for j in range(count))
    theta = float(config.get("rope_theta", 10000.0))
    return tuple(Axis(name=name, channels=2 * count, theta=theta, exponents=exponents) for name in VISUAL_AXES)


def learned(config: Mapping[str, Any]) -> tuple[Axis, ...]:
    """Return Mochi's axes: each rotates all channels, their angles add up."""
    return tuple(Axis(name=name, channels=config["attention_head_dim"], theta=None) for name in VISUAL_AXES)


def interleaved(sections: Sequence[int], dim: int, theta: float) -> tuple[Axis, ...]:
    """Return axes that take turns over the frequencies of one, until height and width have theirs.

    Frequency j is height's for j = 1, 4, 7 ... below 3 x its section, width's for j = 2, 5, 8 ..., else frames'.

    Args:
        sections: frequencies of (frames, height, width).
        dim: channels of a head.
        theta: the base.
    """
    places: list[list[int]] = [[], [], []]
    for place in range(dim // 2):
        turn = place % 3
        places[turn if place < 3 * sections[turn] else 0].append(place)
    return tuple(
        Axis(name=name, channels=2 * len(own), theta=theta, exponents=tuple(2 * place / dim for place in own))
        for name, own in zip(VISUAL_AXES, places, strict=True)
    )


def same_length(key: str, default: int) -> Lengths:
    """Return ``max_positions`` for configs that tell one length for all axes; ``default`` is the class's own."""
    return lambda config: dict.fromkeys(VISUAL_AXES, config.get(key, default))


def lengths_of_image(key: str, default: tuple[int, int]) -> Lengths:
    """Return ``max_positions`` for configs that tell each axis's length, text's first.

    Args:
        key: the config's name of the lengths.
        default: the class's own of height and width.
    """
    return lambda config: dict(zip(("height", "width"), config.get(key, default)[-2:], strict=True))


def fixed_lengths(**lengths: int) -> Lengths:
    """Return ``max_positions`` for lengths that the model's code fixes."""
    return lambda config: lengths


def cosmos_lengths(config: Mapping[str, Any]) -> Mapping[str, int]:
    """Return the sizes of Cosmos 1's learned table; without one, the longest for all, as one range serves them."""
    most, patches = config.get("max_size", (128, 240, 240)), config.get("patch_size", (1, 2, 2))
    sizes = [size // patch for size, patch in zip(most, patches, strict=True)]
    if not config.get("extra_pos_embed_type", "learnable"):
        sizes = [max(sizes)] * 3
    return dict(zip(VISUAL_AXES, sizes, strict=True))


def cogvideox_lengths(config: Mapping[str, Any]) -> Mapping[str, int]:
    """Return CogVideoX 1.5's limits: its positions are cut out of the trained grid; version 1's are scaled to it."""
    if config.get("patch_size_t") is None:
        return {}
    sizes = {axis: config.get(f"sample_{axis}", own) for axis, own in (("height", 60), ("width", 90))}
    return {axis: size // config.get("patch_size", 2) for axis, size in sizes.items()}
