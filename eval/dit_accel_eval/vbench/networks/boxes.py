"""Boxes in pictures: overlap, the best of those that overlap, and what a network sees within each.

Boxes are [N, 4], left, top, right and bottom in pixels. Sources: ROIAlign (He et al., arXiv 1703.06870) with samples at
most a cell apart, feature pyramids (Lin et al., arXiv 1612.03144), as detectron2 has them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

TOGETHER = 64
"""Boxes that are looked into at once."""

USUAL, LEVEL = 224, 4
"""Pixels of the side of a box that is looked into at stride 2 ** 4."""

FARTHEST = 62.5
"""How many times as large as a box what it moves to can be."""


def area(boxes: Tensor) -> Tensor:
    """Return the areas [N] of boxes, in pixels."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def overlap(box: Tensor, boxes: Tensor) -> Tensor:
    """Return the shares [N] that a box [4] and others have in common of what they cover together."""
    wide, high = (torch.minimum(box[at + 2], boxes[:, at + 2]) - torch.maximum(box[at], boxes[:, at]) for at in (0, 1))
    both = wide.clamp(min=0) * high.clamp(min=0)
    return both / (area(box[None]) + area(boxes) - both)


def best(boxes: Tensor, scores: Tensor, most: float) -> Tensor:
    """Return the places of boxes, best first, without those that overlap a better one by more than ``most``."""
    places, kept = scores.argsort(descending=True, stable=True), []
    while len(places):
        kept.append(places[0])
        others = places[1:]
        places = others[~(overlap(boxes[places[0]], boxes[others]) > most)]
    return torch.stack(kept) if kept else places


def clipped(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return boxes cut off at the edges of a picture of a height and width."""
    height, width = size
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))


def moved(boxes: Tensor, by: Tensor) -> Tensor:
    """Return boxes moved by [N, 4]: right and down by shares of their size, wider and higher by factors' logarithms."""
    size = boxes[:, 2:] - boxes[:, :2]
    middle = boxes[:, :2] + 0.5 * size + by[:, :2] * size
    half = 0.5 * by[:, 2:].clamp(max=torch.tensor(FARTHEST).log().item()).exp() * size
    return torch.cat([middle - half, middle + half], 1)


def looked_into(levels: Sequence[Tensor], strides: Sequence[int], boxes: Tensor, side: int) -> Tensor:
    """Return what is seen in boxes, [N, D, side, side], each at the level that suits its size.

    Args:
        levels: features [1, D, Y, X] of a picture, finest first.
        strides: pixels between their places, powers of 2.
        boxes: [N, 4] in pixels of the picture.
        side: cells of each box.
    """
    first, last = (stride.bit_length() - 1 for stride in (strides[0], strides[-1]))
    suits = (LEVEL + (area(boxes).sqrt() / USUAL + 1e-8).log2()).floor().clamp(first, last).long() - first
    found = boxes.new_zeros(len(boxes), levels[0].shape[1], side, side)
    for level, (seen, stride) in enumerate(zip(levels, strides, strict=True)):
        for places in (suits == level).nonzero()[:, 0].split(TOGETHER) if (suits == level).any() else ():
            found[places] = _cells(seen[0], boxes[places] / stride - 0.5, side)
    return found


def _cells(seen: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Return the means of cells of boxes, [N, D, side, side].

    What lies between places is linear in each direction apart, so a cell's mean is two sums over rows and columns.
    """
    down, right = (_shares(boxes[:, at], boxes[:, at + 2], seen.shape[2 - at], side) for at in (1, 0))
    return torch.einsum("npy,dyx,nqx->ndpq", down, seen, right)


def _shares(starts: Tensor, ends: Tensor, length: int, side: int) -> Tensor:
    """Return the shares of each of ``length`` places in each of ``side`` cells, [N, side, length]."""
    cell = (ends - starts) / side
    count = cell.ceil().clamp(min=0)
    steps = torch.arange(max(1, int(count.max())), device=starts.device)
    at = (steps + 0.5) / count.clamp(min=1)[:, None]  # [N, samples], within a cell
    at = starts[:, None, None] + (torch.arange(side, device=starts.device)[:, None] + at[:, None]) * cell[:, None, None]
    counts = (steps < count[:, None])[:, None] & (at >= -1) & (at <= length)
    near = at.clamp(0, length - 1)[..., None] - torch.arange(length, device=starts.device)
    shares = (1 - near.abs()).clamp(min=0) * counts[..., None]
    return shares.sum(2) / count.clamp(min=1)[:, None, None]
