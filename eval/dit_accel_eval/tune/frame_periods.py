"""Whether attention over frames repeats: of which of the rotary frequencies its curve over frame distances is made.

The mean logit of tokens at one place of two frames, by the frames' distance d, is near sum_i a_i cos(f_i d) + C. It
repeats where the frequencies that carry most of it are multiples of one. Source: UltraViCo (arXiv 2511.20123), section
on periodic attention. Where we depart from it: amplitudes are a least-squares fit to the measured curve, none below 0,
and 0 for a frequency too slow to differ from C; a fundamental is the frequency of the largest amplitude, and others
belong to it by a tolerance.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

TOLERANCE = 0.06
"""How far a ratio of two frequencies may be from a whole number, as a share of it: CogVideoX's 3.16 counts as 3."""

APART = 0.2
"""How far it may be at most, in turns: a share alone would let any ratio above 8 pass."""

SEPARATE = 4.0
"""A period up to this many times the longest distance differs from a constant: its wave falls there from 1 to 0.

The waves of slower frequencies are alike but for rounding, so that amplitudes of any size would fit the curve.
"""

PERIODIC = 0.5
"""Share of the amplitude above which a family of frequencies makes attention repeat: ours, between Wan and others."""

BAND = 0.08
"""Half the width of a band over its period, rounded down: HunyuanVideo's 4 frames of 50, CogVideoX's 1 of 20."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spectrum:
    """What a curve is made of.

    Attributes:
        amplitudes: the share of each, of a sum of 1; all 0 for a constant curve.
        family: places of the frequencies that are multiples of it, itself included.
        error: RMS of the fit over that of the curve about its mean.
    """

    periods: tuple[float, ...]
    amplitudes: tuple[float, ...]
    dominant: int
    family: tuple[int, ...]
    share: float
    error: float

    @property
    def period(self) -> float | None:
        """Frames after which attention repeats; None where it does not."""
        return self.periods[self.dominant] if self.share > PERIODIC else None

    @property
    def gamma(self) -> float | None:
        """Half the width of a band, in frames; None without a period."""
        return None if self.period is None else float(max(1, int(BAND * self.period)))


def harmonics(frequencies: np.ndarray, place: int) -> tuple[int, ...]:
    """Return the places of the frequencies that are near whole multiples of one, itself included."""
    ratio = frequencies / frequencies[place]
    whole = np.maximum(np.rint(ratio), 1)
    return tuple(int(i) for i in np.flatnonzero(np.abs(ratio - whole) <= np.minimum(TOLERANCE * whole, APART)))


def spectrum(curve: np.ndarray, frequencies: np.ndarray) -> Spectrum:
    """Return what a curve over frame distances is made of."""
    distance, count = np.arange(len(curve)), len(curve) - np.arange(len(curve))
    waves = np.cos(np.outer(distance, frequencies))
    weight = count / count.sum()
    waves = waves - weight @ waves  # the constant takes the means
    values = curve - weight @ curve
    if np.abs(values).max() <= 1e-12 * np.abs(curve).max():
        values = np.zeros_like(values)  # what is left of a constant is rounding
    seen = 2 * np.pi / frequencies <= SEPARATE * (len(curve) - 1)
    fit = np.zeros(len(frequencies))
    fit[seen] = nnls(waves[:, seen] * np.sqrt(weight)[:, None], values * np.sqrt(weight))[0]
    total, size = float(fit.sum()), float(np.sqrt(weight @ values**2))
    shares = fit / total if total > 0 else fit
    place = int(shares.argmax())
    family = harmonics(frequencies, place)
    left = float(np.sqrt(weight @ (values - waves @ fit) ** 2))
    return Spectrum(
        periods=tuple(float(period) for period in 2 * np.pi / frequencies),
        amplitudes=tuple(float(share) for share in shares),
        dominant=place,
        family=family,
        share=float(shares[list(family)].sum()),
        error=left / size if size > 0 else 0.0,
    )
