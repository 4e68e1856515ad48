"""Distances between two sets of frames by their features: Frechet's and the kernel distance.

Sources: FID, Heusel et al. 2017; KID, Binkowski et al. 2018. Both take Inception's features, which no package ships;
here they are EfficientNet-Lite0's, so no figure can be held against a published one.
"""

from collections.abc import Callable

import torch
from torch import Tensor

ENOUGH = 2048
"""Frames below which Frechet's distance is well above that of many: it estimates 1280 x 1280 covariances."""


def frechet(one: Tensor, two: Tensor) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of features [n, d] and [m, d], two or more each."""
    means = (one.double().mean(0) - two.double().mean(0)).square().sum()
    first, second = _spread(one), _spread(two)
    root = torch.linalg.svdvals(first @ second.T).sum()  # the trace of (C1 C2)^(1/2), for C = spread^T spread
    return float((means + first.square().sum() + second.square().sum() - 2 * root).clamp(min=0))


def _spread(features: Tensor) -> Tensor:
    """Return a matrix [at most d, d] whose square is the covariance of features [n, d]."""
    away = (features.double() - features.double().mean(0)) / (len(features) - 1) ** 0.5
    return torch.linalg.qr(away).R if len(away) > away.shape[1] else away


def kernel(one: Tensor, two: Tensor) -> float:
    """Return the unbiased squared distance by the kernel (x.y / d + 1)^3 of features [n, d] and [m, d].

    It may be below 0 for sets as alike as two draws of one.
    """
    one, two = one.double(), two.double()

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def others(x: Tensor) -> Tensor:
        whole = inner(x, x)
        return (whole.sum() - whole.trace()) / (len(x) * (len(x) - 1))

    return float(others(one) + others(two) - 2 * inner(one, two).mean())


SETS: dict[str, Callable[[Tensor, Tensor], float]] = {"fid@efflite0": frechet, "kid@efflite0": kernel}
"""Distance of two folders' frames -> how it is computed from their features."""
