"""Dynamic degree and warp error, by OpenCV's optical flow DIS (Kroeger et al. 2016), which follows patches of 16."""

import itertools
import math
from functools import partial

import numpy as np
import numpy.typing as npt
from dit_accel_pipelines.generation.media import to_uint8

from .metric import Clip, Measured, Metric, Sample, mean_of, neighbours, no_module

Flow = npt.NDArray[np.float32]  # where each pixel of a frame lies in another: [height, width, (right, down)], in pixels
CONSISTENT = 1.0  # pixels by which a way there and back may miss its start; more, and the pixel is taken as hidden


def dis_flow(first: Clip, second: Clip) -> Flow:
    """Return the flow from a frame [height, width, 3] to another by OpenCV's DIS, medium preset."""
    import cv2

    grey = [cv2.cvtColor(to_uint8(frame), cv2.COLOR_RGB2GRAY) for frame in (first, second)]
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*grey, None)  # type: ignore[call-overload, attr-defined]


def strongest(flow: Flow) -> float:
    """Return the mean length in pixels of the strongest 5 % of a flow's vectors."""
    lengths = np.sort(np.linalg.norm(flow.astype(np.float64), axis=-1).ravel())
    return float(lengths[-max(1, len(lengths) // 20) :].mean())


def is_dynamic(sample: Sample) -> Measured:
    """Return 1 for a clip that moves by VBench's rule, else 0; and the `strongest` of each pair.

    Of about 8 frames a second, 4 in 16 pairs (at least one) must move by more than 6 pixels on 256 of the short side.
    """
    step = max(1, round(sample.fps / 8))
    frames = neighbours(sample, 1 + step)[::step]
    moved = [strongest(dis_flow(first, second)) for first, second in itertools.pairwise(frames)]
    least = 6 * min(frames.shape[1:3]) / 256
    enough = max(1, round(4 * len(frames) / 16))
    return Measured(value=float(sum(distance > least for distance in moved) >= enough), by_frame=tuple(moved))


def warp_error(sample: Sample) -> Measured:
    """Return the RMS difference of each frame from the next one drawn back along the flow, mean over pairs.

    Over the pixels that are seen in both: those whose way there and back misses by at most `CONSISTENT`, within the
    frame. A pair without such a pixel counts as 1.
    """
    import cv2

    frames, errors = neighbours(sample), []
    height, width = frames.shape[1:3]
    down, right = np.indices((height, width), dtype=np.float32)
    for first, second in itertools.pairwise(frames):
        there, back = dis_flow(first, second), dis_flow(second, first)
        x, y = right + there[..., 0], down + there[..., 1]
        met, drawn = (
            cv2.remap(values, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            for values in (back, second.astype(np.float32))
        )
        inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
        seen = inside & (np.linalg.norm(there + met, axis=-1) <= CONSISTENT)
        difference = (drawn - first)[seen].astype(np.float64)
        errors.append(math.sqrt(float((difference**2).mean())) if seen.any() else 1.0)
    return mean_of(errors)


DYNAMIC = Metric(
    name="dynamic@dis", words="dynamic degree, DIS", better="neither", bounds=(0.0, 1.0), reference=False,
    measure=is_dynamic, missing=partial(no_module, "cv2", "OpenCV"), short_side=16, decimals=2,
    source="VBench's rule (arXiv 2311.17982) with OpenCV's DIS for RAFT; its mean is the share of clips that move",
)  # fmt: skip

WARP_ERROR = Metric(
    name="warp-error@dis", words="warp error, RMS, DIS", better="less", bounds=(0.0, 1.0), reference=False,
    measure=warp_error, missing=partial(no_module, "cv2", "OpenCV"), short_side=16, decimals=4,
    source="after Lai et al. 2018 (arXiv 1808.00449): RMS over pixels seen in both frames, by OpenCV's DIS there and "
    "back",
)  # fmt: skip
