"""The clips of a report in files beside its page: videos that every browser plays, or pictures, each with a poster."""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from dit_accel_assets import model_names
from dit_accel_pipelines.generation.media import Frames, upscale, write_media
from dit_accel_pipelines.generation.request import EMBEDDED_FPS, OTHER_FPS

from dit_accel import ConfigError
from dit_accel.files import no_room, no_space

from ..runs.results import Line, read_kept, reference_of, run_of
from ..suites.comparison import rival_kind
from .figures import Report, judged, worst_first

AMPLIFIED = 5
"""How many times larger differences are shown."""

MANIFEST = "report.json"
"""Names the files of the folder, so that nothing else is ever replaced, and what each was made from."""

LEAST, POSTER = 160, 240
"""Pixels of the smaller side below which a video is enlarged, and of a poster's width."""

Entry = dict[str, Any]


def folder_of(page: Path) -> Path:
    """Return the folder of a page's media: ``NAME.media`` beside ``NAME.html``."""
    return Path(os.path.realpath(page)).with_suffix(".media")


def check_folder(page: Path) -> None:
    """Refuse a page whose folder of media would take the place of something else, before anything is encoded.

    Raises:
        ConfigError: for a file of that name, or a folder that holds what no report wrote.
    """
    folder = folder_of(page)
    if page.suffix == folder.suffix or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"the page's clips need the folder {folder}, which is a file; choose another name, in .html")
    if folder.is_dir():
        ours = {MANIFEST} | {name for entry in _manifest(folder).values() for name in (entry["file"], entry["poster"])}
        others = sorted(one.name for one in folder.iterdir() if one.name not in ours)
        if others:
            raise ConfigError(
                f"the page's clips need the folder {folder}, which holds {others[0]!r} that no report wrote; move that "
                "away, or choose another name for the page"
            )


def _manifest(folder: Path) -> dict[str, Entry]:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


class Media:
    """A folder of media that is being filled.

    Args:
        new: the folder.
        old: the page's folder so far, from which files of the same frames are taken.
    """

    def __init__(self, new: Path, old: Path) -> None:
        self._new, self._old = new, old
        self._before = _manifest(old)
        self._entries: dict[str, Entry] = {}

    def add(self, label: str, key: Any, frames: Callable[[], Frames], *, fps: float) -> Entry:
        """Put frames into the folder, once; returns their file, poster, number, width and height.

        Args:
            label: begins the file's name.
            key: what they are made from, as plain values.
            frames: makes them, where they are in neither folder.
            fps: frames per second of a video.

        Raises:
            ConfigError: if they can't be encoded, or written.
        """
        name = f"{label}-{hashlib.sha256(json.dumps([fps, key]).encode()).hexdigest()[:12]}"
        if name not in self._entries:
            self._entries[name] = self._taken(name) or self._encoded(name, frames(), fps)
        return self._entries[name]

    def put(self) -> None:
        """Move the folder to its place, whole, if anything was added; the one before goes."""
        if not self._entries:
            return
        (self._new / MANIFEST).write_text(json.dumps(self._entries, indent=1), encoding="utf-8")
        before = self._new.with_name("before")
        if self._old.exists():
            self._old.replace(before)
        try:
            self._new.replace(self._old)
        except OSError:
            if before.exists():
                before.replace(self._old)
            raise

    def _taken(self, name: str) -> Entry | None:
        entry = self._before.get(name)
        try:
            for file in (entry["file"], entry["poster"]) if entry else ():
                os.link(self._old / file, self._new / file)
        except OSError:  # it is gone, or the file system has no such links
            return None
        return entry

    def _encoded(self, name: str, frames: Frames, fps: float) -> Entry:
        count, height, width = frames.shape[:3]
        file, poster = f"{name}.{'mp4' if count > 1 else 'png'}", f"{name}.webp"
        try:
            write_media(self._new / file, _enlarged(frames) if count > 1 else frames, fps=fps, seeking=True)
            _write_poster(self._new / poster, frames[count // 2])
        except (ConfigError, RuntimeError, OSError, ValueError) as error:
            if no_room(error):
                raise no_space(self._old, error) from None
            raise ConfigError(
                f"a clip of {count} frames of {width} x {height} can't be encoded ({error}); pip install "
                "imageio-ffmpeg, or leave the clips out with --clips 0"
            ) from None
        return {"file": file, "poster": poster, "frames": count, "width": width, "height": height}


def _enlarged(frames: Frames) -> Frames:
    """Return frames of even sizes, as H.264 needs, large enough that what it loses of colours does not show."""
    scale = max(1, -(-LEAST // min(frames.shape[1:3])))
    odd = any(size * scale % 2 for size in frames.shape[1:3])
    return upscale(frames, scale * (2 if odd else 1)) if scale > 1 or odd else frames


def _write_poster(path: Path, frame: np.ndarray) -> None:
    from PIL import Image

    image = Image.fromarray(frame)
    image.thumbnail((POSTER, POSTER))
    image.save(path, format="webp", quality=70)


@contextlib.contextmanager
def media_beside(page: Path) -> Iterator[Media]:
    """Give a folder to fill, which `put` moves to its place; it vanishes at the end of the block otherwise.

    Raises:
        ConfigError: as `check_folder`.
    """
    check_folder(page)
    folder = folder_of(page)
    room = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".dit-accel-"))
    try:
        (room / "media").mkdir()
        yield Media(room / "media", folder)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def fps_of(report: Report) -> int:
    """Return the frames per second of a report's clips."""
    return EMBEDDED_FPS if report.results.lines[0]["model"] in model_names() else OTHER_FPS


class _UnreadableError(ConfigError):
    """Frames that were kept are missing or those of another run."""


def kept_lines(report: Report, most: int) -> dict[int, list[tuple[Line, Line | None]]]:
    """Return clip -> its lines of arms whose frames were kept, each with the kept dense run that costs about as much.

    Args:
        most: clips at most, the hardest ones first.
    """
    kept = [line for line in report.results.lines if "kept" in line]
    arms, kind = {arm.name for arm in judged(report)}, rival_kind(report.results.lines)
    found: dict[int, list[tuple[Line, Line | None]]] = {}
    for clip in worst_first(report):
        own = [line for line in kept if line["clip"] == clip and line["arm"] in arms]
        dense = [line for line in kept if line["clip"] == clip and line["arm"] not in arms]
        dense = [line for line in dense if line["arm"].startswith(f"{kind} ")]
        if own and len(found) < most:
            found[clip] = [(line, _nearest(dense, line.get(report.main, line["work"]))) for line in own]
    return found


def _nearest(dense: Sequence[Line], steps: float) -> Line | None:
    return min(dense, key=lambda line: abs(line["num_inference_steps"] - steps), default=None)


def shown(report: Report, media: Media, most: int, advance: Callable[[], None]) -> tuple[Entry, list[str]]:
    """Encode the kept clips of a report.

    Args:
        most: as in `kept_lines`.
        advance: called after every arm of every clip.

    Returns:
        ``references``, clip -> its frames; ``rivals``, dense run -> clip -> its frames; ``runs``, arm -> clip -> its
        ``own`` frames, their amplified ``difference`` to the reference and the name of its ``rival``; frames as
        `Media.add` gives them. And why others are not shown.

    Raises:
        ConfigError: as `Media.add`.
    """
    references: dict[int, Entry] = {}
    rivals: dict[str, dict[int, Entry]] = {}
    runs: dict[str, dict[int, Entry]] = {}
    failed: list[str] = []
    folder, add = report.results.path.parent, functools.partial(media.add, fps=fps_of(report))
    for clip, pairs in kept_lines(report, most).items():
        for line, dense in pairs:
            try:
                own, reference = _Kept(folder / line["kept"], run_of(line)), _Kept.reference(folder, line)
                references[clip] = add(reference.label, reference.key, reference.frames)
                entry: Entry = {"own": add(own.label, own.key, own.frames)}
                entry["difference"] = add(
                    f"{own.label}-difference", [AMPLIFIED, own.key, reference.key],
                    lambda own=own, reference=reference: difference(own.frames(), reference.frames()),
                )  # fmt: skip
                if dense is not None:
                    rival = _Kept(folder / dense["kept"], run_of(dense))
                    rivals.setdefault(dense["arm"], {})[clip] = add(rival.label, rival.key, rival.frames)
                    entry["rival"] = dense["arm"]
                runs.setdefault(line["arm"], {})[clip] = entry
            except _UnreadableError as error:
                failed.append(f"Clip {clip} of {line['arm']} is not shown: {error}.")
            advance()
    _read.cache_clear()
    return {"references": references, "rivals": rivals, "runs": runs}, failed


class _Kept:
    """Kept frames that are read when they are needed.

    Attributes:
        label: names them.
        key: tells them from all others, as plain values.
    """

    def __init__(self, path: Path, made_by: Entry) -> None:
        self.label = f"{path.parent.name}-{path.stem}"
        self._path, self._made_by = path, json.dumps(made_by, sort_keys=True)
        try:
            found = path.stat()
        except OSError as error:
            raise _UnreadableError(f"{path} can't be read ({error.strerror})") from None
        self.key = [self._made_by, found.st_size, found.st_mtime_ns]

    @classmethod
    def reference(cls, folder: Path, line: Line) -> "_Kept":
        """Return the frames of the run that a line is held against."""
        return cls(folder / line["kept_reference"], reference_of(line))

    def frames(self) -> Frames:
        """Return the frames, uint8 [F, height, width, 3]."""
        return _read(self._path, self._made_by)


@functools.lru_cache(maxsize=2)  # an arm's and its reference's
def _read(path: Path, made_by: str) -> Frames:
    from PIL import Image

    most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # all frames of a long video are one large picture
    try:
        return read_kept(path, json.loads(made_by))
    except ConfigError as error:
        raise _UnreadableError(str(error)) from None
    finally:
        Image.MAX_IMAGE_PIXELS = most


def difference(clip: Frames, reference: Frames) -> Frames:
    """Return the amplified absolute difference of two clips, uint8."""
    if clip.shape != reference.shape:
        raise _UnreadableError(f"its frames are of shape {clip.shape}, its reference's of {reference.shape}")
    apart = np.maximum(clip, reference) - np.minimum(clip, reference)
    return np.minimum(apart, 255 // AMPLIFIED) * np.uint8(AMPLIFIED)
