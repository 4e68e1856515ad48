"""Spatial patch order: a walk over a frame whose consecutive tokens form compact patches instead of raster strips.

The frame is cut into strips of nearly equal height, walked column by column, up and down in turn, and strip by strip,
left to right and back. Any run of B tokens is then about B / h columns of a strip of height h, wherever the run starts,
so one order serves all frames even where the tiles don't align with them, and ragged edges need no special case.
"""

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@lru_cache(maxsize=16)
def patch_walk(height: int, width: int, block_size: int) -> Ints:
    """Return the walk, int64 [Y * X]: raster index of the token at each place; read-only.

    Strips run along the longer side; their number is the one whose tiles are the most compact: the least mean squared
    distance of a tile's tokens from their centre, over the tile starts that occur. A frame of at most one tile keeps
    its raster order.
    """
    if height * width <= block_size:
        best = np.arange(height * width)
    else:
        rows, columns = min(height, width), max(height, width)
        choices = range(1, math.ceil(2 * rows / math.sqrt(block_size)) + 1)  # twice as many as square tiles make
        best = min((_walk(rows, columns, strips) for strips in choices), key=lambda w: _spread(w, columns, block_size))
        if height > width:
            y, x = np.divmod(best, columns)
            best = x * width + y
    best.flags.writeable = False
    return best


def _walk(rows: int, columns: int, strips: int) -> Ints:
    grid = np.arange(rows * columns).reshape(rows, columns)
    parts = []
    for number, strip in enumerate(np.array_split(grid, strips)):
        lines = strip.T.copy()
        lines[1::2] = lines[1::2, ::-1]
        parts.append((lines if number % 2 == 0 else lines[::-1]).ravel())
    return np.concatenate(parts)


def _spread(walk: Ints, columns: int, block_size: int) -> float:
    """Return the mean squared distance of a tile's tokens from their centre, in tokens squared."""
    starts = np.arange(0, len(walk) - block_size + 1, math.gcd(len(walk), block_size))
    total = 0.0
    for axis in np.divmod(walk, columns):
        sums = np.concatenate([[0], np.cumsum(axis)])
        squares = np.concatenate([[0], np.cumsum(axis**2)])
        mean = (sums[starts + block_size] - sums[starts]) / block_size
        total += float(((squares[starts + block_size] - squares[starts]) / block_size - mean**2).mean())
    return total
