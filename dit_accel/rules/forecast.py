"""How a step cache forecasts: as a weighted sum of what was computed before, with weights that only times decide.

A time is a step's index or its noise level. Every forecast is linear in the computed values, so that the weights say
all: on polynomials of the order in time Taylor and, without a ridge, Chebyshev are exact.
"""

from collections.abc import Sequence

import numpy as np

FARTHEST = 7.0
"""Log-SNR beyond which a noise level counts as none and as nothing but noise: at either end it is infinite."""

RIDGE = 1e-3
"""Weight of the squared Chebyshev coefficients above degree 0, per value that is fitted."""

DAMPED_AFTER = 3
"""Steps after the last computed one from which Heun's forecast is drawn back to it (FoCa)."""


def taylor(times: Sequence[float], at: float, order: int, damping: float = 0.0) -> list[float]:
    """Return the weights of the polynomial through the last values, of degree ``order`` or as many as there are.

    Source: TaylorSeer (arXiv 2503.06923). Where we depart from it: divided differences, exact at unequal distances too.

    Args:
        times: of the values, all different.
        order: the degree; 0 holds the last value.
        damping: share of the change from the last value that is not followed; 1 holds it.
    """
    used = times[-(order + 1) :]
    weights = [float(np.prod([(at - other) / (time - other) for other in used if other != time])) for time in used]
    weights = [(1 - damping) * weight for weight in weights]
    weights[-1] += damping
    return [0.0] * (len(times) - len(used)) + weights


def growth(times: Sequence[float], at: float) -> float:
    """Estimate a forecast's error at a time, up to a factor: the product of its distances to its values.

    So does the error of a polynomial through values grow with the time.

    ``times``: of the values that it goes through; below it, or all above it.
    """
    return float(np.prod([abs(at - time) for time in times]))


def log_snr(sigma: float, *, flow: bool) -> float:
    """Map a noise level to the axis along which solvers step: log(a / b) where x = a clean + b noise.

    ``flow``: a = 1 - sigma, b = sigma, as flow matching has it; else a = 1, b = sigma.
    """
    clean = max(1 - sigma, 0.0) if flow else 1.0
    if not clean or not sigma:
        return -FARTHEST if sigma else FARTHEST
    return float(np.clip(np.log(clean / sigma), -FARTHEST, FARTHEST))


def heun(times: Sequence[float], skipped: Sequence[float], at: float, before: float | None) -> list[float]:
    """Return the weights of a step along the mean of two slopes: of the last computed values, and of the last given.

    Source: FoCa (arXiv 2508.16211), its calibrator as cache-dit publishes it.

    Args:
        times: of the computed values. With ``before`` the second last one is no computed value but the forecast that
            was given right before the last computed one.
        skipped: times forecast since the last computed value, before ``at``.
        before: None: all values are computed. Otherwise the time of that forecast.
    """
    count = len(times)
    computed = [index for index in range(count) if before is None or index != count - 2]
    anchor = np.eye(count)[-1]
    if len(computed) < 2:
        return anchor.tolist()
    older = computed[-2]
    full = (anchor - np.eye(count)[older]) / (times[-1] - times[older])
    slope = (anchor - np.eye(count)[-2]) / (times[-1] - times[-2])
    latest, time = anchor, times[-1]
    for index, moment in enumerate([*skipped, at], start=1):
        value = anchor + (moment - times[-1]) * (full + slope) / 2
        if index > DAMPED_AFTER:
            share = DAMPED_AFTER / index
            value = share * value + (1 - share) * anchor
        slope, latest, time = (value - latest) / (moment - time), value, moment
    return latest.tolist()


def chebyshev(
    times: Sequence[float], at: float, order: int, span: tuple[float, float], ridge: float = RIDGE
) -> list[float]:
    """Return the weights of a Chebyshev polynomial fitted to all values by ridge regression, read at a time.

    Source: Spectrum (arXiv 2603.01623). Where we depart from it: the mean (degree 0) is not shrunk, and the degree is
    at most what the values determine.

    Args:
        span: the times of the run's two ends, which become -1 and 1.
        ridge: weight of the squared coefficients, per value.
    """
    first, last = span
    scaled = [2 * (time - first) / (last - first) - 1 if last != first else 0.0 for time in (*times, at)]
    degree = min(order, len(times) - 1)
    basis = np.polynomial.chebyshev.chebvander(np.array(scaled), degree)
    fitted, read = basis[:-1], basis[-1]
    penalty = ridge * len(times) * np.eye(degree + 1)
    penalty[0, 0] = 0.0
    return (read @ np.linalg.solve(fitted.T @ fitted + penalty, fitted.T)).tolist()
