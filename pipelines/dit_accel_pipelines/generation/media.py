"""Reads and writes videos, with their sound, and images, and lays videos out as contact sheets."""

import contextlib
import functools
import re
import subprocess
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from dit_accel.errors import ConfigError
from dit_accel.files import check_writable, written_folder, written_whole

from .sound import Sound, write_wav

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER = ""
"""The suffix of an output that is a folder of frames."""

BYTES = {".mp4": 0.3, ".webm": 0.45, ".gif": 1.0, ".png": 2.0, FOLDER: 2.0}
"""Suffix -> bytes that a pixel of a photograph takes in such a file, about; a video's later frames take fewer."""

SUFFIXES = tuple(suffix for suffix in BYTES if suffix)
OUTPUTS = f"{', '.join(SUFFIXES)}, or a folder for frames, such as frames/"
OF_A_FOLDER = re.compile(r"\d{5,}\.png|sound\.wav")
"""Names of the files in a folder of frames: what a run may replace."""


CODECS = {
    ".mp4": ("libx264", 51, "-movflags +faststart -preset slow", "-movflags +faststart -preset veryfast -g 8"),
    ".webm": ("libvpx-vp9", 63, "-b:v 0 -cpu-used 2", "-b:v 0 -g 8"),
}
"""Suffix -> ffmpeg's encoder, the constant rate factor (CRF) of the least quality, and its words: for a small file, or
for a player that jumps to any frame, sooner and with more key frames."""

QUALITY = 7.25
"""The quality of a video unless another is requested: CRF 14 of H.264."""

SHEET_COLUMNS = 8
"""Frames that a contact sheet shows of each video."""

Frames = np.ndarray
"""uint8 [F, height, width, 3]."""


def check_output(path: Path) -> None:
    """Refuse an output that can't be written, before anything is computed."""
    suffix = path.suffix.lower()
    if suffix not in BYTES or path.name.startswith(".") or not path.name:
        raise ConfigError(f"output {path} ends in {path.suffix!r}; use one of {OUTPUTS}")
    if re.search(r"%0?\d*d", path.name):
        raise ConfigError(f"output {path} is a pattern; name a folder, such as frames/, which holds 00001.png and on")
    if suffix == FOLDER:
        _check_folder(path)
    else:
        check_writable(path)
    if suffix in CODECS:
        check_encoder(f"output {path} needs", "use .gif or .png", suffix)


def _check_folder(path: Path) -> None:
    """Refuse a folder of frames that would replace anything but frames."""
    if not path.exists():
        check_writable(path)
        return
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else [path.name]
    other = next((name for name in names if not OF_A_FOLDER.fullmatch(name)), None)
    if other is not None:
        raise ConfigError(f"output {path} would replace {other}, which is no frame; name a folder that is new")


def check_encoder(what: str, instead: str, suffix: str = ".mp4") -> None:
    """Refuse to begin what ends in a video that can't be encoded: two frames are, and kept nowhere."""
    try:
        _try_encoder(_ffmpeg(), suffix)
    except RuntimeError as error:
        raise ConfigError(
            f"{what} ffmpeg with {CODECS[suffix][0]} ({error}); pip install imageio-ffmpeg, correct "
            f"IMAGEIO_FFMPEG_EXE if that is set, or {instead}"
        ) from None


@functools.cache
def _try_encoder(ffmpeg: str, suffix: str) -> None:
    _encode(ffmpeg, np.zeros((2, 64, 64, 3), np.uint8), 8, suffix, ("-f", "null", "-"), QUALITY, None, quick=True)


def check_quality(path: Path, quality: float | None) -> None:
    """Raise `ConfigError` for a quality of what has none."""
    if quality is not None and path.suffix.lower() not in CODECS:
        raise ConfigError(
            f"quality {quality:g} is for {' and '.join(CODECS)}, got output {path}; leave it out, or name such a file"
        )


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


@contextlib.contextmanager
def whole_output(path: Path) -> Iterator[Path]:
    """Give a temporary file, or a folder for frames, that takes the place of an output if the block ends well."""
    with written_whole(path) if path.suffix else written_folder(path) as temporary:
        yield temporary


def write_media(
    path: Path, frames: Frames, *, fps: float, sound: Sound | None = None, quality: float | None = None,
    seeking: bool = False,
) -> None:  # fmt: skip
    """Write frames by the path's suffix, with what it can hold of their sound.

    .mp4 (H.264, AAC), .webm (VP9, Opus), .gif, .png (one frame, or a contact sheet of several), or without suffix a
    folder that is there, of 00001.png and on, and sound.wav.

    Args:
        quality: from 1 to 10, of a video: CRF 51 x (1 - quality / 10) of H.264, 63 x the same of VP9.
        seeking: whether a video is for a player that jumps to any frame: written sooner, with more key frames.
    """
    suffix = path.suffix.lower()
    if suffix in CODECS:
        check_even(path, *frames.shape[1:3])
        _encode(_ffmpeg(), frames, fps, suffix, (f"file:{path}",), quality or QUALITY, sound, quick=seeking)
    elif suffix == ".gif":
        first, *pictures = map(_to_image, frames)
        first.save(path, save_all=True, append_images=pictures, duration=max(20, round(1000 / fps)), loop=0)
    elif suffix == ".png":
        _to_image(frames[0] if len(frames) == 1 else np.asarray(contact_sheet([frames]))).save(path)
    elif suffix == FOLDER:
        for number, frame in enumerate(frames, 1):
            _to_image(frame).save(path / f"{number:05d}.png")
        if sound is not None:
            write_wav(path / "sound.wav", sound)
    else:
        raise ConfigError(f"output {path} ends in {path.suffix!r}; use one of {OUTPUTS}")


def upscale(frames: Frames, scale: int) -> Frames:
    """Repeat every pixel ``scale`` times in both directions."""
    return frames.repeat(scale, axis=1).repeat(scale, axis=2)


def to_uint8(video: np.ndarray) -> Frames:
    """Turn frames of floats in [0, 1], [F, height, width, 3], into bytes."""
    return (np.clip(video, 0.0, 1.0) * 255).round().astype(np.uint8)


def contact_sheet(
    videos: Sequence[Frames], labels: Sequence[str] = (), *, columns: int = SHEET_COLUMNS, heads: Sequence[str] = ()
) -> "Image":
    """Lay out videos one below the other, evenly spaced frames of each side by side, a label before each row.

    ``videos``: uint8 [F, height, width, 3] each, all of the same height and width. ``heads``: what stands above
    the columns.
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
    letters, gap = max(11, min(height // 8, 28)), 4
    font = ImageFont.load_default(size=letters)
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lines = [line for label in labels for line in label.splitlines()]
    margin = max((int(draw.textlength(line, font=font)) + 3 * gap for line in lines), default=gap)
    folded = [textwrap.fill(head, max(6, int(width / letters / 0.55))) for head in heads]
    above = gap + max((int(draw.multiline_textbbox((0, 0), head, font=font)[3]) + gap for head in folded), default=0)
    size = margin + count * (width + gap), above + len(rows) * (height + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, head in enumerate(folded):
        draw.multiline_text((margin + column * (width + gap), gap), head, fill="black", font=font)
    for number, row in enumerate(rows):
        top = above + number * (height + gap)
        if labels:
            draw.text((gap, top + height // 2), labels[number], fill="black", font=font, anchor="lm")
        for column, frame in enumerate(row):
            sheet.paste(_to_image(frame), (margin + column * (width + gap), top))
    return sheet


def _encode(
    ffmpeg: str,
    frames: Frames,
    fps: float,
    suffix: str,
    sink: Sequence[str],
    quality: float,
    sound: Sound | None,
    *,
    quick: bool,
) -> None:
    """Run ffmpeg on frames and their sound; ``sink``: where its output goes."""
    encoder, coarsest, *words = CODECS[suffix]
    rate_factor = max(1, round(coarsest * (1 - quality / 10)))  # 0 is lossless, which few players show
    height, width = frames.shape[1:3]
    command = [ffmpeg, "-y", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    command += ["-r", str(fps), "-i", "-"]
    with tempfile.TemporaryDirectory() as folder:
        if sound is not None:
            write_wav(Path(folder) / "sound.wav", sound)
            command += ["-i", f"{folder}/sound.wav"]
        command += ["-c:v", encoder, "-pix_fmt", "yuv420p", "-crf", str(rate_factor), "-threads", "1"]
        command += [*words[quick].split(), *sink]
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
