"""The clips of a report in files beside its page: videos that every browser plays, or pictures, each with a poster."""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from dit_accel_pipelines.generation.media import Frames, upscale, write_media
from dit_accel_pipelines.generation.request import EMBEDDED_FPS, OTHER_FPS

from dit_accel import ConfigError
from dit_accel.adapters.embedded import embedded_names
from dit_accel.files import no_room, no_space, written_whole

from ..runs.results import ResultLine, kept_shape, read_kept, reference_of, run_of
from .report import SuiteReport

AMPLIFIED = 5  # how many times larger differences are shown
OURS = re.compile(r".+-[0-9a-f]{12}\.(mp4|png|webp)|\.dit-accel-.*")  # what reports write, and pieces of it
LEAST, POSTER = 160, 240  # pixels of the smaller side below which a video is enlarged, and of a poster's width
Entry = dict[str, Any]


def folder_of(page: Path) -> Path:
    """Return the folder of a page's media: ``NAME.media`` beside ``NAME.html``."""
    return Path(os.path.realpath(page)).with_suffix(".media")


class Media:
    """The folder beside a page, into which clips are put once: what is there is taken, and never replaced."""

    def __init__(self, page: Path) -> None:
        self.folder = folder = folder_of(page)
        if page.suffix == folder.suffix or (folder.exists() and not folder.is_dir()):
            raise ConfigError(f"the page's clips need a folder {folder}, which is a file; name another .html")
        extra = sorted(path.name for path in folder.glob("*") if not OURS.fullmatch(path.name))
        if extra:
            why = f"which holds {extra[0]!r} that no report wrote; move that away, or choose another name"
            raise ConfigError(f"the page's clips need the folder {folder}, {why} for the page")
        self._used = set[str]()

    def add(self, label: str, key: Any, frames: Callable[[], Frames], *, fps: float, video: bool) -> str:
        """Put frames into the folder, with a poster, where they are not there yet; returns their file's name."""
        stem = f"{label}-{hashlib.sha256(json.dumps([fps, key]).encode()).hexdigest()[:12]}"
        file, poster = (self.folder / f"{stem}.{suffix}" for suffix in ("mp4" if video else "png", "webp"))
        if not (file.is_file() and poster.is_file()):
            self._encode(frames(), fps, file, poster)
        self._used |= {file.name, poster.name}
        return file.name

    def _encode(self, frames: Frames, fps: float, file: Path, poster: Path) -> None:
        from PIL import Image

        count, height, width = frames.shape[:3]
        small = Image.fromarray(frames[count // 2])
        small.thumbnail((POSTER, POSTER))
        try:
            self.folder.mkdir(exist_ok=True)
            with written_whole(file) as temporary:
                write_media(temporary, _enlarged(frames) if count > 1 else frames, fps=fps, seeking=True)
            with written_whole(poster) as temporary:
                small.save(temporary, format="webp", quality=70)
        except (ConfigError, RuntimeError, OSError, ValueError) as error:
            if no_room(error):
                raise no_space(self.folder, error) from None
            clip = f"a clip of {count} frames of {width} x {height}"
            remedy = "pip install imageio-ffmpeg, or leave the clips out with --clips 0"
            raise ConfigError(f"{clip} can't be encoded ({error}); {remedy}") from None

    def tidy(self) -> None:
        """Delete what pages before showed and this one does not."""
        for path in self.folder.glob("*"):
            if OURS.fullmatch(path.name) and path.name not in self._used:
                path.unlink(missing_ok=True)


def _enlarged(frames: Frames) -> Frames:
    """Return frames of even sizes, as H.264 needs, large enough that what it loses of colours does not show."""
    scale = max(1, -(-LEAST // min(frames.shape[1:3])))
    odd = any(size * scale % 2 for size in frames.shape[1:3])
    return upscale(frames, scale * (2 if odd else 1)) if scale > 1 or odd else frames


def fps_of(report: SuiteReport) -> int:
    """Return the frames per second of a report's clips."""
    return EMBEDDED_FPS if report.results.lines[0].model in embedded_names() else OTHER_FPS


def kept_lines(report: SuiteReport, most: int) -> dict[int, list[tuple[ResultLine, ResultLine | None]]]:
    """Return clip -> its lines of arms whose frames were kept, each with the kept dense run of about its cost."""
    lines = [line for line in report.results.lines if line.kept]
    arms, place = {arm.name for arm in report.judged}, report.comparison.place
    pairs: dict[int, list[tuple[ResultLine, ResultLine | None]]] = {}
    for clip in report.worst_first():
        ours = [line for line in lines if line.clip == clip and line.arm in arms]
        dense = [line for line in lines if line.clip == clip and line.arm not in arms and place(line) is not None]
        if ours and len(pairs) < most:
            steps = [line.value(report.main) or line.work for line in ours]
            near = [min(dense, key=lambda line: abs((place(line) or 0) - at), default=None) for at in steps]
            pairs[clip] = list(zip(ours, near, strict=True))
    return pairs


class _Kept(NamedTuple):
    """Kept frames that are read when they are needed."""

    label: str
    key: list[Any]
    shape: tuple[int, int, int]
    frames: Callable[[], Frames]


@functools.lru_cache(maxsize=2)  # an arm's and its reference's
def _read(path: Path, made_by: str) -> Frames:
    return read_kept(path, json.loads(made_by))


def _kept(path: Path, made_by: Entry) -> _Kept:
    shape, text = kept_shape(path, made_by), json.dumps(made_by, sort_keys=True)
    key = [text, path.stat().st_size, path.stat().st_mtime_ns]
    return _Kept(f"{path.parent.name}-{path.stem}", key, shape, functools.partial(_read, path, text))


def shown(report: SuiteReport, media: Media, most: int, advance: Callable[[], None]) -> tuple[Entry, list[str]]:
    """Encode the kept clips of a report; return what the page's script takes of them, and why others are not shown.

    ``references`` has clip -> its file and sizes, ``rivals`` dense run -> clip -> its file, ``runs`` arm -> clip -> its
    ``own`` file, that of its amplified ``difference`` to the reference, and the name of its ``rival``.
    """
    references, rivals, runs = dict[int, Entry](), dict[str, dict[int, str]](), dict[str, dict[int, Entry]]()
    failed: list[str] = []
    folder, fps = report.results.path.parent, fps_of(report)

    def add(run: _Kept) -> str:
        return media.add(run.label, run.key, run.frames, fps=fps, video=run.shape[0] > 1)

    for clip, pairs in kept_lines(report, most).items():
        for line, dense in pairs:
            try:
                ours = _kept(folder / str(line.kept), run_of(line.raw))
                reference = _kept(folder / str(line.kept_reference), reference_of(line.raw))
                rival = _kept(folder / str(dense.kept), run_of(dense.raw)) if dense else None
                if ours.shape != reference.shape:
                    raise ConfigError(f"its frames are of shape {ours.shape}, its reference's of {reference.shape}")
            except ConfigError as error:
                failed.append(f"Clip {clip} of {line.arm} is not shown: {error}.")
            else:
                count, height, width = reference.shape
                references[clip] = {"file": add(reference), "frames": count, "width": width, "height": height}
                entry = runs.setdefault(line.arm, {})[clip] = {"own": add(ours)}
                entry["difference"] = media.add(
                    f"{ours.label}-difference", [AMPLIFIED, ours.key, reference.key],
                    lambda ours=ours, reference=reference: difference(ours.frames(), reference.frames()),
                    fps=fps, video=count > 1,
                )  # fmt: skip
                if dense and rival:
                    rivals.setdefault(dense.arm, {})[clip] = add(rival)
                    entry["rival"] = dense.arm
            advance()
    _read.cache_clear()
    return {"references": references, "rivals": rivals, "runs": runs}, failed


def difference(clip: Frames, reference: Frames) -> Frames:
    """Return the amplified absolute difference of two clips, uint8."""
    gap = np.maximum(clip, reference) - np.minimum(clip, reference)
    return np.minimum(gap, 255 // AMPLIFIED) * np.uint8(AMPLIFIED)
