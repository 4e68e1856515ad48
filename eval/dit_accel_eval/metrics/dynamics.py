"""Dynamics: whether a clip moves and flickers as its reference does, which a distance between frames does not tell."""

from dataclasses import dataclass
from types import MappingProxyType

from .metric import Sample
from .registered import scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Dynamic:
    """A metric of motion in the words of tables, and what a clip does that lies above or below its reference."""

    head: str
    above: str
    below: str


DYNAMICS = MappingProxyType(
    {
        "dynamic@dis": Dynamic(head="dynamic degree", above="moves more", below="moves less"),
        "flickering": Dynamic(head="flicker score", above="changes less", below="flickers more"),
    }
)
"""Metric -> its words; points of each are hundredths, as VBench counts them."""


def dynamics(sample: Sample) -> dict[str, list[float]]:
    """Return metric of `DYNAMICS` -> its value of a video and of the video's reference.

    Of a picture, and of a video without a reference, there is none; a metric that can't be measured here is left out.
    """
    if sample.reference is None or len(sample.frames) < 2:
        return {}
    clip, reference = (
        scores(DYNAMICS, Sample(frames=frames, fps=sample.fps)).values() for frames in (sample.frames, sample.reference)
    )
    return {name: [clip[name], reference[name]] for name in clip if name in reference}
