"""Values that tell where tokens lie, read off a model's inputs once and kept; for adapters' ``grid``.

Adapters are loaded for a help text too, so torch is not imported here before a model runs.
"""

from collections.abc import Callable, Mapping, MutableMapping
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import ConfigError
from .adapter import Grid

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

COMPILED = "its tokens' positions are tensor values, which can't be read in a transformer that is compiled whole"
"""Why there is no grid inside a compiled graph."""


def read_once(tensor: "Tensor", read: "Callable[[Tensor], T]") -> T | str:
    """Return ``read`` of a CPU copy of a tensor, or `COMPILED` inside a compiled graph.

    The copy waits for the device, so the result is kept as long as the tensor lives unchanged: once a generation where
    the pipeline makes it once.

    ``read``: a function of a module, not made for the call.
    """
    import torch

    if torch.compiler.is_compiling():
        return COMPILED
    known = _known()
    key = (read, 0 if tensor.is_inference() else tensor._version)
    if tensor not in known or known[tensor][0] != key:
        known[tensor] = (key, read(tensor.detach().cpu()))
    return known[tensor][1]


@cache
def _known() -> "MutableMapping[Tensor, tuple[Any, Any]]":
    from torch.utils.weak import WeakTensorKeyDictionary

    return WeakTensorKeyDictionary()


def first_image(ids: "Tensor") -> tuple[int, int]:
    """Return (height, width) of the image that position ids begin with; one row if it is not in raster order.

    ``ids``: [S, 3 or more], or [B, S, ...] with equal rows: (image or time, row, column, ...) of each token. An image
    ends where the first column changes.
    """
    ids = ids.reshape(-1, *ids.shape[-2:])[0]
    return _raster(ids[: _run(ids[:, 0]), 1:3])


def last_image(ids: "Tensor") -> tuple[int, int]:
    """Return (height, width) of the image that position ids end with; see `first_image`."""
    ids = ids.reshape(-1, *ids.shape[-2:])[0]
    return _raster(ids[-_run(ids[:, 0].flip(0)) :, 1:3])


def last_row(ids: "Tensor") -> int:
    """Return the width of the image that position ids [S, 3] end with, where text has no first column of its own."""
    return _run(ids[:, 1].flip(0))


def last_video(ids: "Tensor") -> tuple[int, int, int]:
    """Return (frames, height, width) of the video that position ids end with; what stands before it is no part of it.

    ``ids``: [S, 3], (time, row, column) of each token. The tokens of a frame share their time and are in raster order,
    time rises from frame to frame, and all frames have the same rows and columns.
    """
    size = _run(ids[:, 0].flip(0))
    height, width = _raster(ids[-size:, 1:])
    if height == 1 and size > 1 and bool((ids[-size:, 1] != ids[-1, 1]).any()):
        raise ConfigError(
            f"the last {size} of {len(ids)} tokens share their time but don't form rows and columns; detach the "
            "methods, or report this layout to the adapter's author"
        )
    frames = ids[len(ids) % size :].unflatten(0, (-1, size)).flip(0)  # the last one first
    alike = (frames[..., 1:] == frames[0, :, 1:]).all(-1).all(-1) & (frames[..., 0] == frames[:, :1, 0]).all(-1)
    alike[1:] &= frames[1:, 0, 0] < frames[:-1, 0, 0]
    return _run(alike), height, width


def ids_grid(config: Any, inputs: Mapping[str, Any]) -> Grid | str:
    """Read the grid off ``img_ids``: text, then the image, then reference images, which count as text behind it."""
    image = read_once(inputs["img_ids"], first_image)
    if isinstance(image, str):
        return image
    height, width = image
    after = inputs["hidden_states"].shape[1] - height * width
    return 1, height, width, inputs["encoder_hidden_states"].shape[1], after


def _run(values: "Tensor") -> int:
    return int(((values != values[0]).cumsum(0) == 0).sum())


def _raster(places: "Tensor") -> tuple[int, int]:
    width = _run(places[:, 0])
    height = len(places) // width
    if height * width == len(places):
        rows, columns = places.reshape(height, width, 2).unbind(-1)
        if bool((rows == rows[:, :1]).all() and (columns == columns[:1]).all()):
            return height, width
    return 1, len(places)
