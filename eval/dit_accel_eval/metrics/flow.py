"""Optical flow by OpenCV's DIS, and what follows from it: dynamic degree, the static filter, warp error.

The rules of dynamic degree and of the static filter are VBench's (arXiv 2311.17982), which takes RAFT's flow; ours are
named for DIS (Kroeger et al. 2016), and not to be compared with its figures.
"""

import importlib.util
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .metric import Clip, Measured, Metric, NotMeasured, Sample, check_short_side, levels, mean_of, neighbours
from .motion import flickering

Flow = npt.NDArray[np.float32]
"""Where each pixel of a frame lies in another: [height, width, (right, down)], in pixels."""

Flows = Callable[[Clip, Clip], Flow]

NARROWEST = 16
"""Pixels of the short side from which DIS has a patch to follow."""

CONSISTENT = 1.0
"""Pixels by which a way there and back may miss its start; more, and the pixel is taken as hidden."""


def no_opencv() -> str | None:
    """Return why flow can't be had: OpenCV is not installed."""
    found = importlib.util.find_spec("cv2") is not None
    return None if found else "OpenCV is not installed; pip install 'dit-accel[metrics]'"


def dis_flow(one: Clip, two: Clip) -> Flow:
    """Return the flow from a frame [height, width, 3] to another by OpenCV's DIS, medium preset."""
    import cv2

    check_short_side(one[None], NARROWEST, "its flow takes")
    grey = [cv2.cvtColor(levels(frame), cv2.COLOR_RGB2GRAY) for frame in (one, two)]
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*grey, None)  # type: ignore[call-overload, attr-defined]


def strongest(flow: Flow, share: float) -> float:
    """Return the mean length in pixels of the strongest share of a flow's vectors."""
    lengths = np.sort(np.linalg.norm(flow.astype(np.float64), axis=-1).ravel())
    return float(lengths[-max(1, int(len(lengths) * share)) :].mean())


def is_dynamic(sample: Sample, flows: Flows) -> Measured:
    """Return 1 for a clip that moves, 0 for one that does not, by VBench's rule; by pair the strongest 5 % of the flow.

    Of about 8 frames a second, at least 4 in 16 neighbouring pairs (rounded, at least one) must move by more than
    6 pixels on 256 of the short side.
    """
    frames = neighbours(sample)[:: max(1, round(sample.fps / 8))]
    if len(frames) < 2:
        raise NotMeasured(f"at {sample.fps:g} frames a second it takes more than {len(sample.frames)}")
    moved = [strongest(flows(one, two), 0.05) for one, two in itertools.pairwise(frames)]
    least = 6 * min(frames.shape[1:3]) / 256
    enough = max(1, round(4 * len(frames) / 16))
    return Measured(value=float(sum(one > least for one in moved) >= enough), by_frame=tuple(moved))


def is_static(sample: Sample, flows: Flows) -> Measured:
    """Return 1 for a clip that stands still, else 0, by VBench's static filter; by pair the strongest 2 % of the flow.

    At most 2 in 16 neighbouring pairs (rounded) may move by more than T = 3 pixels on 256 of the short side, and the
    first frame to the last and back by no more than twice that many times T.
    """
    frames = neighbours(sample)
    moved = [strongest(flows(one, two), 0.02) for one, two in itertools.pairwise(frames)]
    least, allowed = 3 * min(frames.shape[1:3]) / 256, round(2 * len(frames) / 16)
    if sum(one > least for one in moved) > allowed:
        return Measured(value=0.0, by_frame=tuple(moved))
    round_trip = max(strongest(flows(*pair), 0.02) for pair in ((frames[0], frames[-1]), (frames[-1], frames[0])))
    return Measured(value=float(round_trip <= 2 * max(1, allowed) * least), by_frame=tuple(moved))


def warp_error(sample: Sample, flows: Flows) -> Measured:
    """Return the RMS difference of each frame from the next one drawn back along the flow, mean over pairs.

    Over the pixels that are seen in both: whose way there and back misses by at most `CONSISTENT` pixels, and does
    not leave the frame. A pair without such a pixel counts as 1.
    """
    frames = neighbours(sample)
    errors = []
    for one, two in itertools.pairwise(frames):
        there, back = flows(one, two), flows(two, one)
        (x, y), (height, width) = _ends(there), there.shape[:2]
        inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
        seen = inside & (np.linalg.norm(there + warped(back, there), axis=-1) <= CONSISTENT)
        difference = (warped(two.astype(np.float32), there) - one)[seen].astype(np.float64)
        errors.append(math.sqrt(float((difference**2).mean())) if seen.any() else 1.0)
    return mean_of(errors)


def warped(values: npt.NDArray[np.float32], flow: Flow) -> Any:
    """Return values [height, width, C] at the ends of a flow [height, width, 2], linear between pixels."""
    import cv2

    return cv2.remap(values, *_ends(flow), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _ends(flow: Flow) -> tuple[Any, Any]:
    """Return where the vectors of a flow end, right and down, [height, width] each."""
    down, right = np.indices(flow.shape[:2], dtype=np.float32)
    return right + flow[..., 0], down + flow[..., 1]


def still_flickering(sample: Sample) -> Measured:
    """Return the flickering of a clip that passes the static filter; others are not measured."""
    if not is_static(sample, dis_flow).value:
        raise NotMeasured("the clip moves, and flickering is set apart from motion in still ones alone")
    return flickering(sample)


DYNAMIC = Metric(
    name="dynamic@dis", words="dynamic degree, DIS", better="neither", bounds=(0.0, 1.0), reference=False,
    measure=lambda sample: is_dynamic(sample, dis_flow), missing=no_opencv, decimals=2,
    source="VBench's rule (arXiv 2311.17982) with OpenCV's DIS for RAFT; its mean is the share of clips that move",
)  # fmt: skip

STATIC = Metric(
    name="static@dis", words="static filter, DIS", better="neither", bounds=(0.0, 1.0), reference=False,
    measure=lambda sample: is_static(sample, dis_flow), missing=no_opencv, decimals=2,
    source="VBench's static filter (arXiv 2311.17982) with OpenCV's DIS for RAFT",
)  # fmt: skip

STILL_FLICKERING = Metric(
    name="flickering@static-dis", words="temporal flickering of still clips", better="more", bounds=(0.0, 1.0),
    reference=False, measure=still_flickering, missing=no_opencv, decimals=4,
    source="VBench (arXiv 2311.17982): flickering of the clips that pass the static filter, with DIS for RAFT",
)  # fmt: skip

WARP_ERROR = Metric(
    name="warp-error@dis", words="warp error, RMS, DIS", better="less", bounds=(0.0, 1.0), reference=False,
    measure=lambda sample: warp_error(sample, dis_flow), missing=no_opencv, decimals=4,
    source="after Lai et al. 2018 (arXiv 1808.00449): RMS over pixels seen in both frames, by OpenCV's DIS there and "
    "back",
)  # fmt: skip
