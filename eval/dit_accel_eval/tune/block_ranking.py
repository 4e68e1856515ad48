"""Which blocks a profile lets be cached, and how far two profiles agree."""

import itertools
from collections.abc import Sequence

import numpy as np


def foreground_ratio(received: np.ndarray, foreground: np.ndarray) -> float:
    """Return the share of the foreground's tokens that receive more attention than the mean token, mean over frames.

    Source: ProfilingDiT (arXiv 2504.03140), whose threshold is not published: here it is the mean.

    Args:
        received: attention received by token, [F, ...].
        foreground: bool of the same shape; frames without any foreground are left out.

    Returns:
        Not a number where there is no foreground.
    """
    high, own = received > received.mean(), foreground.reshape(len(foreground), -1)
    counts = own.sum(1)
    both = (high.reshape(own.shape) & own).sum(1)
    return float((both[counts > 0] / counts[counts > 0]).mean()) if counts.any() else float("nan")


def cached_blocks(
    scores: Sequence[float], threshold: float | None = None, count: int | None = None
) -> tuple[list[int], float]:
    """Return the blocks of low scores, rising by number, and the threshold that splits them off.

    Args:
        scores: one a block; one that is not a number is never cached.
        threshold: blocks below it; None, and no ``count``: those below the largest gap between neighbouring scores.
        count: so many of the lowest, instead.
    """
    known = [(score, block) for block, score in enumerate(scores) if score == score]
    known.sort()
    if threshold is None:
        if count is None:
            gaps = [two[0] - one[0] for one, two in itertools.pairwise(known)]
            count = 1 + int(np.argmax(gaps)) if gaps else 0
        low = known[:count]
        edges = [one[0] for one in known[max(count - 1, 0) : count + 1]] or [0.0]
        return sorted(block for _, block in low), float(np.mean(edges))
    return sorted(block for score, block in known if score < threshold), threshold
