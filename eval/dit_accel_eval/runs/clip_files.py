"""Clips in files: those of a folder, their frames, how they are encoded, and what that encoding does to others."""

import io
import json
import re
import subprocess
import tempfile
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from dit_accel_pipelines.generation.media import Frames, read_image, read_video

from dit_accel import ConfigError
from dit_accel.errors import did_you_mean

from ..metrics.metric import Clip
from .results import strip_frames

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".gif")
EXACT = (".png", ".bmp")
KEEPING = ("ffv1", "rawvideo", "png", "huffyuv", "utvideo")  # codecs that give back the frames they were given

LOSSLESS = "lossless"  # the encoding of every file that gives back the 8-bit frames that were written
ENCODERS = {"h264": ("libx264", 52), "hevc": ("libx265", 52), "vp9": ("libvpx-vp9", 64), "av1": ("libaom-av1", 64)}
"""Codec of a video -> ffmpeg's encoder, and how many levels of constant quality (CRF) it has, the best first."""

NOTED, NOTE = re.compile(rb" crf=(\d+)"), 1 << 20  # how x264 and x265 note it, and in how many first bytes of a file
QUALITIES = {"jpeg": 100, "webp": 100}  # lossy format of a picture -> Pillow's levels of quality, the worst first


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipFile:
    """A clip in a file."""

    name: str
    path: Path

    def levels(self) -> Frames:
        """Return the frames, uint8 [F, height, width, 3], also of a picture in which `eval run` kept several."""
        if self.path.suffix.lower() in PICTURES:
            pictures = np.asarray(read_image(self.path))
            count = kept_frames(self.path)
            return strip_frames(pictures, count) if count else pictures[None]
        frames = np.stack([np.asarray(frame) for frame in read_video(self.path)])
        _check_whole(self.path)
        return frames

    def frames(self) -> Clip:
        """Return the frames, [F, height, width, 3] in [0, 1]."""
        return np.divide(self.levels(), 255, dtype=np.float32)

    def is_exact(self) -> bool:
        """Whether the file holds frames as they were made, up to 8 bits."""
        suffix = self.path.suffix.lower()
        return suffix in EXACT or (suffix in (".mkv", ".avi", ".mov") and _is_lossless(self.path))


def _check_whole(path: Path) -> None:
    """Refuse a video of which some frames could not be read: the others would be measured as if they were all."""
    from imageio_ffmpeg import get_ffmpeg_exe

    command = [get_ffmpeg_exe(), "-nostdin", "-v", "error", "-i", str(path), "-f", "null", "-"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or done.stderr.strip():
        message = re.sub(r"^\[[^]]*\] ", "", (done.stderr.strip().splitlines() or ["no reason given"])[0])
        raise ConfigError(f"video {path} is damaged or was cut off ({message}); write it again")


def kept_frames(path: Path) -> int | None:
    """Return of how many frames a picture is made that `eval run` kept; None for another picture."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        text = getattr(image, "text", {}).get("dit-accel")
    return int(json.loads(text)["frames"]) if text else None


def _is_lossless(path: Path) -> bool:
    """Whether a video's codec gives back its frames, and they were not turned from RGB into another space before."""
    message = _about(path)
    return str(message["codec"]).strip(",") in KEEPING and str(message["pix_fmt"]).startswith(("rgb", "bgr", "gbr"))


def clips_in(path: Path) -> list[ClipFile]:
    """Return the clips of a file or folder, by name; folders within are looked into."""
    if path.is_file():
        if path.suffix.lower() not in (*PICTURES, *VIDEOS):
            raise ConfigError(f"{path} is no clip: its name must end in {', '.join((*VIDEOS, *PICTURES))}")
        return [ClipFile(name=path.stem, path=path)]
    if not path.is_dir():
        raise ConfigError(f"there is no file or folder {path}; name one that holds clips")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in (*PICTURES, *VIDEOS) and file.is_file())
    if not files:
        raise ConfigError(f"the folder {path} holds no clips: no file that ends in {', '.join((*VIDEOS, *PICTURES))}")
    clips = [ClipFile(name=file.relative_to(path).with_suffix("").as_posix(), path=file) for file in files]
    names = [clip.name for clip in clips]
    for clip in clips:
        if names.count(clip.name) > 1:
            raise ConfigError(f"{path} holds several clips called {clip.name}, which differ in the suffix; rename one")
    return clips


def paired(clips: list[ClipFile], path: Path, references: Path | None) -> Iterator[tuple[ClipFile, ClipFile | None]]:
    """Give each clip with the reference of its name; two files are a pair whatever they are called."""
    if references is None:
        yield from ((clip, None) for clip in clips)
        return
    known = {clip.name: clip for clip in clips_in(references)}
    if path.is_file() and references.is_file():
        yield clips[0], next(iter(known.values()))
        return
    for clip in clips:
        if clip.name not in known:
            raise ConfigError(f"{references} has no reference called {clip.name!r}; {did_you_mean(clip.name, known)}")
        yield clip, known[clip.name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What a clip's file holds, as far as is known without decoding it."""

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


def _about(path: Path) -> dict[str, Any]:
    """Return what a video says of itself, which is the first thing that its reader gives."""
    from imageio_ffmpeg import read_frames

    return cast("dict[str, Any]", next(iter(read_frames(path))))


def _video(clip: ClipFile) -> tuple[int, int, int, str]:
    from imageio_ffmpeg import count_frames_and_secs

    about = _about(clip.path)
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
