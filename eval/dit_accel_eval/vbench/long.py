"""VBench-Long: videos cut into clips, a score a clip, a video's score their mean.

As the official code scores them without its ``--dev_flag``: consistency within clips alone. With that flag it takes the
likeness of the clips' first frames in as well, by tables and weights that its package does not hold, of which published
versions disagree; they are read from one's own copy (`Fast`). Source: vbench2_beta_long of vbench 0.1.5.
"""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dit_accel import ConfigError

from . import rules, sampling
from .measures import flow_by
from .networks.loading import Networks
from .prompts import FLICKERING
from .rules import Flow, VideoScore
from .sampling import Video

SHORT, LONG = 2, 10
"""Seconds of a clip: usually, and for dimensions whose networks were trained on longer ones."""

LONGER = ("human_action", "temporal_style", "overall_consistency")
"""Those dimensions. A video's clips are as long as the longest of all that its prompt serves."""

SUBJECT, BACKGROUND = "subject_consistency", "background_consistency"

TABLE, WEIGHTS = "subject_mapping_table.yaml", "slow_fast_params.yaml"
"""Files of the folder vbench2_beta_long/configs in VBench's repository."""

Measure = Callable[[Video], VideoScore | None]


def seconds_of(dimensions: Collection[str]) -> int:
    """Return how many seconds a clip lasts of a video whose prompt serves these dimensions."""
    return LONG if set(dimensions) & set(LONGER) else SHORT


def clips_of(video: Video, seconds: int) -> list[Video]:
    """Return the clips of a video; the last one reaches back into the one before where frames are left over.

    The rate is cut off to a whole number of 1 or more, as in the official code, which stores the clips as mp4 in
    between; here their frames are the video's own. A video shorter than a clip is one.
    """
    rate = int(video.fps)
    if rate < 1:
        raise ConfigError(f"clips of whole seconds take 1 frame a second and more, and there are {video.fps:g}")
    count, total = rate * seconds, len(video.frames)
    starts = list(range(0, total - count + 1, count)) or [0]
    if total > count and total % count:
        starts.append(total - count)
    return [Video(name=video.name, frames=video.frames[at : at + count], fps=rate) for at in starts]


def long_score(name: str, video: Video, seconds: int, measure: Measure, flow: Flow | None = None) -> VideoScore | None:
    """Return the mean over a video's clips of a measure; None where it says nothing of any.

    Args:
        name: the dimension.
        video: the long one.
        seconds: of a clip.
        measure: of a clip; one that can't be measured is named by its place.
        flow: for temporal flickering, by which clips that don't stand still are left out; None: none are.
    """
    found = []
    for place, clip in enumerate(clips_of(video, seconds)):
        try:
            if name == FLICKERING and flow is not None and not rules.is_static(clip.frames, flow):
                continue
            score = measure(clip)
        except ConfigError as error:
            raise ConfigError(f"clip {place} of {seconds} s: {error}") from None
        if score is not None:
            found.append(float(score.value))
    return VideoScore(value=float(np.mean(found)), more={"clip_results": found}) if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fast:
    """What the fast branch of subject consistency takes.

    Attributes:
        table: likeness of first frames -> the same on the scale of that within clips.
        within: weight of consistency within clips.
        between: weight of that between them.
    """

    table: Mapping[float, float]
    within: float
    between: float

    @property
    def fingerprint(self) -> str:
        """12 hexadecimal digits that tell these constants from others."""
        held = [sorted(self.table.items()), self.within, self.between]
        return hashlib.sha256(json.dumps(held).encode()).hexdigest()[:12]

    def fused(self, within: VideoScore, between: float | None) -> VideoScore:
        """Return a video's score of both; that within clips where there is but one.

        As in the official code a likeness that the table maps to 0 does not count either.
        """
        if between is None:
            return within
        mapped = self.mapped(between)
        value = float(within.value) if mapped == 0 else self.within * float(within.value) + self.between * mapped
        more = {"inclip_score": within.value, "clip2clip_score": between, "mapped_clip2clip_score": mapped}
        return VideoScore(value=value, more=within.more | more)

    def mapped(self, likeness: float) -> float:
        """Return a likeness by the table, linear between its entries, held beyond its ends."""
        known = sorted(self.table)
        place = bisect_left(known, likeness)
        if place in (0, len(known)):
            return self.table[known[min(place, len(known) - 1)]]
        low, high = known[place - 1 : place + 1]
        share = (likeness - low) / (high - low)
        return self.table[low] + share * (self.table[high] - self.table[low])


def first_frames(video: Video, seconds: int, networks: Networks) -> float | None:
    """Return the consistency of the clips' first frames by DINOv2; None for a single clip."""
    clips = clips_of(video, seconds)
    if len(clips) == 1:
        return None
    firsts = np.stack([clip.frames[0] for clip in clips])
    return float(rules.consistency(networks.dinov2(sampling.for_dinov2(firsts))).value)


def read_fast(folder: Path) -> Fast:
    """Return the table and the weights of one's copy of VBench's ``vbench2_beta_long/configs``; others are refused."""
    table, weights = _numbers(folder / TABLE), _numbers(folder / WEIGHTS)
    missing = [name for name in ("w_inclip_sb", "w_clip2clip_sb") if name not in weights]
    if missing:
        raise ConfigError(f"{folder / WEIGHTS} has no {missing[0]}; take VBench's file of that name")
    try:
        points = {float(key): value for key, value in table.items()}
    except ValueError as error:
        raise ConfigError(f"{folder / TABLE} must map numbers to numbers ({error}); take VBench's file") from None
    if len(points) < 2:
        raise ConfigError(f"{folder / TABLE} maps {len(points)} numbers, and 2 are the least; take VBench's file")
    return Fast(table=points, within=weights["w_inclip_sb"], between=weights["w_clip2clip_sb"])


def _numbers(path: Path) -> dict[str, float]:
    """Return a file's lines ``key: number``."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        pairs: Sequence[tuple[str, str, str]] = [line.partition(":") for line in lines if line.strip()]
        return {key.strip(): float(value) for key, _, value in pairs}
    except OSError as error:
        raise ConfigError(
            f"{path} can't be read: {error.strerror}; name a copy of vbench2_beta_long/configs of VBench's repository"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path} must hold lines 'key: number' ({error}); take VBench's file") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Long:
    """How long videos are cut and scored.

    Attributes:
        custom: whether they are of prompts of one's own, whose clips all last 2 seconds.
        filtered: whether temporal flickering's clips all stand still.
        fast: the fast branch of subject consistency; None: consistency within clips alone.
    """

    custom: bool = False
    filtered: bool = False
    fast: Fast | None = None

    def options_text(self, name: str) -> dict[str, str]:
        """Return what a dimension's scores rest on besides networks."""
        clips = "clips that stand still" if name == FLICKERING and not self.filtered else "clips"
        if name != SUBJECT or self.fast is None:
            return {"long": clips}
        return {"long": f"{clips} and between them by {self.fast.fingerprint}"}

    def score(
        self, name: str, video: Video, dimensions: Collection[str], measure: Measure, networks: Networks
    ) -> VideoScore | None:
        """Return a video's score of its clips'; None where the measure says nothing of any.

        ``dimensions`` are all that the video's prompt serves; networks are for RAFT's filter and the fast branch.
        """
        seconds = SHORT if self.custom else seconds_of(dimensions)
        flow = flow_by(networks) if name == FLICKERING and not self.filtered else None
        found = long_score(name, video, seconds, measure, flow)
        if found is None or name != SUBJECT or self.fast is None:
            return found
        return self.fast.fused(found, first_frames(video, seconds, networks))
