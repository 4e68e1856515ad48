"""Structural similarity, at one scale and at several."""

from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from .metric import Measured, Metric, Sample, frames_first, mean_of


def ssim_by_frame(sample: Sample) -> Measured:
    """Return the mean over frames, and each frame's."""
    one, two = map(frames_first, sample.pair())
    return mean_of(structural_similarity_index_measure(one, two, data_range=1.0, reduction="none").tolist())  # type: ignore[union-attr]


def ms_ssim(sample: Sample) -> Measured:
    """Return the multi-scale structural similarity, mean over frames."""
    one, two = map(frames_first, sample.pair())
    return mean_of(multiscale_structural_similarity_index_measure(one, two, data_range=1.0, reduction="none").tolist())


SSIM = Metric(
    name="ssim", words="SSIM", better="more", bounds=(-1.0, 1.0), reference=True, measure=ssim_by_frame,
    source="Wang et al. 2004, Gaussian window of 11 pixels and sigma 1.5, mean over frames; torchmetrics",
)  # fmt: skip

MS_SSIM = Metric(
    name="ms-ssim", words="MS-SSIM", better="more", bounds=(-1.0, 1.0), reference=True, measure=ms_ssim,
    short_side=161,  # where its five scales fit the window of 11
    source="Wang, Simoncelli, Bovik 2003, five scales, mean over frames; torchmetrics",
)  # fmt: skip
