"""VBench's rules of what was detected in a video, as vbench 0.1.5 has them, with the edges of the official code.

Source: Huang et al., arXiv 2311.17982.
"""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from dit_accel import ConfigError

Box = Sequence[float]
"""Left, top, right, bottom, in pixels."""

APART = 0.1
"""Overlap over union of two boxes below which they stand wholly beside each other."""


def middle(total: int, count: int) -> list[int]:
    """Return the places of ``count`` frames of ``total``: the middles of as many equal stretches.

    Of fewer frames all are taken, and the last one again and again.
    """
    edges = np.linspace(0, total, min(count, total) + 1).astype(int)
    places = [int(first + end - 1) // 2 for first, end in itertools.pairwise(edges)]
    return places + [places[-1]] * (count - len(places))


def share(frames: Iterable[bool]) -> float:
    """Return the share of frames of which something is so."""
    return float(np.mean(list(frames)))


def shows(detected: Sequence[Iterable[str]], requested: str) -> float:
    """Return the share of frames in which all objects are detected that ``a and b`` asks for."""
    wanted = {one.strip() for one in requested.split(" and ")}
    return share(wanted <= set(names) for names in detected)


def is_colored(
    captions: Sequence[Sequence[tuple[str, str]]], thing: str, color: str, words: Sequence[str]
) -> float | None:
    """Return the frames that call an object by a colour, over those that call it by any; None where none does.

    Args:
        captions: by frame, (caption, object) of what is there.
        thing: the object.
        color: the one that is requested.
        words: the colours that there are; a caption that holds one within another word counts.
    """
    mine = [[text for text, name in frame if name == thing] for frame in captions]
    of_any = sum(any(word in text for text in frame for word in words) for frame in mine)
    return sum(any(color in text for text in frame) for frame in mine) / of_any if of_any else None


def stands(frames: Sequence[Sequence[tuple[str, Box]]], one: str, other: str, relation: str) -> float:
    """Return the mean over frames of how well the best pair of two objects' boxes stands as requested.

    As in the official code, left is as good as right and above as below, and two of the one object are a pair.

    Args:
        frames: by frame, (object, box).
        one: an object.
        other: the other.
        relation: ``on the left of``, ``on the right of``, ``on the top of`` or ``on the bottom of``.
    """
    found = []
    for seen in frames:
        boxes = [box for name, box in seen if name in (one, other)]
        pairs = [(boxes[i], boxes[j]) for j in range(len(boxes)) for i in range(j)]
        found.append(max((beside(*pair, relation) for pair in pairs), default=0.0))
    return float(np.mean(found))


def beside(one: Box, other: Box, relation: str) -> float:
    """Return how well two boxes stand beside or above each other: 1, or less where they overlap, 0 on the other axis.

    Raises:
        ConfigError: for an unknown relation, or boxes without area.
    """
    x, y = (abs(other[at] + other[at + 2] - one[at] - one[at + 2]) / 2 for at in (0, 1))
    if relation in ("on the right of", "on the left of"):
        right_way = x > y
    elif relation in ("on the bottom of", "on the top of"):
        right_way = y > x
    else:
        raise ConfigError(f"relation {relation!r} is none of VBench's; use on the left, right, top or bottom of")
    wide, high = (max(0.0, min(one[at + 2], other[at + 2]) - max(one[at], other[at])) for at in (0, 1))
    both = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - wide * high
    if both <= 0:
        raise ConfigError(f"boxes must have an area, got {list(one)} and {list(other)}")
    overlap = wide * high / both
    if not right_way:
        return 0.0
    return 1.0 if overlap < APART else APART / overlap
