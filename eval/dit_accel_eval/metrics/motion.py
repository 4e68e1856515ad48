"""Motion and sharpness: how much neighbouring frames differ, and neighbouring pixels."""

import numpy as np

from .metric import Clip, Measured, Metric, Sample, mean_of, neighbours


def mean_motion(video: Clip) -> float:
    """Return the mean absolute difference of neighbouring frames, in [0, 1]."""
    return float(np.abs(np.diff(video, axis=0)).mean())


def flickering(sample: Sample) -> Measured:
    """Return one minus the mean absolute difference of neighbouring 8-bit frames over 255, and each pair's."""
    levels = np.rint(neighbours(sample).astype(np.float64) * 255)
    return mean_of((1 - np.abs(np.diff(levels, axis=0)).mean((1, 2, 3)) / 255).tolist())


def sharpness(video: Clip) -> float:
    """Return the variance of the Laplacian of the frames' mean channel."""
    x = video.mean(-1)
    inner = x[:, 1:-1, 1:-1]
    laplacian = x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:] - 4 * inner
    return float(laplacian.var())


MOTION = Metric(
    name="motion", words="change from frame to frame", better="neither", bounds=(0.0, 1.0), reference=False,
    decimals=4, measure=lambda sample: mean_motion(neighbours(sample)),
    source="mean absolute difference of neighbouring frames in [0, 1]",
)  # fmt: skip

FLICKERING = Metric(
    name="flickering", words="temporal flickering", better="more", bounds=(0.0, 1.0), reference=False,
    measure=flickering, decimals=4,
    source="VBench (arXiv 2311.17982), (255 - MAE of neighbouring 8-bit frames) / 255; motion lowers it as flicker "
    "does",
)  # fmt: skip

SHARPNESS = Metric(
    name="sharpness", words="sharpness", better="more", bounds=(0.0, np.inf), reference=False, decimals=5,
    measure=lambda sample: sharpness(sample.frames),
    source="variance of the Laplacian (Pech-Pacheco et al. 2000) of the mean channel; noise counts as sharp",
)  # fmt: skip
