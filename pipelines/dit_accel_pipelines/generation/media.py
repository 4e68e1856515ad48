"""Reads and writes videos and images, and lays videos out as contact sheets."""

import functools
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from dit_accel.errors import ConfigError
from dit_accel.files import check_writable

if TYPE_CHECKING:
    from PIL.Image import Image

BYTES = {".mp4": 0.3, ".gif": 1.0, ".png": 2.0}
"""Suffix -> bytes that a pixel of a photograph takes in such a file, about; a video's later frames take fewer."""

SUFFIXES = tuple(BYTES)
SHEET_COLUMNS = 8
"""Frames that a contact sheet shows of each video."""

Frames = np.ndarray
"""uint8 [F, height, width, 3]."""


def check_output(path: Path) -> None:
    """Refuse an output that can't be written, before anything is computed."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"output {path} ends in {path.suffix!r}; use one of {', '.join(SUFFIXES)}")
    check_writable(path)
    if path.suffix.lower() == ".mp4":
        check_encoder(f"output {path} needs", "use .gif or .png")


def check_encoder(what: str, instead: str) -> None:
    """Refuse to begin what ends in a video that can't be encoded: two frames are, and kept nowhere."""
    try:
        _try_encoder(_ffmpeg())
    except RuntimeError as error:
        raise ConfigError(
            f"{what} ffmpeg with libx264 ({error}); pip install imageio-ffmpeg, correct IMAGEIO_FFMPEG_EXE if that is "
            f"set, or {instead}"
        ) from None


@functools.cache
def _try_encoder(ffmpeg: str) -> None:
    _encode(ffmpeg, np.zeros((2, 64, 64, 3), np.uint8), 8, ("ultrafast", "-f", "null", "-"))


def check_even(path: Path, height: int, width: int) -> None:
    """Raise `ConfigError` for odd sizes of an .mp4."""
    if path.suffix.lower() == ".mp4" and (height % 2 or width % 2):
        raise ConfigError(f"H.264 needs even sizes, got {width} x {height}; use --scale 2, .gif or .png")


def expected_size(path: Path, *, frames: int, height: int, width: int) -> int:
    """Return about how many bytes a file of pictures takes, by its suffix."""
    suffix = path.suffix.lower()
    return round(BYTES[suffix] * (min(frames, SHEET_COLUMNS) if suffix == ".png" else frames) * height * width)


def read_image(path: Path) -> "Image":
    """Read an image file, RGB, upright."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"image {path} can't be read ({_reason(error)}); give an image file, such as .png") from None


def read_video(path: Path) -> list["Image"]:
    """Read all frames of a video file, RGB."""
    from diffusers.utils import load_video

    try:
        with path.open("rb"):
            pass  # load_video has no clear error for a file that is missing
        frames = load_video(str(path))
    except Exception as error:  # every reader of imageio has errors of its own
        raise ConfigError(f"video {path} can't be read ({_reason(error)}); give a video file, such as .mp4") from None
    if not frames:
        raise ConfigError(f"video {path} has no frames; give a video file, such as .mp4")
    return [cast("Image", frame).convert("RGB") for frame in frames]


def write_media(path: Path, frames: Frames, *, fps: float, seeking: bool = False) -> None:
    """Write frames by the path's suffix: .mp4 (H.264), .gif, or .png (one frame, or a contact sheet of several).

    ``seeking``: whether an .mp4 is for a player that jumps to any frame: written sooner, with more key frames.
    """
    suffix = path.suffix.lower()
    if suffix == ".mp4":
        check_even(path, *frames.shape[1:3])
        preset = ("veryfast", "-g", "8") if seeking else ("slow",)
        _encode(_ffmpeg(), frames, fps, (*preset, "-movflags", "+faststart", f"file:{path}"))
    elif suffix == ".gif":
        first, *pictures = map(_to_image, frames)
        first.save(path, save_all=True, append_images=pictures, duration=max(20, round(1000 / fps)), loop=0)
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
    """Lay out videos one below the other, evenly spaced frames of each side by side, a label before each row.

    ``videos``: uint8 [F, height, width, 3] each, all of the same height and width.
    """
    from PIL import Image, ImageDraw, ImageFont

    if len({video.shape[1:] for video in videos}) != 1:
        raise ConfigError(f"a contact sheet needs videos of the same size, got {[video.shape for video in videos]}")
    if labels and len(labels) != len(videos):
        raise ConfigError(f"a contact sheet needs one label per video, got {len(labels)} for {len(videos)}")
    enlarged = max(1, 96 // videos[0].shape[1])  # thumbnails of tiny videos would be hard to see
    frames = [np.linspace(0, len(video) - 1, min(len(video), columns)).round().astype(int) for video in videos]
    rows = [upscale(video[np.unique(evenly)], enlarged) for video, evenly in zip(videos, frames, strict=True)]
    count, height, width = max(len(row) for row in rows), *rows[0].shape[1:3]
    font, gap = ImageFont.load_default(size=max(11, min(height // 8, 28))), 4
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = max((int(draw.textlength(label, font=font)) + 3 * gap for label in labels), default=gap)
    size = margin + count * (width + gap), gap + len(rows) * (height + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        top = gap + number * (height + gap)
        if labels:
            draw.text((gap, top + height // 2), labels[number], fill="black", font=font, anchor="lm")
        for column, frame in enumerate(row):
            sheet.paste(_to_image(frame), (margin + column * (width + gap), top))
    return sheet


def _encode(ffmpeg: str, frames: Frames, fps: float, sink: Sequence[str]) -> None:
    """Run ffmpeg on frames; ``sink``: a preset of libx264, and where its output goes."""
    height, width = frames.shape[1:3]
    command = [ffmpeg, "-y", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    command += ["-r", str(fps), "-i", "-", "-an", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "14"]
    command += ["-threads", "1", "-preset", *sink]
    pixels = np.ascontiguousarray(frames).reshape(-1).data
    try:
        done = subprocess.run(command, input=pixels, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    except OSError as error:
        raise RuntimeError(f"{ffmpeg}: {error.strerror}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise RuntimeError(f"ffmpeg ended with exit code {done.returncode} and wrote no video: {said or 'no reason'}")


def _ffmpeg() -> str:
    import imageio_ffmpeg

    return imageio_ffmpeg.get_ffmpeg_exe()


def _to_image(frame: np.ndarray) -> "Image":
    from PIL import Image

    return Image.fromarray(frame)


def _reason(error: Exception) -> str:
    """Return an error's first line, without the file's name that the system adds."""
    return getattr(error, "strerror", None) or str(error).strip().partition("\n")[0] or type(error).__name__
