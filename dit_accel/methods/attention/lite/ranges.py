"""What no vote of LiteAttention decides: text, and the token ranges that it must keep or skip, as tiles."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

import torch
from dit_accel_kernels import TileLists, count_bits, pack_bits, unpack_bits
from torch import Tensor

from ....errors import ConfigError
from ....plan.context import CallContext
from ....plan.layout import TokenLayout
from ....plan.tiling import exact_bits, pinned_bits
from ...options import Rule


class FixedBits(NamedTuple):
    """Bits int32 [NQ, W]: ``pinned`` tiles stay exact; only those of ``first`` may, from the first call on. None: all.

    A pinned tile stays exact even if ``first`` lacks it.
    """

    pinned: Tensor | None
    first: Tensor | None


def _are_ranges(numbers: Sequence[int]) -> bool:
    rising = all(a < b if place % 2 == 0 else a <= b for place, (a, b) in enumerate(pairwise(numbers)))
    return len(numbers) % 2 == 0 and rising and min(numbers, default=0) >= 0


Ranges = Annotated[tuple[int, ...], Rule("start, end, start, end ... of visual tokens, rising from 0", _are_ranges)]
"""Ranges of visual tokens, ends exclusive."""


def range_tiles(
    ranges: Sequence[int], layout: TokenLayout, order: Tensor | None, block: int, *, inward: bool
) -> Tensor:
    """Return bool [N], on the CPU: the tiles that hold a token of the ranges or, ``inward``, no other token.

    ``order``: position in the tiles' order -> token index; None: the sequence's own order.
    """
    inside = torch.zeros(layout.tokens, dtype=torch.bool)
    for start, end in zip(ranges[::2], ranges[1::2], strict=True):
        inside[layout.text_before + start : layout.text_before + end] = True
    if order is not None:
        inside = inside[order.cpu()]
    inside = torch.nn.functional.pad(inside, (0, -len(inside) % block), value=inward).unflatten(0, (-1, block))
    return inside.all(1) if inward else inside.any(1)


def fixed_bits(settings: Any, context: CallContext, tiles: TileLists, order: Tensor | None) -> FixedBits:
    """Return the tiles of a call that lite's settings fix; raise `ConfigError` if some queries are left no key."""
    layout, block = context.layout, tiles.block_k
    pinned = first = None
    if settings.protect_text and layout.tokens > layout.visual_tokens:
        pinned = pinned_bits(layout, block, None, "none", str(context.device))
    keep = range_tiles(settings.must_keep, layout, order, block, inward=False)
    skip = range_tiles(settings.must_skip, layout, order, block, inward=True) & ~keep
    shape = tiles.query_tiles, tiles.key_tiles
    if keep.any():
        bits = pack_bits(keep.expand(shape)).to(context.device)
        pinned = bits if pinned is None else pinned | bits
    if skip.any():
        first = pack_bits(~skip.expand(shape)).to(context.device)
        left = first if pinned is None else first | pinned
        if settings.rest == "skip" and not bool(count_bits(exact_bits(tiles, 1) & left).all()):
            raise ConfigError(
                f"lite.must_skip = {settings.must_skip} leaves some queries no key at all ({layout}); shorten it"
            )
    return FixedBits(pinned, first)


def split_list(tiles: TileLists, scores: Tensor, bits: FixedBits) -> tuple[Tensor, Tensor]:
    """Return which tiles of the exact list may be dropped and which may not, bool like scores [B, H, NQ, NK]."""
    listed = unpack_bits(exact_bits(tiles, scores.shape[1]), tiles.key_tiles).expand_as(scores)
    free, fixed = listed, torch.zeros_like(listed)
    if bits.pinned is not None:
        fixed = listed & unpack_bits(bits.pinned, tiles.key_tiles)
        free = listed & ~fixed
    if bits.first is not None:
        free = free & unpack_bits(bits.first, tiles.key_tiles)
    return free, fixed
