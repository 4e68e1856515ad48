"""How each of VBench's dimensions is measured: which frames, by which networks, by which rule."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import official, rules, sampling
from .networks.loading import Networks
from .observations import BY, KINDS, SEEN, Observations
from .prompts import Prompt
from .rules import Numbers, VideoScore
from .sampling import Frames, Video


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What measures need besides the video: networks, and observations by networks that ran elsewhere."""

    networks: Networks
    observations: Observations = field(default_factory=Observations)


Measure = Callable[[Video, Prompt, Means], VideoScore | None]


def _subject(video: Video, prompt: Prompt, means: Means) -> VideoScore:
    return rules.consistency(means.networks.dino(sampling.for_dino(video.frames)))


def _background(video: Video, prompt: Prompt, means: Means) -> VideoScore:
    return rules.consistency(means.networks.clip("clip-b32", sampling.for_clip(video.frames)))


def _flickering(video: Video, prompt: Prompt, means: Means) -> VideoScore:
    return rules.flickering(video.frames)


def _smoothness(video: Video, prompt: Prompt, means: Means) -> VideoScore:
    def between(one: Frames, two: Frames) -> Frames:
        first, second = (sampling.tensor(frame[None])[0] / 255 for frame in (one, two))
        drawn = (means.networks.amt(first, second) * 255).clamp(0, 255)
        return drawn.permute(1, 2, 0).numpy().astype(np.uint8)  # cut off, not rounded, as the official code does

    return rules.smoothness(video.frames, between)


def flow_by(networks: Networks) -> Callable[[Frames, Frames], Numbers]:
    """Return RAFT's flow between two frames [height, width, 3]: [2, height, width] in pixels."""

    def flow(one: Frames, two: Frames) -> Numbers:
        first, second = (sampling.tensor(frame[None])[0] for frame in (one, two))
        return networks.raft(first, second).double().numpy()

    return flow


def _dynamic(video: Video, prompt: Prompt, means: Means) -> VideoScore:
    return rules.is_dynamic(sampling.eighths(video), flow_by(means.networks))


def _aesthetic(video: Video, prompt: Prompt, means: Means) -> VideoScore:
    seen = means.networks.clip("clip-l14", sampling.for_clip(video.frames))
    return VideoScore(value=float((means.networks.aesthetic(seen) / 10).mean()))


def _imaging(video: Video, prompt: Prompt, means: Means) -> VideoScore:
    return VideoScore(value=float(means.networks.musiq(sampling.for_musiq(video.frames)).mean()))


def _seen(video: Video, name: str, means: Means, look: Callable[[Frames], Any]) -> Any:
    """Return what was observed elsewhere of a video for a dimension, else what a network sees of its frames."""
    if means.observations.has(name):
        return means.observations.of(name, video.name)
    return look(video.frames[sampling.middle(len(video.frames), SEEN)])


def _detections(video: Video, name: str, means: Means) -> Any:
    return _seen(video, name, means, lambda frames: means.networks.detections(sampling.for_grit(frames)))


def _names(video: Video, name: str, means: Means) -> list[list[str]]:
    return [[thing for thing, _ in frame] for frame in _detections(video, name, means)]


def _object(video: Video, prompt: Prompt, means: Means) -> VideoScore:
    seen = _names(video, "object_class", means)
    return rules.share(prompt.targets["object_class"] in frame for frame in seen)


def _objects(video: Video, prompt: Prompt, means: Means) -> VideoScore:
    return rules.shows(_names(video, "multiple_objects", means), prompt.targets["multiple_objects"])


def _action(video: Video, prompt: Prompt, means: Means) -> VideoScore:
    def look(frames: Frames) -> Any:
        likely = torch.sigmoid(means.networks.umt(sampling.for_umt(frames))).tolist()
        return zip(official.actions(), likely, strict=True)

    return rules.is_action(_seen(video, "human_action", means, look), video.name)


def _color(video: Video, prompt: Prompt, means: Means) -> VideoScore | None:
    def look(frames: Frames) -> Any:
        return means.networks.sentences(sampling.for_grit(frames, rounded=True))

    return rules.is_colored(_seen(video, "color", means, look), prompt.text, prompt.targets["color"])


def _relation(video: Video, prompt: Prompt, means: Means) -> VideoScore:
    requested = prompt.targets["spatial_relationship"]
    seen = _detections(video, "spatial_relationship", means)
    return rules.stands(seen, requested["object_a"], requested["object_b"], requested["relationship"])


def _scene(video: Video, prompt: Prompt, means: Means) -> VideoScore:
    captions = _seen(video, "scene", means, lambda frames: means.networks.scenes(sampling.for_tag2text(frames)))
    return rules.is_scene(captions, prompt.targets["scene"])


def _style(video: Video, prompt: Prompt, means: Means) -> VideoScore:
    words = means.networks.clip_words("clip-b32", prompt.targets["appearance_style"])
    return rules.likeness(words, means.networks.clip("clip-b32", sampling.for_clip_pictures(video.frames)))


def _prompted(video: Video, prompt: Prompt, means: Means) -> VideoScore:
    chosen = video.frames[sampling.middle(len(video.frames), 8)]
    seen: Tensor = means.networks.viclip(sampling.for_clip(chosen, rounded=True))
    return VideoScore(value=float((seen @ means.networks.viclip_words(prompt.text).T).item()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a dimension is measured.

    Attributes:
        measure: of one video; None where it says nothing about it.
        networks: files that it takes.
        observed: whether it takes observations by networks that ran elsewhere, if there are any.
        scale: what the mean over videos is divided by.
    """

    measure: Measure
    networks: tuple[str, ...] = ()
    observed: bool = False
    scale: float = 1.0


GRIT = ("grit", "bert-words")

WAYS: dict[str, Way] = {
    "subject_consistency": Way(measure=_subject, networks=("dino",)),
    "background_consistency": Way(measure=_background, networks=("clip-b32",)),
    "temporal_flickering": Way(measure=_flickering),
    "motion_smoothness": Way(measure=_smoothness, networks=("amt",)),
    "dynamic_degree": Way(measure=_dynamic, networks=("raft",)),
    "aesthetic_quality": Way(measure=_aesthetic, networks=("clip-l14", "aesthetic")),
    "imaging_quality": Way(measure=_imaging, networks=("musiq",), scale=100.0),
    "object_class": Way(measure=_object, networks=GRIT, observed=True),
    "multiple_objects": Way(measure=_objects, networks=GRIT, observed=True),
    "human_action": Way(measure=_action, networks=("umt",), observed=True),
    "color": Way(measure=_color, networks=GRIT, observed=True),
    "spatial_relationship": Way(measure=_relation, networks=GRIT, observed=True),
    "scene": Way(measure=_scene, networks=("tag2text", "bert-words"), observed=True),
    "appearance_style": Way(measure=_style, networks=("clip-b32",)),
    "temporal_style": Way(measure=_prompted, networks=("viclip",)),
    "overall_consistency": Way(measure=_prompted, networks=("viclip",)),
}  # fmt: skip
"""Dimension -> how."""


def missing_reason(name: str, means: Means) -> str | None:
    """Return why a dimension can't be measured, with what to put where; None if it can."""
    way = WAYS[name]
    if way.observed and means.observations.has(name):
        return None
    reason = means.networks.missing(way.networks)
    if reason is None or not way.observed:
        return reason
    kind = KINDS[name]
    return f"{reason}; or bring the {kind} by {BY[kind]} with --observations"
