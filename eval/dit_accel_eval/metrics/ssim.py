"""Structural similarity, at one scale and at several."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from .metric import Measured, Metric, Sample, frames_first, mean_of


def _by_frame(similarity: Callable[..., Any], sample: Sample) -> Measured:
    """Return the mean over frames, and each frame's."""
    first, second = map(frames_first, sample.pair())
    return mean_of(similarity(first, second, data_range=1.0, reduction="none").tolist())


SSIM = Metric(
    name="ssim", words="SSIM", better="more", bounds=(-1.0, 1.0), reference=True,
    measure=partial(_by_frame, structural_similarity_index_measure),
    source="Wang et al. 2004, Gaussian window of 11 pixels and sigma 1.5, mean over frames; torchmetrics",
)  # fmt: skip

MS_SSIM = Metric(
    name="ms-ssim", words="MS-SSIM", better="more", bounds=(-1.0, 1.0), reference=True,
    measure=partial(_by_frame, multiscale_structural_similarity_index_measure),
    short_side=161,  # where its five scales fit the window of 11
    source="Wang, Simoncelli, Bovik 2003, five scales, mean over frames; torchmetrics",
)  # fmt: skip
