"""What a model's layers have to compute: the FLOPs of a block, and the attention's tiles that methods leave."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..adapters.adapter import Family
from ..errors import ConfigError
from ..methods.saving import Saving, TileSaving
from ..plan.layout import TokenLayout
from ..plan.tiling import TILE

TILES_AT_ONCE = 1 << 22
"""Tiles whose shares are laid out at a time: those of a very long clip take more memory than a machine has."""

ASSUMED_BYTES = 2
"""Bytes of a weight, or of an element of K or V, on a GPU: bf16 or fp16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TilesLeft:
    """What methods leave of the visual tiles."""

    kept: int  # exact tiles, mean over the planned calls; expected where a method decides by the data
    total: int  # tiles in all
    dense_share: float  # share of the computed attention calls that stay dense, w
    pools: bool  # tiles that are not exact enter as one key each
    rows_alone: bool = False  # all that is left out are whole rows, which needs no sparse kernel

    @property
    def density(self) -> float:
        """Exact share of the tiles in a planned call."""
        return self.kept / self.total


def tiles_left(savings: Mapping[str, Saving], steps: int, layers: int, usual: int) -> TilesLeft | None:
    """Return what methods together leave of the tiles over a run; None where none thins attention out.

    ``usual``: tiles along each side where no method cuts any.
    """
    parts = {name: saving.tiles for name, saving in savings.items() if saving.tiles is not None}
    if not parts:
        return None
    sizes = {name: part.tiles for name, part in parts.items() if part.tiles is not None}
    if len(set(sizes.values())) > 1:
        counted = " and ".join(f"{name} {size} a side" for name, size in sizes.items())
        raise ConfigError(f"these methods count different tiles, {counted}; plan them one at a time")
    computed = computed_shares(savings, steps)
    calls: dict[tuple[bool, ...], float] = defaultdict(float)  # which methods act in a call -> how many such calls
    for step, share in enumerate(computed):  # few combinations stand for all calls
        for layer in range(layers):
            calls[tuple(part.active(step, layer) for part in parts.values())] += share
    size = next(iter(sizes.values()), usual)
    exact, planned = 0.0, 0.0
    for active, count in calls.items():
        if not any(active):
            continue
        acting = [part for part, acts in zip(parts.values(), active, strict=True) if acts]
        exact, planned = exact + count * _exact(acting, size), planned + count
    return TilesLeft(
        kept=round(exact / planned) if planned else size * size,
        total=size * size,
        dense_share=1 - planned / (sum(computed) * layers),
        pools=any(part.pools for part in parts.values()),
        rows_alone=not sizes,
    )


def _exact(parts: Sequence[TileSaving], size: int) -> float:
    """Return the exact tiles of a call, expected, that methods leave together of N x N."""
    rows, exact = math.ceil(TILES_AT_ONCE / size), 0.0
    for start in range(0, size, rows):
        share = np.ones((min(rows, size - start), size))
        for part in parts:
            share = part.keep(share, slice(start, start + rows))
        exact += float(share.sum())
    return exact


def computed_shares(savings: Mapping[str, Saving], steps: int) -> list[float]:
    """Return for each step the share of its forwards that are computed; 1 in all where none would be."""
    shares = [
        math.prod(1 - saving.rate for saving in savings.values() if step in saving.skipped) for step in range(steps)
    ]
    return shares if any(shares) else [1.0] * steps


def tiles_a_side(layout: TokenLayout) -> int:
    """Count the tiles of the usual size along each side of the visual attention."""
    return math.ceil(layout.visual_tokens / TILE)


def attention_flops(family: Family, tokens: int) -> int:
    """Return the FLOPs of Q K^T and P V of one self-attention call over S tokens: 4 S^2 H D."""
    return 4 * tokens**2 * family.heads * family.head_dim


def other_flops(family: Family, layout: TokenLayout) -> int:
    """Return the FLOPs of one block besides `attention_flops`: projections, cross-attention and feed-forward."""
    width = family.heads * family.head_dim
    return linear_flops(family, layout) + 4 * layout.tokens * family.cross_tokens * width


def linear_flops(family: Family, layout: TokenLayout) -> int:
    """Return the FLOPs of one block's linear layers: the projections of both attentions and the feed-forward."""
    width, tokens = family.heads * family.head_dim, layout.tokens
    cross = 4 * (tokens + family.cross_tokens) * width**2 if family.cross_tokens else 0
    return 8 * tokens * width**2 + 4 * tokens * width * family.ffn_dim + cross


def linear_inputs(family: Family, layout: TokenLayout) -> int:
    """Return the numbers that go into one block's linear layers, once for each layer."""
    width, tokens = family.heads * family.head_dim, layout.tokens
    cross = 2 * (tokens + family.cross_tokens) * width if family.cross_tokens else 0
    return 4 * tokens * width + tokens * (width + family.ffn_dim) + cross


def least_weights(family: Family, share: float = 0.0, size: float = 1.0) -> int:
    """Return the bytes of the matrices that every block has, a share of them of ``size`` bytes, the rest in 16 bits.

    Text streams and modulations come on top.
    """
    width = family.heads * family.head_dim
    attention = 4 * width**2 * (2 if family.cross_tokens else 1)
    elements = family.experts * family.layers * (attention + 2 * width * family.ffn_dim)
    return round(elements * (ASSUMED_BYTES * (1 - share) + size * share))
