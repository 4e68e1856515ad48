"""Writes videos, images and contact sheets, whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dit_accel.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".mp4", ".gif", ".png")
SHEET_COLUMNS = 8
"""Frames that a contact sheet shows of each video."""

Frames = np.ndarray
"""uint8 [F, height, width, 3]."""


def check_output(path: Path) -> None:
    """Refuse an output that can't be written, before anything is computed.

    Raises:
        ConfigError: for an unknown suffix, a folder that is missing or not writable, or a folder in the file's place.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"output {path} ends in {path.suffix!r}; use one of {', '.join(SUFFIXES)}")
    folder = path.parent
    if not folder.is_dir():
        raise ConfigError(f"output {path} can't be written: {folder} is no folder; create it first")
    if path.is_dir():
        raise ConfigError(f"output {path} can't be written: it is a folder; name a file in it")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"output {path} can't be written: {error.strerror}; choose another folder") from None


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place at the end, and is removed after an error."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_media(path: Path, frames: Frames, *, fps: float) -> None:
    """Write frames by the path's suffix: .mp4 (H.264), .gif, or .png (one frame, or a contact sheet of several)."""
    suffix = path.suffix.lower()
    if suffix == ".mp4":
        _write_mp4(path, frames, fps)
    elif suffix == ".gif":
        _write_gif(path, frames, fps)
    elif suffix == ".png":
        _to_image(frames[0] if len(frames) == 1 else np.asarray(contact_sheet([frames]))).save(path)
    else:
        raise ConfigError(f"output {path} ends in {path.suffix!r}; use one of {', '.join(SUFFIXES)}")


def upscale(frames: Frames, scale: int) -> Frames:
    """Repeat every pixel ``scale`` times in both directions."""
    return frames.repeat(scale, axis=1).repeat(scale, axis=2)


def to_uint8(video: np.ndarray) -> Frames:
    """Turn frames of floats in [0, 1], [F, height, width, 3], into bytes."""
    return (np.clip(video, 0.0, 1.0) * 255).round().astype(np.uint8)


def contact_sheet(videos: Sequence[Frames], labels: Sequence[str] = (), *, columns: int = SHEET_COLUMNS) -> "Image":
    """Lay videos under each other, evenly spaced frames of each side by side, a label before each row.

    Args:
        videos: uint8 [F, height, width, 3] each, all of one height and width.
        labels: one text a video, or none.
        columns: frames shown of each.

    Raises:
        ConfigError: for videos of different sizes, or a number of labels that fits not.
    """
    from PIL import Image, ImageDraw, ImageFont

    if len({video.shape[1:] for video in videos}) != 1:
        raise ConfigError(f"a contact sheet needs videos of one size, got {[video.shape for video in videos]}")
    if labels and len(labels) != len(videos):
        raise ConfigError(f"a contact sheet needs a label a video, got {len(labels)} for {len(videos)}")
    enlarged = max(1, 96 // videos[0].shape[1])  # thumbnails of tiny videos would be hard to see
    rows = [upscale(video[_evenly(len(video), columns)], enlarged) for video in videos]
    count, height, width = max(len(row) for row in rows), *rows[0].shape[1:3]
    font, gap = ImageFont.load_default(size=max(11, min(height // 8, 28))), 4
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = max((int(draw.textlength(label, font=font)) + 3 * gap for label in labels), default=gap)
    size = margin + count * (width + gap), gap + len(rows) * (height + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for place, row in enumerate(rows):
        top = gap + place * (height + gap)
        if labels:
            draw.text((gap, top + height // 2), labels[place], fill="black", font=font, anchor="lm")
        for column, frame in enumerate(row):
            sheet.paste(_to_image(frame), (margin + column * (width + gap), top))
    return sheet


def _write_mp4(path: Path, frames: Frames, fps: float) -> None:
    import imageio_ffmpeg

    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ConfigError(f"H.264 needs even sizes, got {width} x {height}; use --scale 2, .gif or .png")
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (width, height),
        fps=fps,  # type: ignore[arg-type] - annotated int, any number works
        codec="libx264",
        pix_fmt_out="yuv420p",
        macro_block_size=1,  # or a small video would be stretched to a multiple of 16
        quality=None,  # type: ignore[arg-type] - the -crf below sets it
        output_params=["-crf", "14", "-preset", "slow", "-movflags", "+faststart", "-threads", "1"],
        ffmpeg_log_level="error",
    )
    writer.send(None)
    try:
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
    finally:
        writer.close()


def _write_gif(path: Path, frames: Frames, fps: float) -> None:
    first, *rest = (_to_image(frame) for frame in frames)
    first.save(path, save_all=True, append_images=rest, duration=max(20, round(1000 / fps)), loop=0)


def _to_image(frame: np.ndarray) -> "Image":
    from PIL import Image

    return Image.fromarray(frame)


def _evenly(count: int, wanted: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
