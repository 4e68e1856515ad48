"""Inception v3 as FID asks it, as a function of its published weights.

Szegedy et al., arXiv 1512.00567, in the form of 2015-12-05 that FID's first code downloaded (Heusel et al. 2017), by
the names of pytorch-fid's file. It differs from later ones: averages next to an edge leave the padding out, and the
last block takes the maximum there.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]

SIDE = 299
"""Pixels to which frames are brought."""

EPS = 1e-3

_FIVES = ("branch1x1", "branch5x5_1 branch5x5_2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3")
_SEVENS = ("branch1x1", "branch7x7_1 branch7x7_2 branch7x7_3",
           "branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5")  # fmt: skip

BLOCKS = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), _FIVES),
    "Mixed_6a": ("branch3x3", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3"),
    **dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), _SEVENS),
    "Mixed_7a": ("branch3x3_1 branch3x3_2", "branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4"),
}
"""Blocks -> the convolutions of their branches, one after the other; a pool is a further branch of each."""

HALVING = ("Mixed_6a", "Mixed_7a")
"""Blocks whose branches end in a stride of 2."""


def inception(frames: Tensor, weights: Weights) -> Tensor:
    """Return the features [F, 2048] of frames [F, 3, height, width] in [0, 1], of any size: means over places."""
    x = 2 * F.interpolate(frames, size=(SIDE, SIDE), mode="bilinear", align_corners=False) - 1
    x = _convolved(_convolved(x, weights, "Conv2d_1a_3x3", 2), weights, "Conv2d_2a_3x3", padded=False)
    x = F.max_pool2d(_convolved(x, weights, "Conv2d_2b_3x3"), 3, 2)
    x = _convolved(_convolved(x, weights, "Conv2d_3b_1x1"), weights, "Conv2d_4a_3x3", padded=False)
    x = F.max_pool2d(x, 3, 2)
    for at, branches in BLOCKS.items():
        stride = 2 if at in HALVING else 1
        found = [_chain(x, weights, at, *branch.split(), stride=stride) for branch in branches]
        last = F.max_pool2d(x, 3, 2) if at in HALVING else _chain(average(x), weights, at, "branch_pool")
        x = torch.cat([*found, last], 1)
    x = _wide(x, weights, "Mixed_7b", average(x))
    return _wide(x, weights, "Mixed_7c", F.max_pool2d(x, 3, 1, 1)).mean((2, 3))


def average(x: Tensor) -> Tensor:
    """Return the mean of each place's 3 x 3 neighbours, those within the frame."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _convolved(x: Tensor, weights: Weights, name: str, stride: int = 1, *, padded: bool = True) -> Tensor:
    """Return a convolution without bias, normalized, with ReLU; at a stride of 1 it may be padded to keep the size."""
    kernel = weights[f"{name}.conv.weight"]
    padding = [length // 2 for length in kernel.shape[2:]] if padded and stride == 1 else 0
    x = F.conv2d(x, kernel, None, stride, padding)
    running = (weights[f"{name}.bn.running_mean"], weights[f"{name}.bn.running_var"])
    return F.relu(F.batch_norm(x, *running, weights[f"{name}.bn.weight"], weights[f"{name}.bn.bias"], eps=EPS))


def _chain(x: Tensor, weights: Weights, at: str, *names: str, stride: int = 1) -> Tensor:
    """Return convolutions one after the other, the last one with a stride."""
    for name in names:
        x = _convolved(x, weights, f"{at}.{name}", stride if name == names[-1] else 1)
    return x


def _wide(x: Tensor, weights: Weights, at: str, pooled: Tensor) -> Tensor:
    found = [_chain(x, weights, at, "branch1x1")]
    for *shared, last in (("branch3x3_1", "branch3x3_2"), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")):
        inner = _chain(x, weights, at, *shared)
        found += [_chain(inner, weights, at, f"{last}{side}") for side in "ab"]
    return torch.cat([*found, _chain(pooled, weights, at, "branch_pool")], 1)
