"""Motion, flicker, sharpness and loops by pixels, and what moves by OpenCV's optical flow DIS (Kroeger et al. 2016)."""

import itertools
import math
from functools import partial

import numpy as np
import numpy.typing as npt
from dit_accel_pipelines.generation.media import to_uint8

from .metric import Clip, Measured, Metric, Sample, mean_of, neighbours, no_module


def mean_motion(video: Clip) -> float:
    """Return the mean absolute difference of neighbouring frames, in [0, 1]."""
    return float(np.abs(np.diff(video, axis=0)).mean())


def flickering(sample: Sample) -> Measured:
    """Return one minus the mean absolute difference of neighbouring 8-bit frames over 255, and each pair's."""
    levels = np.rint(neighbours(sample).astype(np.float64) * 255)
    return mean_of((1 - np.abs(np.diff(levels, axis=0)).mean((1, 2, 3)) / 255).tolist())


def sharpness(video: Clip) -> float:
    """Return the variance of the Laplacian of the frames' mean channel."""
    x = video.mean(-1)
    inner = x[:, 1:-1, 1:-1]
    laplacian = x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:] - 4 * inner
    return float(laplacian.var())


MOTION = Metric(
    name="motion", words="change from frame to frame", better="neither", bounds=(0.0, 1.0), reference=False,
    decimals=4, measure=lambda sample: mean_motion(neighbours(sample)),
    source="mean absolute difference of neighbouring frames in [0, 1]",
)  # fmt: skip

FLICKERING = Metric(
    name="flickering", words="temporal flickering", better="more", bounds=(0.0, 1.0), reference=False,
    measure=flickering, decimals=4,
    source="VBench (arXiv 2311.17982), (255 - MAE of neighbouring 8-bit frames) / 255; motion lowers it as flicker "
    "does",
)  # fmt: skip

SHARPNESS = Metric(
    name="sharpness", words="sharpness", better="more", bounds=(0.0, np.inf), reference=False, decimals=5,
    measure=lambda sample: sharpness(sample.frames),
    source="variance of the Laplacian (Pech-Pacheco et al. 2000) of the mean channel; noise counts as sharp",
)  # fmt: skip


STRETCH = 8  # frames that must lie behind half the trained length
STILL = 0.01  # RMS difference of a clip's frames from their mean, in [0, 1], below which it stands still


def loop_rise(video: Clip, trained: int) -> float:
    """Return how far the clip's autocorrelation rises again at a distance of half the trained length or more.

    It is the mean correlation of frames d apart, of their differences from the mean frame; the rise is from its lowest
    point before, at most 2. Drawn clips that go one way score 0.2 to 0.6, those that come round above 1.4.
    """
    frames = video.reshape(len(video), -1).astype(np.float64)
    away = frames - frames.mean(0)
    norms = np.linalg.norm(away, axis=1)
    if norms.mean() < STILL * np.sqrt(frames.shape[1]):
        return 2.0
    unit = away / np.maximum(norms, 1e-12)[:, None]
    alike = unit @ unit.T
    curve = np.array([np.diagonal(alike, d).mean() for d in range(len(video) - STRETCH // 2 + 1)])
    rises = curve - np.minimum.accumulate(curve)
    return float(max(0.0, rises[trained // 2 :].max(initial=0.0)))


def _loop(sample: Sample) -> float:
    trained = sample.trained_frames or len(sample.frames)
    return loop_rise(neighbours(sample, max(2 * STRETCH, trained // 2 + STRETCH)), trained)


LOOP = Metric(
    name="loop", words="loop score", better="less", bounds=(0.0, 2.0), reference=False,
    measure=_loop,
    source="rise of the frames' autocorrelation at half the trained length or more; 2 where a clip stands still",
)  # fmt: skip


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
