"""How clips in files are encoded, and what that encoding alone does to other frames."""

import io
import re
import subprocess
import tempfile
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from dit_accel_pipelines.generation.media import Frames

from dit_accel import ConfigError

from .clip_files import PICTURES, ClipFile, kept_frames

LOSSLESS = "lossless"  # the encoding of every file that gives back the 8-bit frames that were written
ENCODERS = {"h264": ("libx264", 52), "hevc": ("libx265", 52), "vp9": ("libvpx-vp9", 64), "av1": ("libaom-av1", 64)}
"""Codec of a video -> ffmpeg's encoder, and how many levels of constant quality (CRF) it has, the best first."""

NOTED, NOTE = re.compile(rb" crf=(\d+)"), 1 << 20  # how x264 and x265 note it, and in how many first bytes of a file
QUALITIES = {"jpeg": 100, "webp": 100}  # lossy format of a picture -> Pillow's levels of quality, the worst first


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What a clip's file holds, as far as can be told without decoding it."""

    size: str  # number, height and width of the frames, in words
    encoding: str  # a video's codec and pixel format, such as h264 yuv420p; a picture's format; or `LOSSLESS`


def form_of(clip: ClipFile) -> Form:
    """Return what a clip's file holds; `ConfigError` where it can't be read."""
    try:
        count, height, width, encoding = (_picture if clip.path.suffix.lower() in (*PICTURES, ".gif") else _video)(clip)
        exact = clip.is_exact()
    except Exception as error:  # each library has errors of its own
        reason = next(iter(str(error).splitlines()), repr(error))
        raise ConfigError(f"{clip.path} can't be read ({reason})") from None
    return Form(size=f"{count} of {height} x {width}", encoding=LOSSLESS if exact else encoding)


def _picture(clip: ClipFile) -> tuple[int, int, int, str]:
    from PIL import Image

    kept = kept_frames(clip.path)
    with Image.open(clip.path) as image:
        count = kept or getattr(image, "n_frames", 1)
        return count, image.height // (kept or 1), image.width, str(image.format).lower()


def _video(clip: ClipFile) -> tuple[int, int, int, str]:
    from imageio_ffmpeg import count_frames_and_secs, read_frames

    about = cast("dict[str, Any]", next(iter(read_frames(clip.path))))
    width, height = about["size"]
    encoding = f"{str(about['codec']).strip(',')} {re.sub(r'[(,].*', '', str(about['pix_fmt']))}"
    return int(cast("Any", count_frames_and_secs(clip.path))[0]), height, width, encoding


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """Encodes frames, uint8 [F, height, width, 3], as other files are."""

    encoding: str
    level: int

    def __call__(self, frames: Frames) -> Frames:
        """Return frames as they are after encoding."""
        return _coded(frames, self.encoding, self.level)[0]

    def __str__(self) -> str:
        return f"{self.encoding}, {'CRF' if ' ' in self.encoding else 'quality'} {self.level}"


def encoder_like(clip: ClipFile, form: Form, frames: Frames) -> Encoder | None:
    """Return what encodes as a clip's file is; None: it is lossless, or no encoder of that format is here.

    The quality is the one that x264 and x265 note in their files, else the best at which these frames, its reference's,
    take no more bytes than the file; the bytes of a video's sound count as its pictures'.
    """
    if form.encoding == LOSSLESS:
        return None
    levels = ENCODERS.get(form.encoding.partition(" ")[0], ("", QUALITIES.get(form.encoding, 0)))[1]
    order = range(levels, 0, -1) if form.encoding in QUALITIES else range(levels)
    try:
        if noted := NOTED.search(clip.path.read_bytes()[:NOTE]):
            level = int(noted[1])
            _coded(frames, form.encoding, level)
        else:
            size = clip.path.stat().st_size
            level = order[bisect_left(order[:-1], -size, key=lambda level: -_coded(frames, form.encoding, level)[1])]
    except (subprocess.CalledProcessError, IndexError, KeyError):
        return None
    return Encoder(encoding=form.encoding, level=level)


def _coded(frames: Frames, encoding: str, level: int) -> tuple[Frames, int]:
    """Return frames after encoding, and the bytes that they take."""
    if encoding in QUALITIES:
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(frames[0]).save(file, format=encoding, quality=level)
        return np.asarray(Image.open(file).convert("RGB"))[None], len(file.getvalue())
    from imageio_ffmpeg import get_ffmpeg_exe

    codec, _, pixels = encoding.partition(" ")
    with tempfile.TemporaryDirectory(prefix="dit-accel-encoding-") as folder:
        path = Path(folder) / ("a.webm" if codec == "vp9" else "a.mp4")
        size = f"{frames.shape[2]}x{frames.shape[1]}"
        read = ("-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-i", "-")
        write = ("-c:v", ENCODERS[codec][0], "-crf", str(level), "-b:v", "0", "-pix_fmt", pixels, str(path))
        subprocess.run([get_ffmpeg_exe(), *read, *write], input=frames.tobytes(), capture_output=True, check=True)
        return ClipFile(name="a", path=path).levels(), path.stat().st_size
