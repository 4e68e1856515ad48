"""What networks that run elsewhere saw of videos: GRiT's detections and captions, Tag2Text's captions, UMT's actions.

Where the official code has run, with its detectron2 and a transformers of 2023, what it saw can be brought instead of
the weights, one JSON line a video::

    {"video": "a cat and a dog-0.mp4", "by": "GRiT grit_b_densecap_objectdet.pth",
     "detections": [[["cat", [3, 4, 60, 70]], ...], ...]}     # by frame: object and box
    {"video": "a red car-0.mp4", "by": "...", "captions": [[["a red car", "car"], ...], ...]}   # caption and object
    {"video": "alley-0.mp4", "by": "...", "scenes": ["an alley at night", ...]}                 # one caption a frame
    {"video": "A person is riding a bike-0.mp4", "by": "...", "actions": [["riding a bike", 0.97], ...]}

of the 16 frames that `sampling.middle` names.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_accel import ConfigError

from ..runs.results import read_lines

SEEN = 16
"""Frames that are looked at."""

KINDS = {"object_class": "detections", "multiple_objects": "detections", "spatial_relationship": "detections",
         "color": "captions", "scene": "scenes", "human_action": "actions"}  # fmt: skip
"""Dimension -> what it takes."""

BY = {"detections": "GRiT", "captions": "GRiT", "scenes": "Tag2Text", "actions": "UMT"}


@dataclass(frozen=True, slots=True)
class Observations:
    """What was seen: kind -> file name -> what, and kind -> the networks that saw it."""

    seen: dict[str, dict[str, Any]] = field(default_factory=dict)
    by: dict[str, set[str]] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether anything was seen of what a dimension takes."""
        return bool(self.seen.get(KINDS.get(name, ""), {}))

    def of(self, name: str, video: str) -> Any:
        """Return what a dimension takes of a video; one of which nothing was seen is refused."""
        kind = KINDS[name]
        found = self.seen.get(kind, {}).get(video)
        if found is None:
            raise ConfigError(f"no {kind} of {video!r} were observed, by {BY[kind]}; add its line to the observations")
        return found


def read_observations(path: Path | None) -> Observations:
    """Return the observations of a file, none without one.

    Raises:
        ConfigError: for a line of another form, by number.
    """
    found = Observations()
    if path is None:
        return found
    if not path.is_file():
        raise ConfigError(f"there is no file {path} of observations; name JSON lines, one a video")
    for number, line in enumerate(read_lines(path), 1):
        where = f"line {number} of {path}"
        if not isinstance(line, dict) or not all(isinstance(line.get(key), str) for key in ("video", "by")):
            raise ConfigError(f"{where} must name its video and by what network it was seen (by)")
        kinds = [kind for kind in BY if kind in line]
        if not kinds:
            raise ConfigError(f"{where} has none of {', '.join(BY)}")
        for kind in kinds:
            _check(kind, line[kind], where)
            kept = found.seen.setdefault(kind, {})
            if line["video"] in kept:
                raise ConfigError(f"{where} gives {kind} of {line['video']!r} again; leave one line out")
            kept[line["video"]] = line[kind]
            found.by.setdefault(kind, set()).add(line["by"])
    return found


def _check(kind: str, held: Any, where: str) -> None:
    """Refuse what is not of its kind's form."""
    if kind == "actions":
        good = isinstance(held, list) and bool(held) and all(_pair(one, str, (int, float)) for one in held)
    elif not isinstance(held, list) or len(held) != SEEN:
        count = len(held) if isinstance(held, list) else type(held).__name__
        raise ConfigError(f"{where} must give {kind} of {SEEN} frames, got {count}")
    elif kind == "scenes":
        good = all(isinstance(one, str) for one in held)
    else:
        second = str if kind == "captions" else list
        good = all(isinstance(frame, list) and all(_pair(one, str, second) for one in frame) for frame in held)
        good = good and (second is str or all(_box(one[1]) for frame in held for one in frame))
    if not good:
        raise ConfigError(f"{where} has {kind} of another form, {json.dumps(held)[:60]}; see eval vbench in the docs")


def _pair(one: Any, first: type, second: type | tuple[type, ...]) -> bool:
    return isinstance(one, list) and len(one) == 2 and isinstance(one[0], first) and isinstance(one[1], second)


def _box(box: list[Any]) -> bool:
    return len(box) == 4 and all(isinstance(one, (int, float)) for one in box) and box[0] < box[2] and box[1] < box[3]
