"""Structural similarity, at one scale and at several."""

from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from .metric import Clip, Measured, Metric, NotMeasured, Sample, frames_first, mean_of

NARROWEST = 161
"""Pixels of the short side from which MS-SSIM's five scales fit its window of 11."""


def ssim(clip: Clip, reference: Clip) -> float:
    """Return the structural similarity (Gaussian window, 11 pixels), mean over frames, 1 for identical clips.

    Raises:
        ConfigError: for clips of different shapes.
    """
    return by_frame(Sample(frames=clip, reference=reference)).value


def by_frame(sample: Sample) -> Measured:
    """Return the mean over frames, and each frame's."""
    one, two = map(frames_first, sample.pair())
    return mean_of(structural_similarity_index_measure(one, two, data_range=1.0, reduction="none").tolist())  # type: ignore[union-attr]


def ms_ssim(sample: Sample) -> Measured:
    """Return the multi-scale structural similarity, mean over frames.

    Raises:
        NotMeasured: for frames of `NARROWEST` pixels' short side or less.
    """
    clip, reference = sample.pair()
    short = min(clip.shape[1:3])
    if short < NARROWEST:
        raise NotMeasured(f"its five scales take a short side of {NARROWEST} pixels, and there are {short}")
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
