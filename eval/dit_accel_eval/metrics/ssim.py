"""Structural similarity, at one scale and at several."""

from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from .metric import Clip, Measured, Metric, Sample, check_short_side, frames_first, mean_of

NARROWEST = 161
"""Pixels of the short side from which MS-SSIM's five scales fit its window of 11."""


def ssim(clip: Clip, reference: Clip) -> float:
    """Return the structural similarity (Gaussian window, 11 pixels) of clips of one shape, mean over frames."""
    return by_frame(Sample(frames=clip, reference=reference)).value


def by_frame(sample: Sample) -> Measured:
    """Return the mean over frames, and each frame's."""
    one, two = map(frames_first, sample.pair())
    return mean_of(structural_similarity_index_measure(one, two, data_range=1.0, reduction="none").tolist())  # type: ignore[union-attr]


def ms_ssim(sample: Sample) -> Measured:
    """Return the multi-scale structural similarity, mean over frames."""
    clip, reference = sample.pair()
    check_short_side(clip, NARROWEST, "its five scales take")
    values = [
        float(multiscale_structural_similarity_index_measure(frames_first(one), frames_first(two), data_range=1.0))
        for one, two in zip(clip[:, None], reference[:, None], strict=True)
    ]
    return mean_of(values)


SSIM = Metric(
    name="ssim", words="SSIM", better="more", bounds=(-1.0, 1.0), reference=True, measure=by_frame,
    source="Wang et al. 2004, Gaussian window of 11 pixels and sigma 1.5, mean over frames; torchmetrics",
)  # fmt: skip

MS_SSIM = Metric(
    name="ms-ssim", words="MS-SSIM", better="more", bounds=(-1.0, 1.0), reference=True, measure=ms_ssim,
    source="Wang, Simoncelli, Bovik 2003, five scales, mean over frames; torchmetrics",
)  # fmt: skip
