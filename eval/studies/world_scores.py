"""VBench's names on the embedded models' world, where what a clip shows can be read off its pixels without a network.

The scene that a clip was meant to show is known, and colours, shapes and places can be read off; VBench's own rules
then say what they say of detections. What they stand for here is in `WORDS`; scores are ``name@world``, no figures of
VBench's. Aesthetics can't be judged; imaging quality only of a clip whose undamaged drawing is at hand.
"""

import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import world_rules as rules
from dit_accel_assets import tracking, world
from dit_accel_assets.judge import Verdict, judge
from dit_accel_assets.unmix import Parts, components, firm, unmix
from dit_accel_assets.world import Scene
from dit_accel_pipelines.generation.media import Frames

WORDS: dict[str, str] = {
    "subject_consistency": "the first object keeps its colour and shape",
    "background_consistency": "the ground keeps its colour",
    "temporal_flickering": "pixels of the ground keep their values; no camera",
    "motion_smoothness": "the objects' centres move evenly",
    "dynamic_degree": "an object's centre moves by more than 6 pixels on 256 in a quarter of the pairs",
    "imaging_quality": "PSNR to the drawing over 100, where there is one",
    "object_class": "the first object's shape shows",
    "multiple_objects": "both shapes, or as many objects as requested, show",
    "human_action": "objects move, grow and turn as requested",
    "color": "the first object's shape shows in its colour",
    "spatial_relationship": "the objects' boxes stand as requested, left as good as right",
    "scene": "the ground is the one requested",
    "appearance_style": "probability of the style and the textures",
    "temporal_style": "the camera moves as requested",
    "overall_consistency": "share of all the judge's questions",
}
"""Dimension -> what it is here. ``aesthetic_quality`` has no counterpart."""

TAKES_TIME = ("subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness",
              "dynamic_degree", "human_action", "temporal_style")  # fmt: skip
"""What one frame alone can't show."""

LOOKED_AT = 8
"""Middle frames in which objects are looked for."""

FAR = 128.0
"""Distance of two colours in RGB at which they have nothing in common."""

RELATIONS = {"left of": "on the left of", "right of": "on the right of", "above": "on the top of",
             "below": "on the bottom of"}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An object in a frame: its colour, its shape, its box (left, top, right, bottom) and how well the shape fits."""

    color: str
    shape: str
    box: tuple[float, float, float, float]
    fit: float


class Shown:
    """What a clip [F, height, width, 3], uint8, shows of a scene; each part is worked out when first requested."""

    def __init__(self, frames: Frames, scene: Scene) -> None:
        self.frames, self.scene = frames, scene

    @cached_property
    def parts(self) -> Parts:
        """The clip taken apart by colour."""
        return unmix(self.frames)

    @cached_property
    def verdict(self) -> Verdict:
        """The judge's answers."""
        return judge(self.frames, self.scene)

    @cached_property
    def places(self) -> list[int]:
        """The frames in which objects are looked for."""
        return sorted(set(rules.middle(len(self.frames), LOOKED_AT)))

    @cached_property
    def objects(self) -> list[list[Found]]:
        """The objects of those frames."""
        return [self._objects(place) for place in self.places]

    def _objects(self, place: int) -> list[Found]:
        found = []
        for color, mask in self.parts.masks.items():
            for piece in components(firm(mask[place]), tracking.LEAST)[:3]:
                fits = tracking.overlaps(mask[place], [piece], self._turns(color, place))
                shape = max(fits, key=lambda one: fits[one])
                down, right = np.nonzero(piece)
                box = (float(right.min()), float(down.min()), float(right.max() + 1), float(down.max() + 1))
                found.append(Found(color=color, shape=shape, box=box, fit=fits[shape]))
        return found

    def _turns(self, color: str, place: int) -> tuple[float, ...]:
        turning = any(one.motion == "turning" and one.color == color for one in self.scene.things)
        return (0.0, place * world.TURN) if turning else (0.0,)

    @cached_property
    def ground(self) -> npt.NDArray[np.float64]:
        """The ground's median colour by frame, [F, 3]; of a frame that is all object, nan."""
        return np.stack([_median(frame[free]) for frame, free in zip(self.parts.video, self.parts.free, strict=True)])

    def colors(self, color: str) -> npt.NDArray[np.float64]:
        """Return the median colour by frame of what has one of the world's colours, [F, 3]; nan where nothing has."""
        solid = firm(self.parts.masks[color])
        return np.stack([_median(frame[mask]) for frame, mask in zip(self.parts.video, solid, strict=True)])

    def centers(self, color: str) -> npt.NDArray[np.float64]:
        """Return the centre by frame of what has one of the world's colours, [F, 2] as (x, y); nan where none is whole.

        Pixels weigh by how far they are from the ground towards the colour: the masks' sharp edges would let a centre
        jump by a third of a pixel.
        """
        mask = self.parts.masks[color]
        towards = (self.colors(color) - self.ground)[:, None, None]
        away = self.parts.video - self.ground[:, None, None]
        share = (away * towards).sum(-1) / np.maximum(np.square(towards).sum(-1), 1.0)
        near = np.max([np.roll(mask > 0, (y, x), (1, 2)) for y in (-1, 0, 1) for x in (-1, 0, 1)], axis=0)
        weight = np.where(near, np.clip(share, 0.0, 1.0), 0.0)
        down, right = (np.arange(length) + 0.5 for length in mask.shape[1:])
        with np.errstate(invalid="ignore", divide="ignore"):
            found = np.stack([weight.sum(1) @ right, weight.sum(2) @ down], axis=1) / weight.sum((1, 2))[:, None]
        return np.where(tracking.track(mask).whole[:, None], found, np.nan)


def _median(pixels: np.ndarray) -> npt.NDArray[np.float64]:
    return np.median(pixels, axis=0).astype(np.float64) if len(pixels) >= tracking.LEAST else np.full(3, np.nan)


def world_scores(
    frames: Frames, scene: Scene, drawn: Frames | None = None, names: Collection[str] | None = None
) -> dict[str, float]:
    """Return VBench's names -> scores of a clip on the embedded world, without those that it does not ask for.

    A picture is a clip of one frame, for which questions about time are left out.

    Args:
        frames: uint8 [F, height, width, 3].
        scene: what it was meant to show.
        drawn: what each frame shows, drawn without damage, for imaging quality.
        names: which; None: all.
    """
    shown = Shown(frames, scene)
    chosen = {name: measure for name, measure in MEASURES.items() if names is None or name in names}
    if len(frames) == 1:
        chosen = {name: measure for name, measure in chosen.items() if name not in TAKES_TIME}
    found = {name: measure(shown) for name, measure in chosen.items()}
    if drawn is not None:
        error = np.square(frames.astype(np.float64) - drawn).mean() / 255**2
        found["imaging_quality"] = min(100.0, -10 * float(np.log10(max(error, 1e-10)))) / 100
    return {name: value for name in WORDS if (value := found.get(name)) is not None}


def _consistent(count: int, alike: Callable[[int, int], float]) -> float:
    """Return VBench's mean over frames of half the likeness to the one before and half that to the first."""
    return float(np.mean([(alike(at, at - 1) + alike(at, 0)) / 2 for at in range(1, count)]))


def _subject(shown: Shown) -> float:
    thing = shown.scene.things[0]
    seen = []
    for place, objects in zip(shown.places, shown.objects, strict=True):
        # the largest object of the requested shape, or of the requested colour: what stands for the subject here
        mine = [one for one in objects if one.shape == thing.shape or one.color == thing.color]
        best = max(mine, key=lambda one: (one.shape == thing.shape) + (one.color == thing.color), default=None)
        seen.append(None if best is None else (shown.colors(best.color)[place], best.shape == thing.shape, best.fit))

    def alike(one: int, two: int) -> float:
        first, second = seen[one], seen[two]
        if first is None or second is None:
            return 0.0
        shape = 1 - abs(first[2] - second[2]) if first[1] == second[1] else 0.0
        return _near(first[0], second[0]) * shape

    return _consistent(len(seen), alike)


def _near(one: np.ndarray, two: np.ndarray) -> float:
    changes = float(np.linalg.norm(one - two))
    return 0.0 if np.isnan(changes) else max(0.0, 1 - changes / FAR)


def _background(shown: Shown) -> float:
    return _consistent(len(shown.ground), lambda one, two: _near(shown.ground[one], shown.ground[two]))


def _flickering(shown: Shown) -> float | None:
    if shown.scene.pan:
        return None
    free = shown.parts.free
    levels = shown.frames.astype(np.int16)
    changes = [
        float(np.abs(levels[two] - levels[one])[still].mean())
        for one, two in itertools.pairwise(range(len(levels)))
        if (still := free[one] & free[two]).sum() >= tracking.LEAST
    ]
    return 1 - float(np.mean(changes)) / 255 if changes else None


def _centers(shown: Shown) -> list[npt.NDArray[np.float64]]:
    """Return the centres of all colours that show: how things move does not hang on whether they were requested."""
    centers = (shown.centers(color) for color in world.COLORS if firm(shown.parts.masks[color]).any())
    return [found for found in centers if not np.isnan(found).all()]


def _smoothness(shown: Shown) -> float | None:
    bends = np.array([np.linalg.norm(np.diff(centers, 2, axis=0), axis=1) for centers in _centers(shown)])
    bends = bends[~np.isnan(bends)]
    return 1 / (1 + float(np.sqrt(np.square(bends).mean()))) if len(bends) else None


def _dynamic(shown: Shown) -> float:
    steps = np.array([np.linalg.norm(np.diff(centers, axis=0), axis=1) for centers in _centers(shown)])
    if not len(steps):
        return 0.0
    moved = (np.nan_to_num(steps).max(0) > 6 * min(shown.frames.shape[1:3]) / 256).sum()
    return float(moved >= max(1, round(4 * len(shown.frames) / 16)))


def _object(shown: Shown) -> float:
    requested = shown.scene.things[0].shape
    return rules.share(any(one.shape == requested for one in frame) for frame in shown.objects)


def _objects(shown: Shown) -> float | None:
    things = shown.scene.things
    if len(things) < 2:
        return None
    if shown.scene.grouped:
        requested = things[0].color
        counts = (sum(one.color == requested for one in frame) for frame in shown.objects)
        return rules.share(count == len(things) for count in counts)
    seen = [[one.shape for one in frame] for frame in shown.objects]
    return rules.shows(seen, f"{things[0].shape} and {things[1].shape}")


def _color(shown: Shown) -> float | None:
    thing = shown.scene.things[0]
    captions = [[(f"a {one.color} {one.shape}", one.shape) for one in frame] for frame in shown.objects]
    return rules.is_colored(captions, thing.shape, thing.color, tuple(world.COLORS))


def _relation(shown: Shown) -> float | None:
    if not shown.scene.relation:
        return None
    one, other = (f"{thing.color} {thing.shape}" for thing in shown.scene.things[:2])
    boxes = [[(f"{found.color} {found.shape}", found.box) for found in frame] for frame in shown.objects]
    return rules.stands(boxes, one, other, RELATIONS[shown.scene.relation])


def _scene(shown: Shown) -> float:
    seen = (unmix(shown.frames[place : place + 1]).ground for place in shown.places)
    return rules.share(ground == shown.scene.ground for ground in seen)


def _answered(shown: Shown, part: str, *questions: str) -> float | None:
    """Return the mean of a part of the judge's answers to questions; None where none of them was requested."""
    answers = shown.verdict.answers.items()
    found = [getattr(answer, part) for name, answer in answers if name.partition(".")[0] in questions]
    return float(np.mean(found)) if found else None


def _camera(shown: Shown) -> float | None:
    answer = shown.verdict.answers.get("camera")
    return None if answer is None else 1 / (1 + answer.value)


MEASURES: dict[str, Callable[[Shown], float | None]] = {
    "subject_consistency": _subject, "background_consistency": _background, "temporal_flickering": _flickering,
    "motion_smoothness": _smoothness, "dynamic_degree": _dynamic, "object_class": _object,
    "multiple_objects": _objects,
    "human_action": lambda shown: _answered(shown, "passed", "path", "size", "turn"),
    "color": _color, "spatial_relationship": _relation, "scene": _scene,
    "appearance_style": lambda shown: _answered(shown, "value", "style", "texture"), "temporal_style": _camera,
    "overall_consistency": lambda shown: shown.verdict.score,
}  # fmt: skip
"""Dimension -> its score; None where the scene does not ask for it, or nothing shows that could tell."""
