"""LVSA's rule (arXiv 2605.31057): which latent frames see which, with anchors that move on from step to step."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorRule:
    """What decides which frames see which; every value is set."""

    trained_frames: int  # R, token frames that a frame shall see about as many of: those of the trained clips
    window: int  # W, frames to either side that a frame sees
    first: int  # first frames that every frame sees

    def stride(self, frames: int) -> int:
        """Return the distance of two anchors in a clip of so many frames, kappa; 1: every frame sees every other.

        The larger of two: the one that leaves as many anchors as the trained length has room for beside the window,
        and the released code's ceil((T - m) / (R - m)) with m = 2 W + first, which may leave fewer.
        """
        budget = max(self.first + 1, self.trained_frames)
        if frames <= budget:
            return 1
        seen = 2 * self.window + self.first
        least = budget - seen - 1  # anchors behind the first frames that there is room for
        first, strides = self.first, range(1, frames + 1)
        by_count = max(k for k in strides if math.ceil(frames / k) - math.ceil(first / k) >= least)
        return max(by_count, math.ceil((frames - seen) / max(budget - seen, 1)))

    def anchors(self, frames: int, stride: int, offset: int) -> np.ndarray:
        """Return the frames that every frame sees, bool [T]: the first ones, and (offset + i stride) mod T.

        There are ceil(T / stride) of the latter whatever the offset, so that some come round to the clip's beginning.
        """
        seen = np.arange(frames) < self.first
        seen[(offset % stride + np.arange(0, frames, stride)) % frames] = True
        return seen

    def visible(self, frames: int, offset: int = 0) -> np.ndarray:
        """Return which frames each frame sees, bool [T, T]: the anchors, and the 2 W + 1 nearest of the others.

        These are a window about the frame, moved inward at the clip's ends and widened over the anchors in it. Of two
        as near the earlier one is taken.

        ``offset``: of the anchors, in frames; the step's number where they rotate.
        """
        anchors = self.anchors(frames, self.stride(frames), offset)
        seen = np.repeat(anchors[None], frames, axis=0)
        candidates = np.flatnonzero(~anchors)
        distance = np.abs(candidates[None] - np.arange(frames)[:, None])
        nearest = np.argsort(distance, axis=1, kind="stable")[:, : 2 * self.window + 1]
        seen[np.arange(frames)[:, None], candidates[nearest]] = True
        return seen

    def density(self, frames: int) -> float:
        """Return the share of the frame pairs that are seen, mean over all offsets."""
        stride = self.stride(frames)
        anchors = [self.anchors(frames, stride, offset).sum() for offset in range(stride)]
        return float(np.mean([min(count + 2 * self.window + 1, frames) / frames for count in anchors]))


def met(seen: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return which runs of frames hold two that see each other, bool [R, R], of which frames do, bool [T, T].

    ``first`` and ``last``: frames of each run, int [R].
    """
    for _ in range(2):
        sums = np.pad(seen.cumsum(0), ((1, 0), (0, 0)))
        seen = (sums[last + 1] > sums[first]).T
    return seen
