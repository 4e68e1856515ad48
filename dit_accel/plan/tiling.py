"""Tiles over a token layout, as all methods of one attachment share them: size, token order, full lists, bits."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from dit_accel_kernels import EXACT, POOLED, SKIPPED, TileLists, pack_bits
from torch import Tensor

from ..rules.patches import patch_walk
from .layout import TokenLayout

Sink = Literal["text", "first_frame", "none"]
Order = Literal["raster", "tiles"]
"""How the visual tokens of a frame are cut into tiles: strips in raster order, or 2-D patches."""

TILE = 128
"""Tokens of a tile where no method says otherwise."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """The one way in which all methods of an attachment cut a sequence into tiles."""

    block_size: int = TILE  # tokens of a tile
    order: Order = "raster"  # how a frame's tokens are cut

    def token_order(self, layout: TokenLayout, device: torch.device | str = "cpu") -> Tensor | None:
        """Return `visual_first`, by patches with ``order="tiles"``."""
        patches = self.order == "tiles" and layout.tokens_per_frame > self.block_size
        return visual_first(layout, self.block_size if patches else None, device)

    def full(self, layout: TokenLayout, device: torch.device | str = "cpu") -> tuple[TileLists, Tensor | None]:
        """Return lists in which every tile is exact, and the order they count in: the same objects for one layout."""
        return full_tiles(layout.tokens, layout.tokens, self.block_size, str(device)), self.token_order(layout, device)

    def tiles(self, tokens: int) -> int:
        """Count the tiles of so many tokens."""
        return -(-tokens // self.block_size)


def visual_first(layout: TokenLayout, patches: int | None, device: torch.device | str = "cpu") -> Tensor | None:
    """Return int64 [S], position in the tiles' order -> token index; None where that is the sequence's own order.

    Visual tokens come first, then the text before them, then the text after.

    ``patches``: tokens of a 2-D patch by which the visual tokens of a frame are walked; None: raster order.
    """
    if patches is None and layout.text_before == 0:
        return None
    return _visual_first(layout, patches, str(torch.device(device)))


@lru_cache(maxsize=16)
def _visual_first(layout: TokenLayout, patches: int | None, device: str) -> Tensor:
    s = layout.tokens_per_frame
    visual = np.arange(layout.visual_tokens).reshape(layout.frames, s)
    if patches is not None:
        visual = visual[:, patch_walk(layout.height, layout.width, patches)]
    before = np.arange(layout.text_before)
    after = np.arange(layout.text_before + layout.visual_tokens, layout.tokens)
    order = np.concatenate([visual.ravel() + layout.text_before, before, after])
    # Made in inference mode it could not serve a training run later.
    with torch.inference_mode(False):
        return torch.from_numpy(order).to(device)


@lru_cache(maxsize=32)
def full_tiles(queries: int, keys: int, block: int, device: str) -> TileLists:
    """Return lists in which every tile is exact, on a device; the same object for the same arguments."""
    with torch.inference_mode(False):
        return TileLists.full(queries, keys, block_q=block, block_k=block).to(device)


def visual_lists(exact: np.ndarray, pooled: bool, layout: TokenLayout, block: int, device: str) -> TileLists:
    """Return lists of the exact tiles over the visual tokens; rows and columns of tiles that hold text are exact.

    ``exact``: bool [N, N], N tiles over the visual tokens alone.
    """
    count, text = -(-layout.tokens // block), tiles_without_text(layout, block)
    states = np.full((count, count), EXACT, np.uint8)
    states[:text, :text][~exact[:text, :text]] = POOLED if pooled else SKIPPED
    # Lists made in inference mode could not serve a training run later.
    with torch.inference_mode(False):
        lists = TileLists.from_states(
            torch.from_numpy(states), block_q=block, block_k=block, num_q=layout.tokens, num_k=layout.tokens
        )
        return lists.to(device)


def tiles_without_text(layout: TokenLayout, block: int) -> int:
    """Count the tiles along a side that hold visual tokens alone; those with text lie behind them."""
    return -(-layout.tokens // block) if layout.tokens == layout.visual_tokens else layout.visual_tokens // block


def visual_lists_bytes(dropped: int, pooled: bool, layout: TokenLayout, block: int) -> int:
    """Return the bytes of lists that `visual_lists` makes and in which so many tiles are not exact."""
    pools = 4 * (-(-layout.tokens // block) + 1 + dropped) if pooled and dropped else 0
    return full_lists_bytes(layout, block) - 4 * dropped + pools


def full_lists_bytes(layout: TokenLayout, block: int) -> int:
    """Return the bytes of the lists of all tiles, as `Tiling.full` gives them, in int32."""
    count = -(-layout.tokens // block)
    return 4 * (count + 1 + count * count)


def bitmap_bytes(tiles: int, heads: int, batch: int) -> int:
    """Return the bytes of one module's bitmap over N x N tiles: int32 [B, H, N, ceil(N / 32)]."""
    return 4 * batch * heads * tiles * -(-tiles // 32)


def pinned_bytes(layout: TokenLayout, block: int) -> int:
    """Return the bytes of what `pinned_bits` gives."""
    return bitmap_bytes(-(-layout.tokens // block), 1, 1)


@lru_cache(maxsize=32)
def exact_bits(tiles: TileLists, heads: int) -> Tensor:
    """Return the exact tiles of lists as bits, int32 [B or 1, H or 1, NQ, W]; the same object for the same lists."""
    with torch.inference_mode(False):
        bits = pack_bits(tiles.states() == EXACT)
    return bits.unflatten(0, (-1, min(tiles.groups, heads)))


@lru_cache(maxsize=32)
def pinned_bits(layout: TokenLayout, block: int, diagonal: int | None, sink: Sink, device: str) -> Tensor:
    r"""Return int32 [NQ, W]: the tiles that stay exact whatever the data say, in `visual_first`'s order.

    Rows and columns of tiles that hold text always do; text columns are what ``sink="text"`` names.

    Args:
        diagonal: tiles (i, j) with \|i - j\| up to it are pinned; None: none are.
        sink: what else every row keeps: the first frame, or nothing beyond text.
    """
    count = -(-layout.tokens // block)
    pinned, text = np.zeros((count, count), bool), tiles_without_text(layout, block)
    pinned[text:] = pinned[:, text:] = True
    if sink == "first_frame":
        pinned[:, : -(-layout.tokens_per_frame // block)] = True
    if diagonal is not None:
        tiles = np.arange(count)
        pinned |= abs(tiles[:, None] - tiles) <= diagonal
    with torch.inference_mode(False):
        return pack_bits(torch.from_numpy(pinned)).to(device)
