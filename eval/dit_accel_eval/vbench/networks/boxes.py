"""Boxes in pictures: the best of those that overlap, and what a network sees within each, as detectron2 has them.

Boxes are [N, 4], left, top, right and bottom in pixels. Sources: ROIAlign (He et al., arXiv 1703.06870), feature
pyramids (Lin et al., arXiv 1612.03144); torchvision computes both.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

USUAL, LEVEL = 224, 4
"""Pixels of the side of a box that is looked into at stride 2 ** 4."""

FARTHEST = 62.5
"""How many times as large as a box what it moves to can be."""


def best(boxes: Tensor, scores: Tensor, most: float) -> Tensor:
    """Return the places of boxes, best first, without those that overlap a better one by more than ``most``."""
    from torchvision.ops import nms

    return nms(boxes, scores, most)


def clipped(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return boxes cut off at the edges of a picture of a height and width."""
    from torchvision.ops import clip_boxes_to_image

    return clip_boxes_to_image(boxes, size)


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
    from torchvision.ops import box_area, roi_align

    first, last = (stride.bit_length() - 1 for stride in (strides[0], strides[-1]))
    suits = (LEVEL + (box_area(boxes).sqrt() / USUAL + 1e-8).log2()).floor().clamp(first, last).long() - first
    found = boxes.new_zeros(len(boxes), levels[0].shape[1], side, side)
    for level, (seen, stride) in enumerate(zip(levels, strides, strict=True)):
        found[suits == level] = roi_align(seen, [boxes[suits == level]], side, 1 / stride, 0, aligned=True)
    return found
