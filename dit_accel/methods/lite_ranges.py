"""Token ranges that LiteAttention must keep or skip, as tiles."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layout import TokenLayout


def check_ranges(name: str, ranges: Sequence[int], tokens: int | None = None) -> None:
    """Refuse what is no list of ranges (start, end, start, end ...), ends exclusive and none overlapping.

    Args:
        name: the option's name.
        ranges: counts visual tokens from 0.
        tokens: visual tokens in all; None where that is not known yet.

    Raises:
        ConfigError: for an odd count, a range that is empty, out of order or out of the sequence.
    """
    if len(ranges) % 2:
        raise ConfigError(f"{name} must be start, end, start, end ... of visual tokens, got {len(ranges)} numbers")
    rising = all(a < b if place % 2 == 0 else a <= b for place, (a, b) in enumerate(pairwise(ranges)))
    if not rising or (ranges and ranges[0] < 0):
        raise ConfigError(f"{name} must rise from 0, each end above its start, got {tuple(ranges)}")
    if tokens is not None and ranges and ranges[-1] > tokens:
        raise ConfigError(f"{name} ends at visual token {ranges[-1]}, the video has {tokens}; end it there")


def range_tiles(
    ranges: Sequence[int], layout: TokenLayout, order: Tensor | None, block: int, *, inward: bool
) -> Tensor:
    """Return bool [N], on the CPU: the tiles that hold a token of the ranges or, ``inward``, no other token.

    Args:
        ranges: as `check_ranges` takes them.
        layout: the sequence.
        order: position in the tiles' order -> token index; None: the sequence's own order.
        block: tokens of a tile.
        inward: count the tiles that lie wholly in the ranges.
    """
    inside = torch.zeros(layout.tokens, dtype=torch.bool)
    for start, end in zip(ranges[::2], ranges[1::2], strict=True):
        inside[layout.text_before + start : layout.text_before + end] = True
    if order is not None:
        inside = inside[order.cpu()]
    inside = torch.nn.functional.pad(inside, (0, -len(inside) % block), value=inward).unflatten(0, (-1, block))
    return inside.all(1) if inward else inside.any(1)
