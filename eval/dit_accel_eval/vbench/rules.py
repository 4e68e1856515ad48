"""VBench's rules: from what networks saw of a video to its score, with the official code's edges where they are.

Source: Huang et al., arXiv 2311.17982, as vbench 0.1.5 computes them.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dit_accel import ConfigError

from .sampling import Frames

Numbers = npt.NDArray[np.float64]

Flow = Callable[[Frames, Frames], Numbers]
"""From one frame to another, [2, height, width] in pixels."""

Box = Sequence[float]
"""Left, top, right, bottom, in pixels."""

COLORS = (
    "white", "red", "pink", "blue", "silver", "purple", "orange", "green", "gray", "yellow", "black", "grey",
)  # fmt: skip
"""Words that make a caption one about a colour; one that holds the word, as "bored" does, counts."""

SURE = 0.85
"""Probability from which one of the five likeliest actions counts."""

APART = 0.1
"""Overlap over union of two boxes below which they stand wholly beside each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoScore:
    """What a rule says of one video.

    Attributes:
        value: the score; whether it is so, where the rule only says that.
        parts: frames or pairs that it is the mean of, where the dimension weighs videos by those; else 1.
        more: further entries of the official result.
    """

    value: float | bool
    parts: int = 1
    more: dict[str, Any] = field(default_factory=dict)


def over_videos(scores: Sequence[VideoScore]) -> float:
    """Return the mean of videos' scores, each weighed by its parts."""
    return sum(float(one.value) * one.parts for one in scores) / sum(one.parts for one in scores)


def enough(frames: int, least: int, why: str) -> None:
    """Refuse a video of too few frames, with why."""
    if frames < least:
        raise ConfigError(f"it takes at least {least} frames{why}, and there are {frames}")


def consistency(features: Tensor) -> VideoScore:
    """Return the mean over pairs of half the likeness to the frame before and half that to the first.

    Args:
        features: [F, D] of unit length; likeness below 0 counts as 0.
    """
    enough(len(features), 2, "")
    before = (features[1:] * features[:-1]).sum(1).clamp(min=0)
    first = (features[1:] * features[0]).sum(1).clamp(min=0)
    value = float(((before + first) / 2).double().mean())
    pairs = len(features) - 1
    return VideoScore(value=value, parts=pairs, more={"video_sim": value * pairs, "cnt_per_video": pairs})


def flickering(frames: Frames) -> VideoScore:
    """Return one minus the mean absolute difference of neighbouring 8-bit frames over 255."""
    enough(len(frames), 2, "")
    levels = frames.astype(np.int16)
    changes = [float(np.abs(two - one).mean()) for one, two in itertools.pairwise(levels)]
    return VideoScore(value=(255 - float(np.mean(changes))) / 255)


def smoothness(frames: Frames, between: Callable[[Frames, Frames], Frames]) -> VideoScore:
    """Return one minus the mean absolute 8-bit difference over 255 of odd frames to those drawn between even ones.

    Of an even number of frames, the last has none behind it and is not looked at.

    Args:
        frames: uint8 [F, height, width, 3].
        between: draws the uint8 frame in the middle of two.
    """
    enough(len(frames), 3, "")
    changes = [
        float(np.abs(between(frames[at - 1], frames[at + 1]).astype(np.int16) - frames[at]).mean())
        for at in range(1, len(frames) - 1, 2)
    ]
    return VideoScore(value=(255 - float(np.mean(changes))) / 255)


def strongest(flow: Numbers, share: float) -> float:
    """Return the mean length of a share of a flow's vectors [2, height, width], the longest, rounded down."""
    lengths = np.sort(np.hypot(flow[0], flow[1]).ravel())
    count = int(len(lengths) * share)
    if count == 0:
        raise ConfigError(f"a flow of {len(lengths)} pixels has no strongest {share:.0%}; give larger frames")
    return float(lengths[-count:].mean())


def _on_256(pixels: float, frames: Frames) -> float:
    """Return a length that is so many pixels on frames whose short side is 256."""
    return pixels * min(frames.shape[1:3]) / 256


def _moved(frames: Frames, flow: Flow, share: float, least: float) -> Iterator[int]:
    """Give, pair by pair of neighbours, how many moved so far: the longest share of the flow by more than ``least``."""
    return itertools.accumulate(int(strongest(flow(*pair), share) > least) for pair in itertools.pairwise(frames))


def is_dynamic(frames: Frames, flow: Flow) -> VideoScore:
    """Return whether at least round(4 N / 16) of the pairs of N frames move by more than 6 pixels on 256.

    The official code calls any 2 frames a moving video, since round(0.5) is 0, and 1 frame a still one; both are
    refused here.

    Args:
        frames: about 8 a second.
        flow: from one frame to the other, [2, height, width] in pixels; its strongest 5 % count.
    """
    enough(len(frames), 3, " at about 8 a second")
    needed = round(4 * len(frames) / 16)
    return VideoScore(value=any(count >= needed for count in _moved(frames, flow, 0.05, _on_256(6, frames))))


def is_static(frames: Frames, flow: Flow) -> bool:
    """Return whether a video stands still: at most K = round(2 N / 16) pairs may move by more than T = 3 pixels on 256.

    The first frame and the last may lie 2 K T apart, either way. Of up to 4 frames K is 0, and not even a rounding
    error would pass; those are refused.

    Args:
        frames: all.
        flow: from one frame to the other, [2, height, width] in pixels; its strongest 2 % count.
    """
    enough(len(frames), 5, " for the static filter")
    least, allowed = _on_256(3, frames), round(2 * len(frames) / 16)
    if any(count > allowed for count in _moved(frames, flow, 0.02, least)):
        return False
    ends = ((frames[0], frames[-1]), (frames[-1], frames[0]))
    return all(strongest(flow(*pair), 0.02) <= 2 * allowed * least for pair in ends)


def likeness(texts: Tensor, frames: Tensor) -> VideoScore:
    """Return the mean cosine of a text's embedding [1, D] with those of frames [F, D], all of unit length."""
    found = (frames @ texts[0]).double().tolist()
    value = float(np.mean(found))
    return VideoScore(value=value, parts=len(found), more={"frame_results": found, "cur_sim": found[-1]})


def share(frames: Iterable[bool]) -> VideoScore:
    """Return the share of frames of which something is so."""
    found = list(frames)
    more = {"success_frame_count": sum(found), "frame_count": len(found)}
    return VideoScore(value=sum(found) / len(found), parts=len(found), more=more)


def shows(detected: Sequence[Iterable[str]], requested: str) -> VideoScore:
    """Return the share of frames in which all objects are detected that ``a and b`` asks for."""
    wanted = {one.strip() for one in requested.split(" and ")}
    return share(wanted <= set(names) for names in detected)


def is_scene(captions: Sequence[str], requested: str) -> VideoScore:
    """Return the share of frames whose caption holds every word of a scene, within words as well."""
    return share(all(word in caption for word in requested.split(" ")) for caption in captions)


def is_action(actions: Iterable[tuple[str, float]], file_name: str) -> VideoScore:
    """Return whether one of the five likeliest actions is at least .85 likely and is the one that the file's name says.

    The name's action ends at its first hyphen or underscore, as in the official code.

    Args:
        actions: names, in small letters, with probabilities.
        file_name: such as ``A person is riding a bike-0.mp4``.
    """
    requested = file_name.lower().split("-")[0].split("person is ")[-1].split("_")[0]
    five = sorted(actions, key=lambda one: -one[1])[:5]
    found = any(name == requested and round(probability, 4) >= SURE for name, probability in five)
    return VideoScore(value=found, more={"cor_num_per_video": int(found)})


def is_colored(
    captions: Sequence[Sequence[tuple[str, str]]], prompt: str, color: str, words: Sequence[str] = COLORS
) -> VideoScore | None:
    """Return the frames that call an object by a colour, over those that call it by any; None where none does.

    Args:
        captions: by frame, (caption, object) of what is there.
        prompt: such as ``a red umbrella``; less articles and colour, it is the object.
        color: the one that is asked for.
        words: the colours that there are.
    """
    thing = prompt.replace("a ", "").replace("an ", "").replace(color, "").strip()
    mine = [[text for text, name in frame if name == thing] for frame in captions]
    of_any = sum(any(word in text for text in frame for word in words) for frame in mine)
    if of_any == 0:
        return None
    right = sum(any(color in text for text in frame) for frame in mine)
    return VideoScore(value=right / of_any, more={"cur_success_frame_rate": right / of_any})


def stands(frames: Sequence[Sequence[tuple[str, Box]]], one: str, other: str, relation: str) -> VideoScore:
    """Return the mean over frames of how well the best pair of two objects' boxes stands as asked.

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
    return VideoScore(value=float(np.mean(found)), parts=len(found), more={"frame_results": found})


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
