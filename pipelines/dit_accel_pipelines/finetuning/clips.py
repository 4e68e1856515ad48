"""The clips to train on: a folder of videos with captions, or drawn ones; all checked before anything is encoded."""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dit_accel.adapters.embedded import assets
from dit_accel.errors import ConfigError

from ..generation.batch import json_lines
from ..generation.media import Frames
from ..generation.request import check_words
from .recipe import FineTuning

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
METADATA = "metadata.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """One clip to train on."""

    caption: str  # what it shows
    path: Path | None = None  # its file; None: it is drawn
    model: str = ""  # the embedded one whose world a drawn one is of
    size: tuple[int, int] = (0, 0)  # height and width of a drawn one, in pixels
    number: int = 0  # of a drawn one
    digest: str  # of the file's bytes, or of the drawn frames; hexadecimal
    frames: int  # that the file holds, or that are drawn

    def read(self, count: int) -> Frames:
        """Return its first ``count`` frames, uint8 [F, height, width, 3]."""
        if self.path is None:
            return _drawn(self.model, self.number, self.size, count)[1]
        return _decoded(self.path, count)


def find_clips(recipe: FineTuning) -> tuple[list[Clip], list[str]]:
    """Return the clips of a resolved recipe, in an order of their own, and notes on them."""
    if recipe.data is None:
        return _drawn_clips(recipe), []
    captions = list(_captions(recipe.data))
    if not captions:
        raise ConfigError(
            f"{recipe.data} holds no video ({', '.join(SUFFIXES)}); put videos there, each with its caption in a .txt "
            f"of the same name, or list them in {METADATA}"
        )
    if recipe.embedded:
        for _, caption in captions:
            check_words(caption, recipe.embedded)
    clips = [_checked(path, caption, recipe) for path, caption in captions]
    longer = sum(clip.frames > int(recipe.num_frames or 0) for clip in clips)
    message = f"{longer} of {len(clips)} clips are longer than {recipe.num_frames} frames; their first ones are taken"
    return clips, [message] if longer else []


def _captions(folder: Path) -> Iterator[tuple[Path, str]]:
    """Give each video of a folder with its caption."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; give one that holds videos and their captions")
    listed = folder / METADATA
    if listed.exists():
        yield from _listed(listed)
        return
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES:
            continue
        text = path.with_suffix(".txt")
        if not text.is_file():
            raise ConfigError(f"the video {path} has no caption; write it into {text.name} beside it")
        yield path, _caption(text.read_text(encoding="utf-8-sig"), str(text))


def _listed(file: Path) -> Iterator[tuple[Path, str]]:
    remedy = 'write, say, {"file_name": "a.mp4", "text": "..."}'
    for where, entry in json_lines(file.read_text(encoding="utf-8-sig"), str(file), remedy):
        name, text = entry.get("file_name"), entry.get("text", entry.get("caption"))
        if not isinstance(name, str) or not isinstance(text, str):
            raise ConfigError(f"{where} lacks a video or its caption; {remedy}")
        path = file.parent / name
        if not path.is_file():
            raise ConfigError(f"{where} names {name}, which is not there; put it beside the list, or strike the line")
        yield path, _caption(text, where)


def _caption(text: str, where: str) -> str:
    caption = " ".join(text.split())
    if not caption:
        raise ConfigError(f"{where} has an empty caption; say what the video shows")
    return caption


def _checked(path: Path, caption: str, recipe: FineTuning) -> Clip:
    """Return the clip of a video file, after a look at its size and length."""
    import imageio_ffmpeg

    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        reader = imageio_ffmpeg.read_frames(str(path))
        width, height = next(reader)["size"]
        reader.close()
        frames = imageio_ffmpeg.count_frames_and_secs(str(path))[0] or 0
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"video {path} can't be read ({reason}); replace it, or take it out") from None
    if (height, width) != (recipe.height, recipe.width):
        raise ConfigError(
            f"video {path} has {width} x {height} pixels, and clips of {recipe.width} x {recipe.height} are to be "
            "trained on; scale it, or train with --width and --height of all of them"
        )
    if frames < int(recipe.num_frames or 0):
        raise ConfigError(
            f"video {path} has {frames} frames, and {recipe.num_frames} are to be trained on; take it out, or train "
            "with fewer --num-frames"
        )
    return Clip(caption=caption, path=path, digest=digest, frames=frames)


def _decoded(path: Path, count: int) -> Frames:
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in itertools.islice(reader, count)]
    reader.close()
    if len(frames) < count:
        raise ConfigError(f"video {path} could be decoded for {len(frames)} of {count} frames; replace it")
    return np.stack(frames)


def _drawn_clips(recipe: FineTuning) -> list[Clip]:
    if recipe.embedded is None:
        raise ConfigError(f"clips can be drawn for embedded models alone, got model {recipe.model}; give --data FOLDER")
    assert recipe.height is not None
    assert recipe.width is not None
    frames, size = int(recipe.num_frames or 1), (recipe.height, recipe.width)
    clips = []
    for number in range(int(recipe.drawn or 0)):
        caption, pictures = _drawn(recipe.embedded, number, size, frames)
        digest = hashlib.sha256(pictures.tobytes()).hexdigest()
        clips.append(
            Clip(caption=caption, model=recipe.embedded, size=size, number=number, digest=digest, frames=frames)
        )
    return clips


def _drawn(model: str, number: int, size: tuple[int, int], frames: int) -> tuple[str, Frames]:
    try:
        return assets().drawn_clip(model, number, height=size[0], width=size[1], frames=frames)
    except ValueError as error:
        raise ConfigError(f"{model}: {error}") from error
