"""PSNR of how frames change: whether motion is the reference's, wherever both differ alike from frame to frame."""

import numpy as np

from .metric import Measured, Metric, NotMeasured, Sample, mean_of
from .psnr import CAP


def change_psnr(sample: Sample) -> Measured:
    """Return the PSNR in dB of neighbouring frames' differences, over all pairs, and of each pair."""
    clip, reference = sample.pair()
    if len(clip) < 2:
        raise NotMeasured("it takes 2 frames, and there is one")
    errors = (np.diff(clip.astype(np.float64), axis=0) - np.diff(reference.astype(np.float64), axis=0)) ** 2
    least = 10 ** (-CAP / 10)
    pairs = -10 * np.log10(np.maximum(errors.mean((1, 2, 3)), least))
    return Measured(value=float(-10 * np.log10(max(errors.mean(), least))), by_frame=mean_of(pairs).by_frame)


CHANGE_PSNR = Metric(
    name="psnr-change", words="PSNR of frame differences, dB", better="more", bounds=(-np.inf, CAP), reference=True,
    measure=change_psnr, decimals=2,
    source="10 log10(1 / MSE) of x[f + 1] - x[f] against the reference's, peak 1, at most 100 dB",
)  # fmt: skip
