"""Exposure: how bright a clip is, and how much of it is black or white."""

from .metric import Measured, Metric, Sample, luma, mean_of

ENDS = 2.5 / 255
"""Luma within which of 0 or 1 a pixel is black or white: two of 255 levels."""


def exposure(sample: Sample) -> Measured:
    """Return the mean luma in [0, 1], and each frame's."""
    return mean_of(luma(sample.frames).mean((1, 2)).tolist())


def clipping(sample: Sample) -> Measured:
    """Return the share of the pixels that are black or white, and each frame's."""
    light = luma(sample.frames)
    return mean_of(((light <= ENDS) | (light >= 1 - ENDS)).mean((1, 2)).tolist())


EXPOSURE = Metric(
    name="exposure", words="mean luma", better="neither", bounds=(0.0, 1.0), reference=False, measure=exposure,
    source="mean of Rec. 709 luma over all pixels",
)  # fmt: skip

CLIPPING = Metric(
    name="clipping", words="black or white pixels", better="less", bounds=(0.0, 1.0), reference=False,
    measure=clipping, source="share of pixels whose Rec. 709 luma is within 2 of 255 levels of an end",
)  # fmt: skip
