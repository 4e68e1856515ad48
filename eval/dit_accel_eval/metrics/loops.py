"""Whether a clip longer than trained comes round again: NoRepeat, and the rise of its autocorrelation."""

import numpy as np

from .metric import Clip, Metric, NotMeasured, Sample

STRETCH = 8
"""Frames of the opening that is looked for again."""

STILL = 0.01
"""RMS difference of a clip's frames from their mean, in [0, 1], below which it stands still."""


def repetition(video: Clip, trained: int) -> float:
    """Return the least RMS difference between the opening frames and a later stretch as long; small: it repeats.

    Later stretches begin half the trained length on. The idea is that of RIFLEx' NoRepeat (arXiv 2502.15894), without
    a theoretical period; a clip that stands still scores as one that repeats.
    """
    starts = range(min(trained // 2, len(video) - STRETCH), len(video) - STRETCH + 1)
    differences = [np.sqrt(np.mean((video[:STRETCH] - video[start : start + STRETCH]) ** 2)) for start in starts]
    return float(min(differences))


def loop(video: Clip, trained: int) -> float:
    """Return how far the clip's autocorrelation rises again at a distance of half the trained length or more.

    A(d) is the mean correlation of frames d apart, of their differences from the mean frame; the rise is measured from
    its lowest point before, at most 2. Drawn clips that go one way score 0.2 to 0.6, those that come round above 1.4,
    wherever they begin. One that stands still counts as 2.
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


def _long(sample: Sample) -> tuple[Clip, int]:
    frames, trained = sample.frames, sample.trained_frames or len(sample.frames)
    least = max(2 * STRETCH, trained // 2 + STRETCH)
    if len(frames) < least:
        raise NotMeasured(f"it takes {least} frames, the opening and a later stretch, and there are {len(frames)}")
    return frames, trained


NOREPEAT = Metric(
    name="norepeat", words="least difference of a later stretch from the opening, RMS", better="more",
    bounds=(0.0, 1.0), reference=False, measure=lambda sample: repetition(*_long(sample)),
    source="after NoRepeat of RIFLEx (arXiv 2502.15894), without a theoretical period; 0 where a clip stands still",
)  # fmt: skip

LOOP = Metric(
    name="loop", words="loop score", better="less", bounds=(0.0, 2.0), reference=False,
    measure=lambda sample: loop(*_long(sample)),
    source="rise of the frames' autocorrelation at half the trained length or more; 2 where a clip stands still",
)  # fmt: skip
