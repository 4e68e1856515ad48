"""Inception v3 as FID asks it, as a function of its published weights.

Szegedy et al., arXiv 1512.00567, in the form of 2015-12-05 that FID's first code downloaded (Heusel et al. 2017), by
the names of pytorch-fid's file. It differs from later ones: averages next to an edge leave the padding out, and the
last block takes the maximum there.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]

SIDE = 299
"""Pixels to which frames are brought."""

EPS = 1e-3

Pool = Callable[[Tensor], Tensor]


def inception(frames: Tensor, weights: Weights) -> Tensor:
    """Return the features of frames, [F, 2048]: the mean over places of the last block.

    Args:
        frames: [F, 3, height, width] in [0, 1], of any size.
        weights: of the checkpoint.
    """
    x = 2 * F.interpolate(frames, size=(SIDE, SIDE), mode="bilinear", align_corners=False) - 1
    for name, stride, padding in (("Conv2d_1a_3x3", 2, 0), ("Conv2d_2a_3x3", 1, 0), ("Conv2d_2b_3x3", 1, 1)):
        x = _convolved(x, weights, name, stride, padding)
    x = F.max_pool2d(x, 3, 2)
    x = _convolved(x, weights, "Conv2d_3b_1x1")
    x = F.max_pool2d(_convolved(x, weights, "Conv2d_4a_3x3"), 3, 2)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = _fives(x, weights, name)
    x = _first_fall(x, weights, "Mixed_6a")
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = _sevens(x, weights, name)
    x = _second_fall(x, weights, "Mixed_7a")
    x = _wide(x, weights, "Mixed_7b", average)
    x = _wide(x, weights, "Mixed_7c", lambda inner: F.max_pool2d(inner, 3, 1, 1))
    return x.mean((2, 3))


def average(x: Tensor) -> Tensor:
    """Return the mean of each place's 3 x 3 neighbours, those within the frame."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _convolved(x: Tensor, weights: Weights, name: str, stride: int = 1, padding: int | tuple[int, int] = 0) -> Tensor:
    """Return a convolution without bias, normalized, with ReLU."""
    x = F.conv2d(x, weights[f"{name}.conv.weight"], None, stride, padding)
    running = (weights[f"{name}.bn.running_mean"], weights[f"{name}.bn.running_var"])
    return F.relu(F.batch_norm(x, *running, weights[f"{name}.bn.weight"], weights[f"{name}.bn.bias"], eps=EPS))


def _chain(x: Tensor, weights: Weights, at: str, *parts: tuple[str, int, int | tuple[int, int]]) -> Tensor:
    """Return convolutions one after the other: (name, stride, padding) of each."""
    for name, stride, padding in parts:
        x = _convolved(x, weights, f"{at}.{name}", stride, padding)
    return x


def _fives(x: Tensor, weights: Weights, at: str) -> Tensor:
    doubled = (("branch3x3dbl_1", 1, 0), ("branch3x3dbl_2", 1, 1), ("branch3x3dbl_3", 1, 1))
    return torch.cat([
        _chain(x, weights, at, ("branch1x1", 1, 0)),
        _chain(x, weights, at, ("branch5x5_1", 1, 0), ("branch5x5_2", 1, 2)),
        _chain(x, weights, at, *doubled),
        _chain(average(x), weights, at, ("branch_pool", 1, 0)),
    ], 1)  # fmt: skip


def _first_fall(x: Tensor, weights: Weights, at: str) -> Tensor:
    doubled = (("branch3x3dbl_1", 1, 0), ("branch3x3dbl_2", 1, 1), ("branch3x3dbl_3", 2, 0))
    branches = [_chain(x, weights, at, ("branch3x3", 2, 0)), _chain(x, weights, at, *doubled)]
    return torch.cat([*branches, F.max_pool2d(x, 3, 2)], 1)


def _sevens(x: Tensor, weights: Weights, at: str) -> Tensor:
    across, down = (0, 3), (3, 0)
    doubled = (("branch7x7dbl_1", 1, 0), ("branch7x7dbl_2", 1, down), ("branch7x7dbl_3", 1, across),
               ("branch7x7dbl_4", 1, down), ("branch7x7dbl_5", 1, across))  # fmt: skip
    return torch.cat([
        _chain(x, weights, at, ("branch1x1", 1, 0)),
        _chain(x, weights, at, ("branch7x7_1", 1, 0), ("branch7x7_2", 1, across), ("branch7x7_3", 1, down)),
        _chain(x, weights, at, *doubled),
        _chain(average(x), weights, at, ("branch_pool", 1, 0)),
    ], 1)  # fmt: skip


def _second_fall(x: Tensor, weights: Weights, at: str) -> Tensor:
    sevens = (("branch7x7x3_1", 1, 0), ("branch7x7x3_2", 1, (0, 3)), ("branch7x7x3_3", 1, (3, 0)),
              ("branch7x7x3_4", 2, 0))  # fmt: skip
    branches = [
        _chain(x, weights, at, ("branch3x3_1", 1, 0), ("branch3x3_2", 2, 0)),
        _chain(x, weights, at, *sevens),
    ]
    return torch.cat([*branches, F.max_pool2d(x, 3, 2)], 1)


def _wide(x: Tensor, weights: Weights, at: str, pool: Pool) -> Tensor:
    three = _chain(x, weights, at, ("branch3x3_1", 1, 0))
    doubled = _chain(x, weights, at, ("branch3x3dbl_1", 1, 0), ("branch3x3dbl_2", 1, 1))
    return torch.cat([
        _chain(x, weights, at, ("branch1x1", 1, 0)),
        _chain(three, weights, at, ("branch3x3_2a", 1, (0, 1))),
        _chain(three, weights, at, ("branch3x3_2b", 1, (1, 0))),
        _chain(doubled, weights, at, ("branch3x3dbl_3a", 1, (0, 1))),
        _chain(doubled, weights, at, ("branch3x3dbl_3b", 1, (1, 0))),
        _chain(pool(x), weights, at, ("branch_pool", 1, 0)),
    ], 1)  # fmt: skip
