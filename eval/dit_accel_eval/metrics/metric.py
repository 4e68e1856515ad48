"""What a metric is, and the sample that it measures."""

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from dit_accel import ConfigError
from dit_accel.errors import install

Clip = npt.NDArray[np.float32]  # frames [F, height, width, 3] in [0, 1]; a picture is one frame
Better = Literal["more", "less", "neither"]
FAMILY = ":MODEL"  # how the name of what stands for the metrics of all models ends
ROUNDING = 1e-3  # how far a value may lie outside [0, 1]: resampling and number formats go past it a little


class NotMeasured(ConfigError):  # noqa: N818 - reads as what it is
    """A sample that a metric can't say anything about; its text is the reason, and the run goes on without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One clip to be measured, [F, height, width, 3] in [0, 1], and the clip of that shape that it should be."""

    frames: Clip
    reference: Clip | None = None
    prompt: str = ""
    fps: float = 8.0
    trained_frames: int | None = None  # frames that the model was trained on; None: as many as there are

    def __post_init__(self) -> None:
        check_clip(self.frames, "a clip")
        if self.reference is not None:
            check_clip(self.reference, "a reference")
            if self.frames.shape != self.reference.shape:
                shapes = f"{self.frames.shape} and a reference of {self.reference.shape}"
                raise ConfigError(f"only clips of one shape compare, got {shapes}; generate both at one size, length")
        if not 0 < self.fps < math.inf:
            raise ConfigError(f"fps must be above 0, got {self.fps}")

    def pair(self) -> tuple[Clip, Clip]:
        """Return the frames and the reference, for a metric that needs one; raises `NotMeasured` if there is none."""
        if self.reference is None:
            raise NotMeasured("it compares with a reference, and there is none")
        return self.frames, self.reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A metric's value of one sample, and by frame or neighbouring pair where the metric has some."""

    value: float
    by_frame: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A number that tells something about a clip.

    Attributes:
        name: its id; a metric that rests on a network or a library's model says which behind an @, as ``lpips@alex``.
        better: whether ``more`` or ``less`` is better, or ``neither`` by itself.
        bounds: least and greatest value; may be infinite.
        source: paper or definition, and where it is departed from.
        measure: the value of a sample.
        missing: why it can't be measured here, None if it can; called before anything is computed. It raises a
            `ConfigError` where what it rests on was named and is something else, such as another model's weights.
        of: of a family, whose name ends in ``:MODEL``, what gives the metric of a model's name; None: of a metric.
    """

    name: str
    words: str
    better: Better
    bounds: tuple[float, float]
    reference: bool
    source: str
    measure: Callable[[Sample], Measured | float]
    missing: Callable[[], str | None] = lambda: None
    decimals: int = 3
    prompt: bool = False
    short_side: int = 1
    of: "Callable[[str], Metric] | None" = None

    def __post_init__(self) -> None:
        if self.better not in ("more", "less", "neither"):
            raise ConfigError(f"metric {self.name!r} has better = {self.better!r}; say 'more', 'less' or 'neither'")
        if not self.name or any(sign.isspace() or sign == "," for sign in self.name):
            raise ConfigError(f"a metric can't be called {self.name!r}; leave out blanks and commas")
        if not self.bounds[0] < self.bounds[1]:
            raise ConfigError(f"metric {self.name!r} has bounds {self.bounds}; give the least value first")

    def __call__(self, sample: Sample) -> Measured:
        """Measure a sample."""
        reason = self.missing()
        if reason is not None:
            raise NotMeasured(reason)
        if self.prompt and not sample.prompt.strip():
            raise NotMeasured("it compares with the prompt, and there is none")
        if (short := min(sample.frames.shape[1:3])) < self.short_side:
            raise NotMeasured(f"it takes a short side of {self.short_side} pixels, and there are {short}")
        value = self.measure(sample)
        measured = value if isinstance(value, Measured) else Measured(value=float(value))
        low, high = self.bounds
        if not low - ROUNDING <= measured.value <= high + ROUNDING:  # false for nan
            raise ConfigError(f"metric {self.name} gave {measured.value}, outside its bounds {low:g} to {high:g}")
        return Measured(value=min(max(measured.value, low), high), by_frame=measured.by_frame)


def check_clip(clip: object, what: str) -> None:
    """Refuse another shape, no frames, and values that are not finite or outside [0, 1]; errors call it ``what``."""
    if not isinstance(clip, np.ndarray) or clip.ndim != 4 or clip.shape[-1] != 3 or 0 in clip.shape:
        shape = getattr(clip, "shape", type(clip).__name__)
        raise ConfigError(f"{what} must be frames [F, height, width, 3], F of at least 1, got {shape}")
    if not np.issubdtype(clip.dtype, np.floating):
        raise ConfigError(f"{what} must hold floats in [0, 1], got {clip.dtype}; divide 8-bit frames by 255")
    finite = np.isfinite(clip).reshape(len(clip), -1).all(1)
    if not finite.all():
        bad = np.flatnonzero(~finite)
        where = f"in {len(bad)} of {len(clip)} frames, first in frame {bad[0]}"
        raise ConfigError(f"{what} has values that are not finite {where}; try dtype float32 or bfloat16")
    low, high = float(clip.min()), float(clip.max())
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise ConfigError(f"{what} must hold values in [0, 1], got {low:.4g} to {high:.4g}; divide 8-bit frames by 255")


def frames_first(clip: Clip) -> torch.Tensor:
    """Return frames as a tensor [F, 3, height, width], as torchmetrics and networks take them."""
    return torch.from_numpy(np.ascontiguousarray(clip, np.float32)).permute(0, 3, 1, 2)


def mean_of(values: Sequence[float]) -> Measured:
    """Return the mean of values by frame, which are kept."""
    return Measured(value=float(np.mean(values)), by_frame=tuple(map(float, values)))


def neighbours(sample: Sample, least: int = 2) -> Clip:
    """Return a sample's frames; raises `NotMeasured` for fewer than ``least``."""
    if len(sample.frames) < least:
        raise NotMeasured(f"it takes {least} frames, and there are {len(sample.frames)}")
    return sample.frames


def no_module(name: str, package: str) -> str | None:
    """Return why a module can't be had, None if it can: its package is not installed."""
    spec = importlib.util.find_spec(name) is not None
    return None if spec else f"{package} is not installed; {install('eval')}"
