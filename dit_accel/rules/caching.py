"""What calibrated step caches compare with their thresholds: MagCache's drift and TeaCache's rescaled change."""

from collections.abc import Sequence

import numpy as np


def resampled(ratios: Sequence[float], steps: int) -> tuple[float, ...]:
    """Return ratios from step to step, measured in a run of other length, for a run of ``steps``.

    Their cumulative logarithm is interpolated over the share of the run that lies behind a step, and goes on beyond the
    last one as it ended: a step that is twice as long has the product of both ratios.

    ``ratios``: one for each step of the run that was measured, from the step before it to it; the first is 1.
    """
    count = len(ratios)
    if steps == count:
        return tuple(ratios)
    sums = np.cumsum(np.log(ratios))
    sums = np.append(sums, sums[-1] + (sums[-1] - sums[-2] if count > 1 else 0.0))
    at = np.interp(np.arange(steps) / steps, np.arange(count + 1) / count, sums)
    return tuple(np.exp(np.diff(at, prepend=0.0)).tolist())


def size_drift(ratios: Sequence[float], index: int, in_a_row: int) -> float:
    """Return MagCache's error of skipping a step and those before it: the sum of how far the size is off in each.

    Source: MagCache (arXiv 2506.09045).

    Args:
        ratios: size of what is stored over that of the step before, one for each step of the run.
        in_a_row: steps right before it that were skipped.
    """
    return float(np.abs(1 - np.cumprod(ratios[index - in_a_row : index + 1])).sum())


def rescaled(polynomial: Sequence[float], change: float) -> float:
    """Predict the output's change where TeaCache's signal changed by ``change``; at least 0.

    Source: TeaCache (arXiv 2411.19108). Where we depart from it: a published polynomial that falls below 0 outside the
    range it was fitted on would lower the sum; here it is 0 there.

    ``polynomial``: its coefficients, the highest power first.
    """
    return max(float(np.polyval(polynomial, change)), 0.0)
