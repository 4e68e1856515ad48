"""Whether a clip longer than trained comes round again: the rise of its autocorrelation."""

import numpy as np

from .metric import Clip, Metric, Sample, neighbours

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
