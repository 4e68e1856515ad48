"""Judges a clip by the scene it was meant to show: continuous answers, each with the pass mark that drawn clips meet.

Where an object starts, how large it is and at what phase its texture lies are left open by the prompt, and are free
here too: only what the words say is held against the clip, at any length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dit_accel_assets import painter, recognise, tracking, world
from dit_accel_assets.clips import DIRECTIONS
from dit_accel_assets.unmix import Parts, components, firm, unmix
from dit_accel_assets.world import Scene, Thing


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One question's answer: a number, and whether it passes; NaN values never pass."""

    value: float
    passed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """All answers to one clip, by "question" or "question.index of the thing"."""

    answers: dict[str, Answer]

    @property
    def score(self) -> float:
        """Share of the questions that the clip passes."""
        return float(np.mean([answer.passed for answer in self.answers.values()]))

    @property
    def closeness(self) -> float:
        """Mean over the questions of how near the clip comes to each, 0 to 1, with no pass marks; see `_nearness`."""
        return float(np.mean([_nearness(name, answer.value) for name, answer in self.answers.items()]))

    def share(self, question: str) -> float | None:
        """Return the share passed of one question over the clip's things; None where it was not requested."""
        marks = [answer.passed for name, answer in self.answers.items() if name.partition(".")[0] == question]
        return float(np.mean(marks)) if marks else None


MARKS: dict[str, tuple[str, float]] = {
    "present": (">=", 0.85),
    "color": ("<=", 45.0),
    "shape": (">=", 0.62),
    "texture": (">=", 0.5),
    "path": ("<=", 1.5),
    "size": ("<=", 1.2),
    "turn": (">=", 0.02),
    "count": ("<=", 0.0),
    "relation": (">=", 0.8),
    "ground": ("<=", 25.0),
    "ground_texture": (">=", 0.5),
    "camera": ("<=", 0.25),
    "style": (">=", 0.5),
}
"""Question -> pass mark: share of frames, RGB distance, IoU, probability, pixels, pixels, IoU gained by turning,
objects too many or few, share of frames, RGB distance, probability, pixels a frame, probability."""


def judge_clips(video: np.ndarray, scene: Scene, *, first: int = 0, end: int | None = None) -> Judgement:
    """Judge a clip [F, H, W, 3], uint8 or float in 0..1, by the words of `scene`; ValueError for another form.

    A picture is a clip of one frame, for which questions about time are left out. With `first` and `end` the stretch of
    those frames alone is judged: later on nothing is asked of what moves and is nowhere whole, which may have left, nor
    of relations.
    """
    parts = unmix(video).stretch(first, end)
    values: dict[str, float] = {}
    things = scene.things[:1] if scene.grouped else scene.things
    tracks = [tracking.track(parts.masks[thing.color]) for thing in things]
    requested = []
    for index, (thing, track) in enumerate(zip(things, tracks, strict=True)):
        if first and _may_leave(scene, thing) and not track.whole.any():
            continue
        requested.append(thing)
        values |= {f"{name}.{index}": value for name, value in _thing(parts, scene, thing, track, first).items()}
    values["count"] = _count_error(parts, len(scene.things), first)
    if scene.relation and not first:
        values["relation"] = _relation(tracks[0], tracks[1], scene.relation)
    named = parts.ground == scene.ground
    values["ground"] = parts.ground_distance if named else float("inf")
    values["ground_texture"] = _ground_texture(parts, scene.ground_texture)
    if scene.ground_texture not in ("plain", "shaded") and len(parts.video) > 1:
        values["camera"] = tracking.camera_error(parts, -scene.pan_velocity)
    style = _style(parts, requested, scene.style)
    if style is not None:
        values["style"] = style
    return Judgement(answers={name: Answer(value=v, passed=_passes(name, v)) for name, v in values.items()})


def _nearness(name: str, value: float) -> float:
    """Return an answer as a number from 0 to 1.

    An error halves it with every pass mark that it is long, one object too many or missing as well; a share, an overlap
    or a probability is itself, and an overlap gained by turning counts in twice its mark.
    """
    sign, mark = MARKS[name.partition(".")[0]]
    if np.isnan(value):
        return 0.0
    if sign == "<=":
        return float(0.5 ** (value / (mark or 1.0)))
    return float(np.clip(value / (2 * mark) if name.startswith("turn") else value, 0.0, 1.0))


def _passes(name: str, value: float) -> bool:
    sign, mark = MARKS[name.partition(".")[0]]
    return value >= mark if sign == ">=" else value <= mark


def _may_leave(scene: Scene, thing: Thing) -> bool:
    """Say whether a thing leaves the picture, if the clip is long enough."""
    return thing.motion.partition(" ")[0] in ("moving", "crossing") or bool(scene.pan)


def _thing(parts: Parts, scene: Scene, thing: Thing, track: tracking.Track, first: int) -> dict[str, float]:
    """Return the answers about one thing (or one group of things that share their words)."""
    seen = np.nonzero(~np.isnan(track.areas))[0]
    values = {"present": _presence(scene, thing, track, first)}
    if len(track.areas) > 1:
        values |= _moves(scene, thing, track, first)
    if not seen.size:
        return values | {"color": float("inf"), "shape": 0.0, "texture": 0.0}
    best = np.nonzero(track.whole)[0] if track.whole.any() else seen
    picks = best[np.unique(np.linspace(0, len(best) - 1, 6).round().astype(int))]
    values |= _looks(parts, thing, picks, first)
    if thing.motion == "turning" and thing.shape not in ("circle", "ring") and len(track.areas) > 4:
        values["turn"] = _turn(parts, thing, picks)
    return values


def _moves(scene: Scene, thing: Thing, track: tracking.Track, first: int) -> dict[str, float]:
    """Return the errors of a thing's path and of its size over time."""
    kind, _, direction = thing.motion.partition(" ")
    step = np.asarray(DIRECTIONS[direction], dtype=np.float64) if direction else np.zeros(2)
    paces = {"moving": world.SPEEDS[thing.speed], "crossing": (world.CROSSING_SPEED,) * 2}.get(kind, (0.0, 0.0))
    unit = step / max(1.0, float(np.linalg.norm(step)))
    growth = {"growing": world.GROWTH, "shrinking": -world.GROWTH}.get(kind, 0.0)
    count = len(scene.things) if scene.grouped else 1
    return {
        "path": tracking.path_error(track, paces, unit, tracking.drift(thing, track, scene.pan_velocity, first)),
        "size": tracking.growth_error(track, growth, count, thing.shape),
    }


def _presence(scene: Scene, thing: Thing, track: tracking.Track, first: int) -> float:
    """Return the share of frames where the thing shows; what moves may have left, or not have come, at the ends."""
    there = ~np.isnan(track.areas)
    if _may_leave(scene, thing) and there.any():
        seen = np.nonzero(there)[0]
        coming = 5 - first if thing.motion.startswith("crossing") else 0
        start = 0 if seen[0] > coming else seen[0]
        end = len(there) if first + seen[-1] + 1 < world.FRAMES else seen[-1] + 1
        there = there[start:end]
    return float(there.mean())


def _looks(parts: Parts, thing: Thing, picks: np.ndarray, first: int) -> dict[str, float]:
    """Return colour distance, IoU of the shape (0 where another fits better) and the texture's probability."""
    mask, shapes, textures, colors = parts.masks[thing.color], [], [], []
    for frame in picks:
        pieces = components(firm(mask[frame]), tracking.LEAST)
        turn = (first + frame) * world.TURN if thing.motion == "turning" else 0.0
        turns = (turn, turn - 0.2, turn + 0.2) if thing.motion == "turning" else (0.0,)
        fits = tracking.overlaps(mask[frame], pieces[:3], turns)
        shapes.append(fits[thing.shape] if fits[thing.shape] >= max(fits.values()) - 0.03 else 0.0)
        colors.append(_color_distance(parts.video[frame], mask[frame], thing.color))
        for piece in pieces[:3]:
            features = recognise.object_features(parts.video[frame], np.where(piece, mask[frame], 0), thing.color)
            if features is not None:
                textures.append(features)
    values = {"color": float(np.median(colors)), "shape": float(np.median(shapes)), "texture": 0.0}
    if textures:
        probabilities = recognise.classify("texture", np.stack(textures)).mean(0)
        values["texture"] = float(probabilities[world.TEXTURES.index(thing.texture)])
    return values


def _color_distance(frame: np.ndarray, mask: np.ndarray, color: str) -> float:
    """Return the median distance in RGB (0..255) of an object's firm pixels from its colour's range of lightness."""
    pixels = frame[mask > 0.9] if (mask > 0.9).sum() >= 5 else frame[firm(mask)]
    if not len(pixels):
        return float("inf")
    base = np.asarray(world.COLORS[color], dtype=np.float32)
    axis = painter.TINT * (255 - base)
    along = np.clip((pixels - base) @ axis / float(axis @ axis), 0.0, 1.0)
    return float(np.median(np.sqrt(np.square(pixels - base - along[:, None] * axis).sum(-1))))


def _turn(parts: Parts, thing: Thing, picks: np.ndarray) -> float:
    """Return by how much templates that turn as requested overlap better than still ones (best start of each)."""
    mask, gains = parts.masks[thing.color], []
    starts = np.radians(np.arange(0, {"square": 90, "cross": 90}.get(thing.shape, 120), 10))
    for rate in (world.TURN, 0.0, -world.TURN):
        fits = []
        for start in starts:
            each = []
            for frame in picks:
                pieces = components(firm(mask[frame]), tracking.LEAST)[:1]
                each.append(tracking.overlaps(mask[frame], pieces, (start + rate * frame,))[thing.shape])
            fits.append(np.mean(each))
        gains.append(max(fits))
    return float(gains[0] - max(gains[1:]))


def _count_error(parts: Parts, count: int, first: int) -> int:
    """Return how many objects are too many or missing in the trained length, or too many after it (some may leave)."""
    frames = np.arange(0, len(parts.video), 2)
    shown = []
    for frame in frames:
        sizes = [p.sum() for m in parts.masks.values() for p in components(firm(m[frame]), tracking.LEAST)]
        shown.append(sum(size >= 0.12 * max(sizes) for size in sizes))
    trained = first + frames < world.FRAMES
    early, late = np.asarray(shown)[trained], np.asarray(shown)[~trained]
    later = max(0, int(np.median(late)) - count) if late.size else 0
    return max(abs(int(np.median(early)) - count) if early.size else 0, later)


def _relation(first: tracking.Track, second: tracking.Track, relation: str) -> float:
    """Return the share of the trained frames in which the first thing stands to the second as requested."""
    x, y = world.RELATIONS[relation]
    offset = (first.centers - second.centers)[: world.FRAMES]
    along, across = offset @ np.array([x, y]), np.abs(offset @ np.array([y, x]))
    return float(((along > 3) & (along > across)).mean())


def _ground_texture(parts: Parts, texture: str) -> float:
    frames = np.unique(np.linspace(0, len(parts.video) - 1, 4).round().astype(int))
    features = [patch for frame in frames for patch in recognise.ground_features(parts, frame)]
    if not features:
        return 0.0
    return float(recognise.classify("ground", np.stack(features)).mean(0)[world.TEXTURES.index(texture)])


def _style(parts: Parts, things: Sequence[Thing], style: str) -> float | None:
    """Return the probability of the requested style; None where no object shows that could tell."""
    if parts.dim or style == "dim":
        return float(parts.dim and style == "dim")
    features = []
    for thing in things:
        mask = parts.masks[thing.color]
        for frame in np.unique(np.linspace(0, len(mask) - 1, 5).round().astype(int)):
            for piece in components(firm(mask[frame]), tracking.LEAST)[:1]:
                values = recognise.style_features(parts.video[frame], np.where(piece, mask[frame], 0), thing.color)
                features += [] if values is None else [values]
    if not features:
        return None
    return float(recognise.classify("style", np.stack(features)).mean(0)[recognise.KINDS["style"].index(style)])
