"""Whether the disk has room for what a request makes, before it is made."""

import os
from pathlib import Path

from dit_accel.files import check_room

from .media import SHEET_COLUMNS, expected_size
from .request import Request, check_path

SIDE_CAR = 1 << 16
"""Bytes that a side-car takes at most, about."""


def check_outputs_fit(request: Request, count: int) -> None:
    """Raise `ConfigError` if the disk has no room for ``count`` more outputs of a resolved request of known sizes."""
    if request.height is None or request.width is None:
        return
    sizes = {"height": request.height, "width": request.width}
    each = request.scale * expected_size(request.output, frames=request.num_frames or 1, **sizes) + SIDE_CAR
    if request.check:  # three rows of frames
        each += 3 * expected_size(check_path(request.output), frames=SHEET_COLUMNS, **sizes)
    what = "the output takes" if count == 1 else f"{count} outputs take"
    check_room(Path(os.path.realpath(request.output)).parent, count * each, what)
