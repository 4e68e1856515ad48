"""How near pixels are: PSNR over all frames, by frame and of how frames change; SSIM at one scale and at several."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from .metric import Clip, Measured, Metric, Sample, frames_first, mean_of, neighbours

CAP = 100.0  # PSNR in dB of identical clips, so that means stay finite


def psnr(clip: Clip, reference: Clip) -> float:
    """Return the peak signal-to-noise ratio in dB over all frames of clips of one shape; `CAP` for identical ones."""
    first, second = map(frames_first, Sample(frames=clip, reference=reference).pair())
    return min(CAP, float(peak_signal_noise_ratio(first, second, data_range=1.0)))


def _decibels(errors: Any) -> Any:
    return -10 * np.log10(np.maximum(errors, 10 ** (-CAP / 10)))


def by_frame(clip: Clip, reference: Clip) -> Measured:
    """Return the mean of the frames' PSNR, each at most `CAP`, and each by itself."""
    return mean_of(_decibels(np.mean((clip.astype(np.float64) - reference) ** 2, axis=(1, 2, 3))))


def _pooled(sample: Sample) -> Measured:
    return Measured(value=psnr(*sample.pair()), by_frame=by_frame(*sample.pair()).by_frame)


def change_psnr(sample: Sample) -> Measured:
    """Return the PSNR in dB of neighbouring frames' differences, over all pairs, and of each pair."""
    clip, reference = sample.pair()
    neighbours(sample)
    errors = (np.diff(clip.astype(np.float64), axis=0) - np.diff(reference.astype(np.float64), axis=0)) ** 2
    each = _decibels(errors.mean((1, 2, 3))).tolist()
    return Measured(value=float(_decibels(errors.mean())), by_frame=tuple(each))


def _similarity(similarity: Callable[..., Any], sample: Sample) -> Measured:
    """Return the mean over frames, and each frame's."""
    first, second = map(frames_first, sample.pair())
    return mean_of(similarity(first, second, data_range=1.0, reduction="none").tolist())


PSNR = Metric(
    name="psnr", words="PSNR, dB", better="more", bounds=(-np.inf, CAP), reference=True, measure=_pooled, decimals=2,
    source="10 log10(1 / MSE) over all frames, values in [0, 1], at most 100 dB; torchmetrics",
)  # fmt: skip

PSNR_FRAMES = Metric(
    name="psnr-frames", words="PSNR, mean of frames, dB", better="more", bounds=(-np.inf, CAP), reference=True,
    measure=lambda sample: by_frame(*sample.pair()), decimals=2,
    source="mean over frames of 10 log10(1 / MSE), each at most 100 dB, as TeaCache and Sparse-VideoGen print it",
)  # fmt: skip

CHANGE_PSNR = Metric(
    name="psnr-change", words="PSNR of frame differences, dB", better="more", bounds=(-np.inf, CAP), reference=True,
    measure=change_psnr, decimals=2,
    source="10 log10(1 / MSE) of x[f + 1] - x[f] against the reference's, peak 1, at most 100 dB",
)  # fmt: skip

SSIM = Metric(
    name="ssim", words="SSIM", better="more", bounds=(-1.0, 1.0), reference=True,
    measure=partial(_similarity, structural_similarity_index_measure),
    source="Wang et al. 2004, Gaussian window of 11 pixels and sigma 1.5, mean over frames; torchmetrics",
)  # fmt: skip

MS_SSIM = Metric(
    name="ms-ssim", words="MS-SSIM", better="more", bounds=(-1.0, 1.0), reference=True,
    measure=partial(_similarity, multiscale_structural_similarity_index_measure),
    short_side=161,  # where its five scales fit the window of 11
    source="Wang, Simoncelli, Bovik 2003, five scales, mean over frames; torchmetrics",
)  # fmt: skip
