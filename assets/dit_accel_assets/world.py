"""The richer world of the second embedded model: up to three textured objects, events, a camera and a style.

A `Scene` holds everything that decides a clip of any length: speeds are pixels a frame, and events (grow, turn, cross)
go one way, so that the first 17 frames of a clip of 49 are the clip of 17. `painter` draws, `judge` judges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from dit_accel_assets.clips import DIRECTIONS

FRAMES = 17
"""The one length that is trained; objects stay inside the picture that long at least."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (232, 36, 36),
    "green": (40, 208, 60),
    "blue": (56, 96, 255),
    "yellow": (250, 222, 40),
    "magenta": (226, 60, 226),
    "cyan": (40, 216, 230),
}
"""Saturated, a sixth of the colour circle apart: the judge tells objects by hue, through textures and shades."""

GROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (10, 10, 12),
    "navy": (14, 20, 80),
    "maroon": (80, 14, 30),
    "forest": (12, 64, 34),
    "gray": (100, 100, 100),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross", "ring")
TEXTURES: tuple[str, ...] = ("plain", "striped", "checked", "dotted", "shaded", "grainy")
EVENTS: tuple[str, ...] = ("growing", "shrinking", "turning")
CROSSINGS: tuple[str, ...] = ("right", "left", "up", "down")
MOTIONS: tuple[str, ...] = (
    "still",
    *EVENTS,
    *(f"moving {d}" for d in DIRECTIONS),
    *(f"crossing {d}" for d in CROSSINGS),
)
SPEEDS: dict[str, tuple[float, float]] = {"slowly": (0.35, 0.45), "": (0.8, 1.0), "quickly": (1.5, 1.8)}
"""Speed word -> range in pixels a frame."""
CROSSING_SPEED = 2.4
PAN_SPEED = 0.6
GROWTH = 0.45
"""Pixels by which a growing object's side grows, and a shrinking one's shrinks, a frame."""
TURN = math.radians(5)
"""Angle a turning object turns clockwise a frame."""
RELATIONS: dict[str, tuple[int, int]] = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
PANS: tuple[str, ...] = ("right", "left", "up", "down")
STYLES: tuple[str, ...] = ("", "outlined", "dim", "soft")
COUNTS: tuple[str, ...] = ("a", "two", "three")
SMALLEST = 6.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """One object: its words, and the numbers the words leave open (pixels, pixels a frame)."""

    color: str
    shape: str
    texture: str
    motion: str
    speed: str
    pace: float
    size: float
    start: tuple[float, float]
    phase: tuple[float, float]

    @property
    def words(self) -> tuple[str, str, str, str]:
        """Colour, shape, texture and motion: what a held-out combination is made of."""
        return self.color, self.shape, self.texture, self.motion

    @property
    def velocity(self) -> np.ndarray:
        """Own velocity (x, y) in pixels a frame, y down; zero for events and still objects."""
        kind, _, direction = self.motion.partition(" ")
        if kind not in ("moving", "crossing"):
            return np.zeros(2)
        step = np.asarray(DIRECTIONS[direction], dtype=np.float64)
        return step / np.hypot(*step) * self.pace


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A whole clip but for its length; things are in the order of the prompt, the first one in front."""

    things: tuple[Thing, ...]
    grouped: bool
    """All things share their words and are named by their count ("two red circles")."""
    relation: str
    """Where the first thing stands to the second at the start, a key of `RELATIONS`, or ""."""
    ground: str
    ground_texture: str
    ground_phase: tuple[float, float]
    pan: str
    style: str
    height: int
    width: int

    @property
    def pan_velocity(self) -> np.ndarray:
        """Velocity (x, y) of the camera in pixels a frame; the picture moves the other way."""
        return np.asarray(DIRECTIONS[self.pan], dtype=np.float64) * PAN_SPEED if self.pan else np.zeros(2)


def centers(scene: Scene, frames: int) -> np.ndarray:
    """Return the centre of every thing in every frame, float64 [N, F, 2] as (x, y) pixels, outside the picture too."""
    time = np.arange(frames)[:, None]
    return np.stack([np.asarray(t.start) + time * (t.velocity - scene.pan_velocity) for t in scene.things])


def object_sizes(scene: Scene, frames: int) -> np.ndarray:
    """Return the side of every thing's box in every frame, float64 [N, F], in pixels."""
    growth = {"growing": GROWTH, "shrinking": -GROWTH}
    time = np.arange(frames)
    return np.stack([np.maximum(SMALLEST, t.size + time * growth.get(t.motion, 0.0)) for t in scene.things])


def angles(scene: Scene, frames: int) -> np.ndarray:
    """Return the clockwise rotation of every thing in every frame, float64 [N, F], in radians."""
    return np.stack([np.arange(frames) * (TURN if t.motion == "turning" else 0.0) for t in scene.things])


def is_held_out(color: str, shape: str, texture: str, motion: str) -> bool:
    """Say whether a combination of words is kept out of training (one in eleven)."""
    places = (
        tuple(COLORS).index(color),
        SHAPES.index(shape),
        TEXTURES.index(texture),
        MOTIONS.index(motion),
    )
    return sum(place * weight for place, weight in zip(places, (1, 3, 5, 7), strict=True)) % 11 == 0


def scene_of(
    seed: int, index: int, *, height: int = 64, width: int = 64, held_out: bool = False, still: bool = False
) -> Scene:
    """Return the scene of (seed, index) for a picture size; a held-out one names at least one untrained combination.

    In a `still` one, for pictures, neither things nor the camera move.
    """
    if min(height, width) < 32:
        raise ValueError(f"a picture of {height}x{width} pixels is too small for this world; use at least 32x32")
    rng = np.random.default_rng([seed, index, int(held_out)])
    while True:
        scene = _sample(rng, height, width, held_out, still)
        if scene is not None:
            return scene


def _sample(rng: np.random.Generator, height: int, width: int, held_out: bool, still: bool) -> Scene | None:
    """Draw a scene, or None where the things drawn do not fit the picture or the wanted kind of combination."""
    count = int(rng.choice([1, 2, 3], p=[0.42, 0.4, 0.18]))
    grouped = count > 1 and rng.random() < 0.35
    words: list[tuple[str, ...]] = []
    while len(words) < count:
        words.append(words[0] if grouped and words else _words(rng, crossing=count == 1, still=still))
    if len({w[0] for w in words}) < count and not grouped:
        return None
    if [is_held_out(*w[:4]) for w in words] != [held_out] + [held_out and grouped] * (count - 1):
        return None
    pan = str(rng.choice(PANS)) if rng.random() < 0.2 and not still else ""
    ground_texture = str(rng.choice(TEXTURES, p=[0.4, 0.12, 0.12, 0.12, 0.12, 0.12]))
    scene = Scene(
        things=tuple(_thing(rng, w, count, height, width) for w in words),
        grouped=grouped,
        relation="",
        ground=str(rng.choice(list(GROUNDS))),
        # a camera that moves must be seen to
        ground_texture="dotted" if pan and ground_texture in ("plain", "shaded", "striped") else ground_texture,
        ground_phase=(float(rng.uniform(0, 64)), float(rng.uniform(0, 64))),
        pan=pan,
        style=str(rng.choice(STYLES, p=[0.7, 0.1, 0.1, 0.1])),
        height=height,
        width=width,
    )
    return _place(rng, scene)


def _words(rng: np.random.Generator, *, crossing: bool, still: bool) -> tuple[str, str, str, str, str]:
    """Draw colour, shape, texture, motion and speed word; a plain disc does not turn, which could not be seen."""
    color, shape = str(rng.choice(list(COLORS))), str(rng.choice(SHAPES))
    texture = str(rng.choice(TEXTURES, p=[0.3, 0.14, 0.14, 0.14, 0.14, 0.14]))
    kind = str(rng.choice(["still", "moving", "crossing", *EVENTS], p=[0.14, 0.48, 0.08, 0.1, 0.1, 0.1]))
    kind = "still" if still else "moving" if kind == "crossing" and not crossing else kind
    if kind == "turning" and shape in ("circle", "ring") and texture in ("plain", "grainy"):
        shape = "square"
    choices = {"moving": tuple(DIRECTIONS), "crossing": CROSSINGS}.get(kind)
    motion = f"{kind} {rng.choice(choices)}" if choices else kind
    speed = str(rng.choice(["slowly", "", "", "quickly"])) if kind == "moving" else ""
    return color, shape, texture, motion, speed


def _thing(rng: np.random.Generator, words: tuple[str, ...], count: int, height: int, width: int) -> Thing:
    color, shape, texture, motion, speed = words
    size = min(height, width) * float(rng.uniform(0.27, 0.38) if count == 1 else rng.uniform(0.21, 0.28))
    size += {"growing": -0.3, "shrinking": 0.3}.get(motion, 0.0) * GROWTH * FRAMES
    return Thing(
        color=color,
        shape=shape,
        texture=texture,
        motion=motion,
        speed=speed,
        pace=CROSSING_SPEED if motion.startswith("crossing") else float(rng.uniform(*SPEEDS[speed])),
        size=size,
        start=(0.0, 0.0),
        phase=(float(rng.uniform(0, 64)), float(rng.uniform(0, 64))),
    )


def _place(rng: np.random.Generator, scene: Scene) -> Scene | None:
    """Set where the things start: inside for the trained length, apart in the first frame; None where that fails."""
    placed: list[Thing] = []
    for thing in scene.things:
        thing = replace(thing, pace=scene.things[0].pace) if scene.grouped else thing
        low, high = _starts(thing, scene)
        if (low > high).any():
            return None
        for _ in range(30):
            start = rng.uniform(low, high)
            gaps = [np.abs(start - other.start).max() - (thing.size + other.size) / 2 for other in placed]
            if min(gaps, default=9.0) > 2:
                break
        else:
            return None
        placed.append(replace(thing, start=(float(start[0]), float(start[1]))))
    scene = replace(scene, things=tuple(placed))
    return replace(scene, relation=_relation(rng, scene))


def _starts(thing: Thing, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Return the range of starts from which a thing stays inside, or enters within the first frames if it crosses."""
    box = np.array([scene.width, scene.height], dtype=np.float64)
    margin = thing.size / 2 + 1 + (GROWTH / 2 * (FRAMES - 1) if thing.motion == "growing" else 0.0)
    crosses = thing.motion.startswith("crossing")
    shift = ((0.0 if crosses else thing.velocity) - scene.pan_velocity) * (FRAMES - 1)
    low, high = np.maximum(margin, margin - shift), np.minimum(box - margin, box - margin - shift)
    if crosses:
        step = np.sign(thing.velocity)
        edge = np.where(step > 0, -margin, box + margin)
        low, high = np.where(step != 0, edge, low), np.where(step != 0, edge, high)
    return low, high


def _relation(rng: np.random.Generator, scene: Scene) -> str:
    """Return the relation of two single things where it is plain in all trained frames, most of the time."""
    if scene.grouped or len(scene.things) != 2 or rng.random() < 0.2:
        return ""
    track = centers(scene, FRAMES)
    offset = track[0] - track[1]
    for name, (x, y) in RELATIONS.items():
        along, across = offset @ np.array([x, y]), np.abs(offset @ np.array([y, x]))
        if along.min() >= 6 and (along > 1.3 * across).all():
            return name
    return ""
