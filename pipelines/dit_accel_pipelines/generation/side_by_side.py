"""One prompt and seed dense and with methods, as files to look at beside each other: what the page of `ui` shows."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel.attachment.check import Check, require_tools
from dit_accel.errors import ConfigError
from dit_accel.methods.presets import NONE
from dit_accel.methods.toml import from_toml

from .generate import attached, check_of, run
from .larger import prepare_larger
from .loading import load_pipeline
from .media import to_uint8, upscale, write_media
from .progress import Stages
from .request import Request, resolve
from .sound import Sound
from .threads import one_thread

TIMES = 5
"""By how much a difference is enlarged."""

SHOWN = 256
"""Pixels of a side below which pixels are repeated to be seen."""

REPORT_LINES = 12
SHOWN_BYTES = 3 << 22
"""Bytes that the files of one comparison take, about."""


class Stopped(Exception):  # noqa: N818 - reads as what it is
    """Whoever asked for the run no longer wants it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SideBySide:
    """What two runs of one seed gave."""

    dense: Path  # file of the model as it is, .mp4, or .png of a picture
    accelerated: Path  # file of the run with methods
    difference: Path  # file of `TIMES` times their difference
    check: Check  # seconds of both, and how near they are
    report: str  # first lines of what ran
    notes: tuple[str, ...] = ()  # what was changed in the request, and what to look out for


class Watched(Stages):
    """Progress that is told to a function, collects notes, and ends the run where it is no longer wanted.

    Args:
        tell: called with what is done now, how many parts of it are, and of how many (None: not known).
        stop: set where the run is to end, before its next step.
    """

    def __init__(self, tell: Callable[[str, int, int | None], None], stop: threading.Event) -> None:
        super().__init__(silent=True)
        self.notes: list[str] = []
        self.run = ""
        self._tell, self._stop = tell, stop
        self._now: tuple[str, int, int | None] = ("", 0, None)

    def stage(self, description: str, total: int | None = None, done: int = 0) -> None:
        """Begin a stage of ``total`` parts; raise `Stopped` where the run is to end."""
        self._say((f"{self.run}{description}", done, total))

    def advance(self) -> None:
        """Count one part of the stage; raise `Stopped` where the run is to end."""
        what, done, total = self._now
        self._say((what, done + 1, total))

    def note(self, text: str) -> None:
        """Keep a note."""
        self.notes.append(text)

    warn = note

    def _say(self, now: tuple[str, int, int | None]) -> None:
        if self._stop.is_set():
            raise Stopped
        self._now = now
        self._tell(*now)


class Comparing:
    """Compares prompt after prompt, one at a time, and keeps the model that it loaded last.

    ``options``: what every request has besides, such as ``device``, ``dtype`` and ``offload``.
    """

    def __init__(self, **options: Any) -> None:
        self._options, self._lock = options, threading.Lock()
        self._loaded: tuple[str, Any] | None = None

    def __call__(self, prompt: str, folder: Path, *, config: str, stages: Watched, **options: Any) -> SideBySide:
        """Generate a prompt dense and with methods: those of a config in TOML, and further options of a request."""
        if not prompt.strip():
            raise ConfigError("a prompt is needed, got none; say what to show, such as a red circle moving right")
        methods = tuple(from_toml(config, "the text of methods"))
        for method in methods:
            for option, value in method.outside().items():  # whoever reaches the page would read and fetch with it
                raise ConfigError(
                    f"{method.name}.{option} = {value!r} names a file or a model, and the page opens none; use it with "
                    "dit-accel generate --config"
                )
        if not methods and options["preset"] == NONE:
            raise ConfigError("there is nothing to compare: the preset is none, and no method is named; choose one")
        request = Request(
            prompt=prompt, output=folder / "accelerated.png", methods=methods, check=True,
            **{**self._options, **options},
        )  # fmt: skip
        require_tools()
        with self._lock, one_thread(embedded=request.embedded is not None):
            return self._compared(request, stages)

    def _compared(self, request: Request, stages: Watched) -> SideBySide:
        resolved = resolve(request)
        request, stages.notes = resolved.request, [*resolved.notes, *resolved.warnings]
        pipe = self._pipe(request, stages)
        for text in prepare_larger(pipe, request, resolved.family):
            stages.note(text)
        choices = {"preset": request.preset, "quiet": True}
        with attached(pipe, request.methods, request.backend, **choices) as attachment:
            if not attachment.report().methods:
                raise ConfigError(f"the preset {request.preset!r} has no method for this model; name one as TOML")
            stages.run = "dense: "
            with attachment.suspended():
                dense = run(pipe, request, pictures={}, stages=stages)
            stages.run = "with methods: "
            accelerated = run(pipe, request, pictures={}, stages=stages, attachment=attachment)
        check = check_of(dense, accelerated)
        difference = np.clip(TIMES * np.abs(check.accelerated - check.dense), 0, 1)
        files = {
            "dense": _written(request, "dense", check.dense, dense.sound),
            "accelerated": _written(request, "accelerated", check.accelerated, accelerated.sound),
            "difference": _written(request, "difference", difference, None),
        }
        report = "\n".join(str(accelerated.report).splitlines()[:REPORT_LINES])
        return SideBySide(**files, check=check, report=report, notes=tuple(stages.notes))

    def _pipe(self, request: Request, stages: Watched) -> Any:
        """Return the request's pipeline, of which one is kept; a new one runs two steps, lest the first be slower."""
        if self._loaded is None or self._loaded[0] != request.source:
            self._loaded = None  # frees its memory first
            stages.run = ""
            stages.stage("loading the model")
            pipe = load_pipeline(request)
            stages.run = "trying: "
            run(pipe, replace(request, num_inference_steps=2), pictures={}, stages=stages)
            self._loaded = request.source, pipe
        return self._loaded[1]


def _written(request: Request, name: str, clip: np.ndarray, sound: Sound | None) -> Path:
    """Write frames, floats [F, height, width, 3] in [0, 1], as a video, or a picture, that is large enough to see."""
    frames = upscale(to_uint8(clip), max(1, -(-SHOWN // min(clip.shape[1:3]))))
    path = request.output.with_name(f"{name}{'.mp4' if len(frames) > 1 else '.png'}")
    write_media(path, frames, fps=request.output_fps, sound=sound, seeking=True)
    return path
