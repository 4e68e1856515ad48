"""UltraViCo's rule (arXiv 2511.20123): how strongly positive logits decay at each distance of two frames."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ByRatio = Sequence[tuple[float, float, float | None]]
"""(extension ratio, alpha, beta or None) of a model, as published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecayRule:
    """What decides a decay table; every value is set."""

    trained_frames: int  # L, token frames of the clips that the model was trained on
    alpha: float  # factor on positive logits outside the window, in (0, 1]
    beta: float | None = None  # factor in the bands instead of ``alpha``, in (0, 1]; None: there are no bands
    period: float | None = None  # T, frames after which the model's attention repeats; None: it does not
    gamma: float | None = None  # half the width of the band around each multiple of T, in frames

    @property
    def window(self) -> int:
        """The largest frame distance that never decays: floor(L / 2)."""
        return self.trained_frames // 2

    @property
    def decays(self) -> bool:
        """Whether any distance beyond the window does."""
        return self.alpha < 1 or (self.beta is not None and self.beta < 1)

    def table(self, frames: int) -> np.ndarray:
        """Return t by frame distance in a clip of F token frames, float32 [F]: a logit x becomes min(x, t x).

        Inside the window t is 1, in the bands around multiples of T it is beta, elsewhere alpha; in this order.
        """
        distance = np.arange(frames, dtype=np.float64)
        t = np.full(frames, self.alpha)
        if self.beta is not None:
            assert self.period is not None
            assert self.gamma is not None
            multiple = np.maximum(1.0, np.rint(distance / self.period))  # m = 0 is the window's own
            t[np.abs(distance - multiple * self.period) <= self.gamma] = self.beta
        t[distance <= self.window] = 1.0
        return t.astype(np.float32)


def strengths(by_ratio: ByRatio, ratio: float) -> tuple[float, float | None]:
    """Return the published (alpha, beta) of the ratio nearest to ``ratio``; of two as near, the larger one's."""
    _, alpha, beta = min(by_ratio, key=lambda entry: (abs(entry[0] - ratio), -entry[0]))
    return alpha, beta


def output_frames(latent_frames: int, step: int) -> int:
    """Return the output frames of so many latent frames: the first covers one frame, the others ``step`` each."""
    return step * (latent_frames - 1) + 1


def extended_frames(trained_frames: int, ratio: float, step: int) -> int:
    """Return the output frames that are ``ratio`` times the trained length: step (round(L s) - 1) + 1.

    Args:
        trained_frames: L, in latent frames.
        ratio: s.
        step: output frames that a latent covers, except the first, which covers one.
    """
    return output_frames(round(trained_frames * ratio), step)
