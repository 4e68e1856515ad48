"""What the methods change on the user's own model: one seed generated dense and with them, side by side.

Short runs are made twice, in turn, and the faster one of each counts: other work on the machine only ever slows a run.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import AttachError, ConfigError, MissingBackend
from ..report import clock
from ..report.report import Report, drawing
from ..report.sections import Section

SHORT = 60.0
"""Seconds that a dense run and one with the methods take together, below which each is made a second time."""

Frames = npt.NDArray[np.float32]
"""[F, height, width, 3] in [0, 1]; a picture is one frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Runs of one seed, dense and with the methods."""

    dense: Frames  # frames of the model as it is, [F, height, width, 3] in [0, 1]
    accelerated: Frames  # frames with the methods
    dense_seconds: float  # what the whole call took dense, text encoder and decoder included; of several runs the least
    accelerated_seconds: float  # the same with the methods
    # metric -> how near these come to the dense frames, such as ``psnr`` in dB
    metrics: Mapping[str, float] = field(default_factory=dict)
    not_measured: Mapping[str, str] = field(default_factory=dict)  # metric -> why it says nothing
    runs: int = 1  # how often each was made
    sections: Sequence[Section] = ()  # what methods tell of the run with them, such as the errors of their attention

    @property
    def speedup(self) -> float:
        """Dense seconds over accelerated ones, of the whole call."""
        return self.dense_seconds / self.accelerated_seconds

    def save(self, path: str | Path) -> None:
        """Write a PNG: frames of the dense run, of the accelerated one, and five times their difference.

        Raises:
            ConfigError: for another ending, or a folder that is not there.
            MissingBackend: without a package that draws reports.
        """
        _tool("check_sheet")(self, Path(path))

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain values, without the frames."""
        return {
            "dense_seconds": self.dense_seconds,
            "accelerated_seconds": self.accelerated_seconds,
            "speedup": self.speedup,
            "metrics": dict(self.metrics),
            "not_measured": dict(self.not_measured),
            "runs": self.runs,
            "sections": {section.method: dict(section.data) for section in self.sections},
        }

    def __str__(self) -> str:
        seconds = (
            f"{self.accelerated_seconds:.3g} s instead of {self.dense_seconds:.3g} s in the whole call, "
            f"{self.speedup:.2f} times as fast"
        )
        counted = "one run each" if self.runs == 1 else f"the faster of {self.runs} runs each"
        measured = [f"{name} {value:.4g}" for name, value in self.metrics.items()]
        more = [*(f"{name} not measured: {why}" for name, why in self.not_measured.items()), *map(str, self.sections)]
        return "\n".join([f"{counted}, same seed: {seconds}", ", ".join(measured) or "nothing measured", *more])


def check(
    pipe: Any,
    suspended: Callable[[], AbstractContextManager[None]],
    accelerated_call: Callable[..., Any],
    seed: int,
    call: Mapping[str, Any],
    report: Callable[[], Report],
) -> Check:
    """Generate one prompt and seed dense, with the methods suspended, and with them; errors as `Attachment.check`."""
    if pipe is None:
        raise AttachError(
            "check calls the pipeline, but the methods are attached to a transformer; attach to the pipeline"
        )
    require_tools()
    pairs = list[tuple[tuple[Frames, float], tuple[Frames, float]]]()
    while not pairs or (len(pairs) < 2 and sum(seconds for _, seconds in pairs[0]) < SHORT):
        with suspended():
            plain = _generated(pipe, seed, call)
        pairs.append((plain, _generated(accelerated_call, seed, call)))
    (dense, _), (accelerated, _) = pairs[0]
    least = [min(seconds for _, seconds in runs) for runs in zip(*pairs, strict=True)]
    return compared(dense, accelerated, (least[0], least[1]), report(), runs=len(pairs))


def require_tools() -> None:
    """Raise `MissingBackend` if no package is installed that compares clips and draws them."""
    _tool("check")
    _tool("check_sheet")


def compared(
    dense: Frames, accelerated: Frames, seconds: tuple[float, float], report: Report | None, *, runs: int = 1
) -> Check:
    """Compare a run with methods, and its report, to the dense one of its seed, by the installed tool's metrics."""
    metrics, missing = _tool("check")(accelerated, dense)
    return Check(
        dense=dense, accelerated=accelerated, dense_seconds=seconds[0], accelerated_seconds=seconds[1],
        metrics=metrics, not_measured=missing, runs=runs,
        sections=[section for section in report.sections if "error" in section.data] if report else (),
    )  # fmt: skip


def _generated(run: Callable[..., Any], seed: int, call: Mapping[str, Any]) -> tuple[Frames, float]:
    """Return the frames of a run of a pipeline, and its seconds."""
    begun = clock.now()
    result = run(generator=torch.Generator("cpu").manual_seed(seed), output_type="np", **call)
    media = getattr(result, "frames", None)
    media = getattr(result, "images", None) if media is None else media
    if media is None:
        raise ConfigError(f"check compares frames or images, but {type(run).__name__} gives {type(result).__name__}")
    frames = np.asarray(media[0], np.float32)
    return (frames if frames.ndim == 4 else frames[None]), clock.now() - begun


def _tool(name: str) -> Any:
    if (tool := drawing(name)) is None:
        raise MissingBackend(f"check needs a package that compares clips ({name}), found none; reinstall dit-accel")
    return tool
