"""Clips in files: which there are in a folder, which of another folder each is held against, and their frames."""

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dit_accel_pipelines.generation.media import Frames, read_image, read_video

from dit_accel import ConfigError
from dit_accel.errors import did_you_mean

from ..metrics.metric import Clip
from .results import strip_frames

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".gif")
EXACT = (".png", ".bmp")
LOSSLESS = ("ffv1", "rawvideo", "png", "huffyuv", "utvideo")  # codecs that give back the frames they were given


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
    from imageio_ffmpeg import read_frames

    message: Any = next(iter(read_frames(path)))  # the first thing that it gives is what the file says of itself
    return str(message["codec"]).strip(",") in LOSSLESS and str(message["pix_fmt"]).startswith(("rgb", "bgr", "gbr"))


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
