"""Puts scenes of `world` into words, and says which words there are."""

from __future__ import annotations

import numpy as np

from dit_accel_assets import world
from dit_accel_assets.clips import DIRECTIONS
from dit_accel_assets.world import Scene, Thing

_FILLERS = ("and", "background", "camera", "going", "in", "of", "on", "pans", "style", "the")


def world_vocabulary() -> tuple[str, ...]:
    """Return every word a prompt of this world may use, sorted."""
    plurals = (_plural(shape) for shape in world.SHAPES)
    single = {word for name in (*world.MOTIONS, *world.RELATIONS) for word in name.split()} - {"still"}
    lists = (world.COLORS, world.GROUNDS, world.SHAPES, plurals, world.TEXTURES, DIRECTIONS, world.COUNTS, single)
    words = {word for names in lists for word in names} | set(world.SPEEDS) | set(world.STYLES) | set(_FILLERS)
    return tuple(sorted(words - {"", "plain"}))


def prompt_of(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Describe a scene in words; with `rng` in one of the paraphrases, some of which leave the background open."""
    things = scene.things[:1] if scene.grouped else scene.things
    count = len(scene.things) if scene.grouped else 1
    phrases = [_phrase(thing, count, rng) for thing in things]
    joint = f" {scene.relation} " if scene.relation else " and "
    text = joint.join(phrases[:2]) + "".join(f" and {phrase}" for phrase in phrases[2:])
    texture = "" if scene.ground_texture == "plain" else f"{scene.ground_texture} "
    place = f" on a {texture}{scene.ground} background"
    if rng is not None:
        pick = rng.random()
        place = "" if pick < 0.08 else f" on {texture}{scene.ground}" if pick < 0.2 else place
    pan = f", the camera pans {scene.pan}" if scene.pan else ""
    style = f", in {scene.style} style" if scene.style else ""
    return text + place + pan + style


def _phrase(thing: Thing, count: int, rng: np.random.Generator | None) -> str:
    texture = "" if thing.texture == "plain" else f"{thing.texture} "
    motion = "" if thing.motion == "still" else f" {thing.motion}"
    if rng is not None and rng.random() < 0.3:
        motion = motion.replace("moving", "going")
    speed = f" {thing.speed}" if thing.speed else ""
    shape = thing.shape if count == 1 else _plural(thing.shape)
    return f"{world.COUNTS[count - 1]} {thing.color} {texture}{shape}{motion}{speed}"


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"
