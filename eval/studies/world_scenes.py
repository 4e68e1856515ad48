"""What the embedded models' held-out prompts ask for, as scenes of the world, and what their clips score of it."""

import itertools

from dit_accel_assets import clips, model_score, world
from dit_accel_assets.checker import check
from dit_accel_assets.world import Scene, Thing
from dit_accel_eval.metrics.metric import Clip
from dit_accel_pipelines.generation.media import to_uint8
from world_scores import MEASURES, world_scores

from dit_accel import ConfigError

SHAPES_MODEL = "wan-plain"
"""The model of one plain shape on plain ground, whose world is a part of `world` but for its paces and white."""

OF_OTHERS = ("appearance_style", "human_action", "overall_consistency")
"""Names that the world's judge does not judge there: prompts ask for no style, and paces are others."""


def scene_of(model: str, number: int) -> Scene | None:
    """Return the scene of an embedded model's held-out prompt, by its number; models of other prompts are refused.

    None for a white object, which the world doesn't know.
    """
    if model == "flux-tiny":
        return world.scene_of(0, number, height=96, width=96, held_out=True, still=True)
    if model == "wan-tiny":
        return world.scene_of(0, number, held_out=True)
    if model != SHAPES_MODEL:
        raise ConfigError(f"the scenes behind {model!r}'s prompts are not known; use wan-plain, wan-tiny or flux-tiny")
    _, scene, _ = clips.clip_of(number, frames=1, held_out=True)
    return _in_world(scene) if scene.color in world.COLORS else None


def _in_world(scene: clips.Scene) -> Scene:
    thing = Thing(
        color=scene.color, shape=scene.shape, texture="plain", motion=f"moving {scene.direction}", speed=scene.speed,
        pace=scene.travel / (world.FRAMES - 1), size=scene.size, start=scene.start, phase=(0.0, 0.0),
    )  # fmt: skip
    return Scene(
        things=(thing,), grouped=False, relation="", ground=scene.background, ground_texture="plain",
        ground_phase=(0.0, 0.0), pan="", style="", height=clips.SIZE, width=clips.SIZE,
    )  # fmt: skip


def numbers(model: str, count: int, first: int = 0) -> list[int]:
    """Return ``count`` numbers of held-out prompts whose scenes are known, the lowest from ``first`` on."""
    known = (number for number in itertools.count(first) if scene_of(model, number) is not None)
    return list(itertools.islice(known, count))


def model_scores(model: str, number: int, frames: Clip) -> dict[str, float]:
    """Return VBench's names -> scores on the world of what a model made of a held-out prompt, by its number.

    ``wan-plain``'s motion and consistency are judged by its own checker: whether the direction is the one requested,
    and the share of its questions. A prompt whose scene is not known is refused.
    """
    scene = scene_of(model, number)
    if scene is None:
        raise ConfigError(f"prompt {number} of {model} asks for a white object, which the world doesn't know")
    shown = to_uint8(frames)
    if model != SHAPES_MODEL:
        return world_scores(shown, scene)
    found = world_scores(shown, scene, names=[name for name in MEASURES if name not in OF_OTHERS])
    direction = clips.clip_of(number, frames=1, held_out=True)[1].direction
    found["human_action"] = float(check(shown).direction == direction)
    found["overall_consistency"] = model_score(model, number, frames)
    return found
