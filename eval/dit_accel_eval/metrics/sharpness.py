"""Sharpness: how strongly neighbouring pixels differ."""

import numpy as np

from .metric import Clip, Metric


def sharpness(video: Clip) -> float:
    """Return the variance of the Laplacian of the frames' mean channel."""
    x = video.mean(-1)
    inner = x[:, 1:-1, 1:-1]
    laplacian = x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:] - 4 * inner
    return float(laplacian.var())


SHARPNESS = Metric(
    name="sharpness", words="sharpness", better="more", bounds=(0.0, np.inf), reference=False, decimals=5,
    measure=lambda sample: sharpness(sample.frames),
    source="variance of the Laplacian (Pech-Pacheco et al. 2000) of the mean channel; noise counts as sharp",
)  # fmt: skip
