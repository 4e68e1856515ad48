"""Whether the disk has room for what a request makes, before it is made."""

import os
from collections.abc import Sequence
from pathlib import Path

from dit_accel.files import check_room

from .media import SHEET_COLUMNS, expected_size
from .request import Request, check_path

SIDE_CAR = 1 << 16
"""Bytes that a side-car takes at most, about."""


def check_outputs_fit(requests: Sequence[Request], times: int = 1) -> None:
    """Raise `ConfigError` if the disk has no room for the outputs of resolved requests of known sizes, ``times``."""
    sized = [request for request in requests if request.height is not None and request.width is not None]
    for folder in {Path(os.path.realpath(request.output)).parent for request in sized}:
        here = [_size(request) for request in sized if Path(os.path.realpath(request.output)).parent == folder]
        count = times * len(here)
        check_room(folder, times * sum(here), "the output takes" if count == 1 else f"{count} outputs take")


def _size(request: Request) -> int:
    """Return the bytes that an output and what lies beside it take at most, about."""
    sizes = {"height": request.height or 0, "width": request.width or 0}
    size = request.scale * expected_size(request.output, frames=request.num_frames or 1, **sizes) + SIDE_CAR
    if request.check:  # three rows of frames
        size += 3 * expected_size(check_path(request.output), frames=SHEET_COLUMNS, **sizes)
    return size
