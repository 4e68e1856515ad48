"""The contact sheet of a grid: the middle frame of each output, by rows and columns that say what differs."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dit_accel.files import written_whole

from .batch import Planned
from .media import Frames, contact_sheet, read_image, read_video

SIDE = 256
"""Pixels of the longer side of a frame on the sheet."""

MOST = 400
"""Frames of a sheet; of more outputs there is none."""


def sheet_path(output: Path) -> Path:
    """Return the path of the contact sheet of outputs that are numbered after this one."""
    return output.with_name(f"{output.stem}.grid.png")


def write_sheet(outputs: Sequence[Planned], output: Path) -> Path | None:
    """Write the contact sheet of a grid and return its path; None while an output is not made, or of too many.

    Of several processes the last to make its outputs writes it.
    """
    if not 1 < len(outputs) <= MOST or not all(planned.request.output.exists() for planned in outputs):
        return None
    rows, columns = (list(dict.fromkeys(labels)) for labels in zip(*((o.row, o.column) for o in outputs), strict=True))
    frames = np.full((len(rows), len(columns), SIDE, SIDE, 3), 255, np.uint8)
    for planned in outputs:
        frame = _middle_frame(planned.request.output)
        frames[rows.index(planned.row), columns.index(planned.column), : len(frame), : frame.shape[1]] = frame
    height, width = (int(np.flatnonzero((frames != 255).any(axis)).max()) + 1 for axis in ((0, 1, 3, 4), (0, 1, 2, 4)))
    labels = ["\n".join(textwrap.wrap(row, 24)) for row in rows] if any(rows) else []
    with written_whole(sheet_path(output)) as temporary:
        sheet = contact_sheet(frames[:, :, :height, :width], labels, columns=len(columns), heads=columns)  # type: ignore[arg-type]
        sheet.save(temporary, format="PNG")
    return sheet_path(output)


def _middle_frame(path: Path) -> Frames:
    """Return the middle frame of an output, enlarged or reduced to the side of a sheet's frame."""
    from PIL import Image

    if path.is_dir():
        files = sorted(path.glob("*.png"))
        image = read_image(files[len(files) // 2])
    elif path.suffix.lower() == ".png":
        image = read_image(path)
    else:
        images = read_video(path)
        image = images[len(images) // 2]
    scale = SIDE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return np.asarray(image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS))
