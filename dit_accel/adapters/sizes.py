"""Sizes of a transformer, read off its config: what plans and reports count with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of one transformer.

    Attributes:
        layers: transformer blocks that hold a self-attention.
        heads: attention heads, H.
        head_dim: channels of a head, D.
        ffn_dim: hidden width of a feed-forward of two matrices that costs what a block's own does for each visual
            token: a gated one, of three matrices, counts 3/2 of its width. None: the config does not tell.
        patch: (t, h, w) latents that a token covers; None: the config does not tell.
    """

    layers: int
    heads: int
    head_dim: int
    ffn_dim: int | None = None
    patch: tuple[int, int, int] | None = None


def patch_sizes(size: int | Sequence[int], frames: int | None = None) -> tuple[int, int, int]:
    """Return (t, h, w) of a config's ``patch_size``, of one to three numbers, and its ``patch_size_t``."""
    if isinstance(size, int):
        return frames or 1, size, size
    if len(size) == 2:
        return frames or 1, size[0], size[1]
    return size[0], size[1], size[2]


def read_sizes(
    config: Mapping[str, Any],
    *,
    layers: Sequence[str] = ("num_layers", "num_single_layers"),
    heads: str | None = "num_attention_heads",
    head_dim: str | None = "attention_head_dim",
    width: str | None = None,
    ffn_dim: str = "ffn_dim",
    mlp_ratio: str | float | Fraction = "mlp_ratio",
    multiple_of: int = 1,
    gated: bool = False,
    patch: str | tuple[int, int, int] = "patch_size",
) -> Sizes:
    """Read the sizes off a transformer config, by diffusers' usual names or those of one family.

    Args:
        config: the transformer's config.
        layers: entries whose sum is the number of blocks; the first must be there, a list counts its entries.
        heads: entry of the attention heads; None: ``width`` divided by the channels of a head.
        head_dim: entry of a head's channels, a list counts its sum; None: ``width`` divided by the heads.
        width: entry of the blocks' width; None: heads times channels.
        ffn_dim: entry of the feed-forward's hidden width.
        mlp_ratio: where there is no ``ffn_dim``: the entry of its ratio to the blocks' width, or the ratio itself in
            classes that have it fixed.
        multiple_of: what a width from ``mlp_ratio`` is rounded up to a multiple of.
        gated: the feed-forward has three matrices.
        patch: entry of the latents a token covers in space, or in space and time; or (t, h, w) themselves where the
            pipeline packs latents into tokens.

    Raises:
        KeyError: with the name of an entry that is not there; ``ffn_dim`` and ``patch`` are None then.
        ConfigError: if more than one of ``heads``, ``head_dim`` and ``width`` is left out.
    """
    if [heads, head_dim, width].count(None) > 1:
        raise ConfigError("read_sizes needs two of heads, head_dim and width, which give the third; name another entry")
    number, channels, across = _attention(config, heads, head_dim, width)
    hidden = config.get(ffn_dim)
    ratio = config.get(mlp_ratio) if isinstance(mlp_ratio, str) else mlp_ratio
    if hidden is None and ratio is not None:
        hidden = ceil(int(across * ratio) / multiple_of) * multiple_of
    if hidden is not None:  # residual streams may be narrower than the attention
        hidden = int(hidden * across * (3 if gated else 2)) // (2 * number * channels)
    size = config.get(patch) if isinstance(patch, str) else patch
    return Sizes(
        layers=_blocks(config, layers),
        heads=number,
        head_dim=channels,
        ffn_dim=hidden,
        patch=None if size is None else patch_sizes(size, config.get("patch_size_t")),
    )


def _blocks(config: Mapping[str, Any], layers: Sequence[str]) -> int:
    counts = [_entry(config, layers[0]), *(config.get(name) or 0 for name in layers[1:])]
    return sum(count if isinstance(count, int) else len(count) for count in counts)


def _attention(
    config: Mapping[str, Any], heads: str | None, head_dim: str | None, width: str | None
) -> tuple[int, int, int]:
    """Return heads, channels of a head and the blocks' width, of which one entry may be left out."""
    number, channels, across = (_entry(config, name) if name else 0 for name in (heads, head_dim, width))
    channels = channels if isinstance(channels, int) else sum(channels)
    number = number or across // channels
    channels = channels or across // number
    return number, channels, across or number * channels


def _entry(config: Mapping[str, Any], name: str) -> Any:
    if config.get(name) is None:
        raise KeyError(name)
    return config[name]
