"""The token grid of packed sequences, read off their positions, for models whose inputs tell no frames and rows."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .errors import ConfigError

_READ: Any = WeakIdKeyDictionary()


def grid_at_end(positions: Tensor) -> tuple[int, int, int]:
    """Return (frames, height, width) of the video that ends a packed sequence; what stands before it is no part of it.

    The positions of one tensor are read back from their device once, however often it is passed.

    Args:
        positions: (t, h, w) of every token, [S, 3]. Tokens of one frame are raster-ordered and share t, t rises from
            frame to frame, all frames have the same h and w.

    Raises:
        ConfigError: if the last tokens are no grid.
    """
    if positions not in _READ:
        _READ[positions] = _grid_at_end(positions.detach().to("cpu", torch.float64))
    return _READ[positions]


def _grid_at_end(places: Tensor) -> tuple[int, int, int]:
    last = places[-1]
    size = _run_at_end((places[:, 0] == last[0]).tolist())
    width = _run_at_end((places[-size:, 1] == last[1]).tolist())
    frames = places[places.shape[0] % size :].unflatten(0, (-1, size))
    alike = (frames[..., 1:] == frames[-1, :, 1:]).all(-1).all(-1) & (frames[..., 0] == frames[:, :1, 0]).all(-1)
    rising = torch.cat([frames[:-1, 0, 0] < frames[1:, 0, 0], torch.tensor([True])])
    count = _run_at_end((alike & rising).tolist())
    rows = frames[-1, :, 1].unflatten(0, (-1, width)) if size % width == 0 else None
    if rows is None or not bool((rows == rows[:, :1]).all()):
        raise ConfigError(
            f"the last {size} of {len(places)} positions share their time and are no rows of {width} tokens; detach "
            "the methods, or report this layout to the adapter's author"
        )
    return count, size // width, width


def _run_at_end(flags: list[bool]) -> int:
    return next((count for count, flag in enumerate(reversed(flags)) if not flag), len(flags))
