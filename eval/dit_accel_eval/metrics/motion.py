"""Motion and sharpness, and whether a clip longer than trained comes round again: metrics without a network."""

import numpy as np

from .metric import Clip, Measured, Metric, Sample, mean_of, neighbours


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
