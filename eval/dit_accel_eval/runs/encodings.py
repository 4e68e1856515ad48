"""How clips in files are encoded, and what that encoding alone does to other frames."""

import functools
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

ENCODERS = {"h264": ("libx264", 52), "hevc": ("libx265", 52), "vp9": ("libvpx-vp9", 64), "av1": ("libaom-av1", 64)}
"""Codec of a video -> ffmpeg's encoder, and how many levels of constant quality (CRF) it has, the best first."""

NOTED, NOTE = re.compile(rb" crf=(\d+)"), 1 << 20
"""How x264 and x265 note the quality in the first frame, and in how many bytes of a file that is looked for."""

QUALITIES = {"jpeg": 100, "webp": 100}
"""Lossy format of a picture -> Pillow's levels of quality, the worst first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What a clip's file holds, as far as can be told without decoding it.

    Attributes:
        encoding: codec and pixel format of a video, such as ``h264 yuv420p``, or a picture's format.
        exact: whether the file gives back the 8-bit frames that were written.
    """

    frames: int
    height: int
    width: int
    encoding: str
    exact: bool

    @property
    def size(self) -> str:
        """Number, height and width of the frames, in words."""
        return f"{self.frames} of {self.height} x {self.width}"


def form_of(clip: ClipFile) -> Form:
    """Return what a clip's file holds; `ConfigError` where it can't be read."""
    try:
        return _picture(clip) if clip.path.suffix.lower() in (*PICTURES, ".gif") else _video(clip)
    except Exception as error:  # each library has errors of its own
        raise ConfigError(
            f"{clip.path} can't be read ({str(error).splitlines()[0] if str(error) else error!r})"
        ) from None


def _picture(clip: ClipFile) -> Form:
    from PIL import Image

    with Image.open(clip.path) as image:
        count = kept_frames(clip.path) or getattr(image, "n_frames", 1)
        height = image.height // count if image.format == "PNG" else image.height
        kind = str(image.format).lower()
        return Form(frames=count, height=height, width=image.width, encoding=kind, exact=clip.is_exact())


def _video(clip: ClipFile) -> Form:
    from imageio_ffmpeg import count_frames_and_secs, read_frames

    about = cast("dict[str, Any]", next(iter(read_frames(clip.path))))
    width, height = about["size"]
    encoding = f"{str(about['codec']).strip(',')} {re.sub(r'[(,].*', '', str(about['pix_fmt']))}"
    frames = int(count_frames_and_secs(clip.path)[0])
    return Form(frames=frames, height=height, width=width, encoding=encoding, exact=clip.is_exact())


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
    """Return what encodes as a clip's file is; None: no encoder of that format is known here.

    The quality is the one that x264 and x265 note in their files, else the best at which these frames, its reference's,
    take no more bytes than the file; the bytes of a video's sound count as its pictures'.
    """
    levels = ENCODERS.get(form.encoding.partition(" ")[0], ("", QUALITIES.get(form.encoding, 0)))[1]
    if not levels:
        return None
    if noted := NOTED.search(clip.path.read_bytes()[:NOTE]):
        return Encoder(encoding=form.encoding, level=int(noted[1]))
    order = range(levels, 0, -1) if form.encoding in QUALITIES else range(levels)
    target = clip.path.stat().st_size
    place = bisect_left(order, -target, key=lambda level: -_coded(frames, form.encoding, level)[1])
    return Encoder(encoding=form.encoding, level=order[min(place, levels - 1)])


def _coded(frames: Frames, encoding: str, level: int) -> tuple[Frames, int]:
    """Return frames after encoding, and the bytes that they take."""
    if encoding in QUALITIES:
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(frames[0]).save(file, format=encoding, quality=level)
        return np.asarray(Image.open(file).convert("RGB"))[None], len(file.getvalue())
    codec, pixels = encoding.split(" ")
    with tempfile.TemporaryDirectory(prefix="dit-accel-encoding-") as folder:
        path = Path(folder) / ("a.webm" if codec == "vp9" else "a.mp4")
        height, width = frames.shape[1:3]
        command = [
            *(_ffmpeg(), "-nostdin", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"),
            *("-i", "-", "-c:v", ENCODERS[codec][0], "-crf", str(level), "-b:v", "0", "-pix_fmt", pixels, str(path)),
        ]
        subprocess.run(command, input=frames.tobytes(), capture_output=True, check=True)
        return ClipFile(name="a", path=path).levels(), path.stat().st_size


@functools.cache
def _ffmpeg() -> str:
    from imageio_ffmpeg import get_ffmpeg_exe

    return str(get_ffmpeg_exe())
