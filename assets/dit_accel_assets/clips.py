"""Draws the world that `wan-plain` was trained on: one coloured shape that moves over a plain background.

Pure numpy and deterministic: a `PlainScene` holds everything, `draw_plain` turns it into frames, `plain_prompt_of`
into words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIZE = 64
"""Height and width of every clip, in pixels."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (232, 36, 36),
    "green": (40, 208, 60),
    "blue": (56, 116, 255),
    "yellow": (250, 222, 40),
    "magenta": (226, 60, 226),
    "white": (245, 245, 245),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (10, 10, 12),
    "navy": (14, 20, 88),
    "maroon": (88, 14, 30),
    "forest": (12, 68, 34),
    "gray": (104, 104, 104),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
DIRECTIONS: dict[str, tuple[int, int]] = {
    "right": (1, 0),
    "left": (-1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up-right": (1, -1),
    "up-left": (-1, -1),
    "down-right": (1, 1),
    "down-left": (-1, 1),
}
"""Direction word -> (x, y) step; y points down, as in images."""

TRAVEL: dict[str, tuple[float, float]] = {"slowly": (14.0, 18.0), "": (22.0, 27.0), "quickly": (32.0, 37.0)}
"""Speed word -> range of the distance covered over the whole clip, in pixels, whatever the number of frames."""

_FILLERS = ("a", "background", "going", "moving", "on", "the")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainScene:
    """Everything that decides a clip: the words, and the numbers the words leave open (pixels)."""

    color: str
    shape: str
    direction: str
    background: str
    speed: str
    size: float
    travel: float
    start: tuple[float, float]

    @property
    def words(self) -> tuple[str, str, str, str]:
        """Colour, shape, direction and background: what a held-out combination is made of."""
        return self.color, self.shape, self.direction, self.background


def plain_vocabulary() -> tuple[str, ...]:
    """Return every word a prompt may use, sorted."""
    speeds = tuple(word for word in TRAVEL if word)
    return tuple(sorted({*COLORS, *BACKGROUNDS, *SHAPES, *DIRECTIONS, *speeds, *_FILLERS}))


def is_held_out_plain(color: str, shape: str, direction: str, background: str) -> bool:
    """Say whether a combination of words is kept out of training (one in eleven)."""
    places = (
        tuple(COLORS).index(color),
        SHAPES.index(shape),
        tuple(DIRECTIONS).index(direction),
        tuple(BACKGROUNDS).index(background),
    )
    return sum(place * weight for place, weight in zip(places, (1, 3, 5, 7), strict=True)) % 11 == 0


def sample_scene(rng: np.random.Generator, *, held_out: bool = False) -> PlainScene:
    """Draw a scene at random, from the training combinations or from the held-out ones; the path stays in the frame."""
    while True:
        words = tuple(str(rng.choice(list(names))) for names in (COLORS, SHAPES, DIRECTIONS, BACKGROUNDS))
        if is_held_out_plain(*words) == held_out:
            break
    color, shape, direction, background = words
    speed = str(rng.choice(["slowly", "", "", "quickly"]))
    size = float(rng.uniform(16.0, 22.0))
    travel = float(rng.uniform(*TRAVEL[speed]))
    shift = _unit(direction) * travel
    margin = size / 2 + 1.0
    low = np.maximum(margin, margin - shift)
    high = np.minimum(SIZE - margin, SIZE - margin - shift)
    start = rng.uniform(low, high)
    return PlainScene(
        color=color,
        shape=shape,
        direction=direction,
        background=background,
        speed=speed,
        size=size,
        travel=travel,
        start=(float(start[0]), float(start[1])),
    )


def plain_prompt_of(scene: PlainScene, rng: np.random.Generator | None = None) -> str:
    """Describe a scene in words; with `rng` in one of the paraphrases, some of which leave the background open."""
    article, verb, place = "a ", "moving", f" on a {scene.background} background"
    if rng is not None:
        article = "a " if rng.random() < 0.8 else str(rng.choice(["", "the "]))
        verb = "moving" if rng.random() < 0.7 else "going"
        pick = rng.random()
        if pick < 0.1:
            place = ""
        elif pick < 0.3:
            place = f" on {scene.background}" if pick < 0.2 else f" on the {scene.background} background"
    speed = f" {scene.speed}" if scene.speed else ""
    return f"{article}{scene.color} {scene.shape} {verb} {scene.direction}{speed}{place}"


def plain_centers(scene: PlainScene, frames: int) -> np.ndarray:
    """Return the object's centre in every frame, float64 [F, 2] as (x, y) pixels."""
    progress = np.linspace(0.0, 1.0, frames) if frames > 1 else np.zeros(1)
    return np.asarray(scene.start) + progress[:, None] * _unit(scene.direction) * scene.travel


def draw_plain(scene: PlainScene, frames: int = 17) -> np.ndarray:
    """Draw a clip, uint8 [F, 64, 64, 3]; `frames` must be of the form 4k+1 (ValueError otherwise)."""
    if frames < 1 or frames % 4 != 1:
        raise ValueError(f"frames={frames}: a clip has 4k+1 frames; use {max(1, frames // 4 * 4 + 1)}")
    grid = np.arange(SIZE) + 0.5
    center = plain_centers(scene, frames)
    x = grid[None, None, :] - center[:, 0, None, None]
    y = grid[None, :, None] - center[:, 1, None, None]
    cover = np.clip(0.5 - signed_distance(scene.shape, x, y, scene.size), 0.0, 1.0)[..., None]
    color, background = np.asarray(COLORS[scene.color]), np.asarray(BACKGROUNDS[scene.background])
    return np.rint(background + cover * (color - background)).astype(np.uint8)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, size: np.ndarray | float) -> np.ndarray:
    """Return the distance to a shape's edge in pixels, negative inside; `size` is the side of its bounding box."""
    half = size / 2
    if shape == "circle":
        return np.hypot(x, y) - half
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - half
    if shape == "triangle":  # apex up, base and height = size
        return np.maximum((2 * np.abs(x) - y - half) / np.sqrt(5.0), y - half)
    if shape == "cross":  # arms a third of the box wide
        ax, ay, arm = np.abs(x), np.abs(y), size / 6
        return np.minimum(np.maximum(ax - half, ay - arm), np.maximum(ax - arm, ay - half))
    raise ValueError(f"shape {shape!r} is not known; use one of {', '.join(SHAPES)}")


def clip_of(seed: int, *, frames: int = 17, held_out: bool = False) -> tuple[str, PlainScene, np.ndarray]:
    """Return prompt, scene and frames of one seed; the held-out clips come from combinations training never sees."""
    rng = np.random.default_rng([seed, int(held_out)])
    scene = sample_scene(rng, held_out=held_out)
    prompt = plain_prompt_of(scene) if held_out else plain_prompt_of(scene, rng)
    return prompt, scene, draw_plain(scene, frames)


def _unit(direction: str) -> np.ndarray:
    step = np.asarray(DIRECTIONS[direction], dtype=np.float64)
    return step / np.hypot(*step)
