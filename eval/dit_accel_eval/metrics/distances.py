"""Distances of two sets of frames by Inception's features: FID (Heusel et al. 2017), KID (Binkowski et al. 2018)."""

from typing import Any

import torch
from dit_accel_pipelines.generation.media import to_uint8

from dit_accel import ConfigError
from dit_accel.errors import install

from .metric import Clip

SETS = ("fid@inception", "kid@inception")  # of two folders' frames, by torchmetrics and torch-fidelity's network
ENOUGH = 2048  # frames below which FID is well above that of many: it estimates 2048 x 2048 covariances
TOGETHER = 32  # frames that go through the network at once


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
        for part in frames.split(TOGETHER):
            self._metric.update(part.to(self._metric.device), real=real)

    def value(self) -> float:
        """Return the distance; refuses sets of fewer than 2 frames."""
        if (fewest := min(self._counts)) < 2:
            raise ConfigError(f"{self.name} takes 2 frames of each set, and there are {fewest}; add clips")
        self._metric.subset_size = min(1000, fewest)  # KID is the mean over a hundred subsets
        value = self._metric.compute()
        return float(value[0] if isinstance(value, tuple) else value)
