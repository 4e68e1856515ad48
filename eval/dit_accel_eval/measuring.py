"""What the metrics that a suite names say of a run, as a result line holds it, and which of them a line lacks."""

from typing import Any

from dit_accel_assets import model_defaults
from dit_accel_pipelines.request import EMBEDDED_FPS

from dit_accel import ConfigError

from .fidelity import Clip
from .metrics.metric import Sample
from .metrics.registry import metric, scores
from .results import Line
from .suite import Suite

ALWAYS = ("psnr", "ssim")
"""What every line holds by itself."""

DIGITS = 4
"""Digits behind the point of values by frame."""


def measures(suite: Suite, arm: str, clip: int, frames: Clip, reference: Clip, prompt: str) -> Line:
    """Return the measured part of a result line: PSNR and SSIM, and what the suite names besides.

    ``metrics`` holds values by name, ``by_frame`` those of single frames, ``skipped`` why a metric says nothing about
    this clip, and ``unavailable`` why it could not be measured on this machine.

    Raises:
        ConfigError: for frames that are not finite, with the arm and clip that made them.
    """
    defaults = model_defaults(suite.model)
    trained = int(defaults["num_frames"]) if "num_frames" in defaults else None
    try:
        sample = Sample(frames=frames, reference=reference, prompt=prompt, fps=EMBEDDED_FPS, trained_frames=trained)
    except ConfigError as error:
        raise ConfigError(f"clip {clip} of arm {arm!r}: {error}") from None
    found = scores(dict.fromkeys((*ALWAYS, *suite.metrics)), sample)
    values = found.values()
    line: dict[str, Any] = {name: values.pop(name) for name in ALWAYS}
    if not suite.metrics:
        return line
    by_frame = {name: one.by_frame for name, one in found.measured.items() if name in suite.metrics}
    line["metrics"] = values
    line["by_frame"] = {name: [round(x, DIGITS) for x in one] for name, one in by_frame.items() if one is not None}
    line |= {key: told for key in ("skipped", "unavailable") if (told := getattr(found, key))}
    return line


def lacks_metrics(suite: Suite, line: Line) -> bool:
    """Whether a line lacks a metric that the suite names and that can be measured here now."""
    known = {*line.get("metrics", ()), *line.get("skipped", ()), *ALWAYS}
    return any(name not in known and metric(name).missing() is None for name in suite.metrics)
