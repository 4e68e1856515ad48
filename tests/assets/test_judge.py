"""The judge: drawn clips of any length pass, degraded ones pass less and less, and every wrong thing is told."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from dit_accel_assets import judge, painter, unmix, world
from dit_accel_assets.world import Scene

SCENES = [world.scene_of(30, index) for index in range(24)]


def judged(scene: Scene, asked: Scene | None = None, frames: int = 17, **stretch: int) -> judge.Judgement:
    """Judge a drawn scene by what was asked, which is the scene itself by default."""
    return judge.judge_clips(painter.draw(scene, frames), asked or scene, **stretch)


def failed(verdict: judge.Judgement) -> set[str]:
    return {name.partition(".")[0] for name, answer in verdict.answers.items() if not answer.passed}


def one_thing(**words: str) -> Scene:
    """Return a scene of one red plain square that moves right over checked navy, with some words exchanged."""
    thing = world.Thing(
        color="red", shape="square", texture="plain", motion="moving right", speed="", pace=0.9, size=18.0,
        start=(18.0, 30.0), phase=(1.0, 2.0),
    )  # fmt: skip
    scene = Scene(
        things=(thing,), grouped=False, relation="", ground="navy", ground_texture="checked", ground_phase=(3.0, 4.0),
        pan="", style="", height=64, width=64,
    )  # fmt: skip
    own = {key: value for key, value in words.items() if hasattr(thing, key) and key != "ground"}
    pace = {"quickly": 1.6, "slowly": 0.4}.get(words.get("speed", ""), 0.9)
    rest = {key: value for key, value in words.items() if key not in own}
    return replace(scene, things=(replace(thing, pace=pace, **own),), **rest)


def beside(scene: Scene, **words: str) -> Scene:
    """Return the scene with a second thing right of the first, of the same words but for those given."""
    first = scene.things[0]
    return replace(scene, things=(first, replace(first, start=(first.start[0] + 24, first.start[1]), **words)))


def hurt(video: np.ndarray, amount: float) -> np.ndarray:
    """Return the clip in 0..1, mixed with strong noise and with its own blurred frames."""
    clip = video / 255
    blurred = clip
    for axis in (1, 2):
        blurred = sum(np.roll(blurred, step, axis) for step in range(-6, 7)) / 13
    noise = np.random.default_rng(0).normal(0, 0.35, clip.shape)
    return np.clip((1 - amount) * clip + amount * (blurred + noise), 0, 1)


@pytest.mark.parametrize(("frames", "count"), [(17, 8), (49, 2)])
def test_drawn_clips_pass_at_any_length(frames, count):
    scores = [judged(scene, frames=frames).score for scene in SCENES[:count]]
    assert np.mean(scores) >= 0.98
    assert min(scores) >= 0.85


@pytest.mark.slow
def test_every_stretch_of_a_drawn_clip_passes_from_its_frame_on():
    lasting = [scene for scene in SCENES if all(thing.motion != "shrinking" for thing in scene.things)]  # to 6 pixels
    scenes = [lasting[12], one_thing(motion="turning", shape="triangle"), one_thing(speed="quickly")]
    for scene in scenes:
        clip = painter.draw(scene, 49)
        scores = [judge.judge_clips(clip, scene, first=first, end=first + 17).score for first in (0, 32)]
        assert min(scores) >= 0.85, (scene, scores)
    left = judge.judge_clips(clip, scenes[-1], first=32)  # all of it has left the picture by then
    assert {"present.0", "path.0"}.isdisjoint(left.answers)
    assert left.score == 1
    assert {"present.0", "path.0"} <= judge.judge_clips(clip[32:49], scenes[-1]).answers.keys()


@pytest.mark.slow
def test_a_stretch_that_begins_again_and_a_thing_that_appears_after_the_trained_length_are_told():
    turning = one_thing(motion="turning", shape="triangle")
    clip = painter.draw(turning, 49)
    repeated = np.concatenate([clip[:17]] * 3)[:49]
    on, again = (judge.judge_clips(frames, turning, first=32) for frames in (clip, repeated))
    assert on.answers["shape.0"].value > again.answers["shape.0"].value + 0.1
    still, pair = one_thing(motion="still"), beside(one_thing(motion="still"), color="green")
    assert judged(pair, still, 49, first=32).answers["count"].value == 1
    one = one_thing(motion="still")
    alone, pair = painter.draw(one, 49), painter.draw(beside(one, color="green"), 49)
    more = judge.judge_clips(np.concatenate([alone[:17], pair[17:]]), one)
    assert more.answers["count"].value == 1
    assert failed(more) == {"count"}
    quick = one_thing(speed="quickly")
    assert not failed(judged(quick, frames=61))  # it left the picture, as drawn


def test_closeness_is_continuous_high_for_what_is_drawn_and_falls_where_a_word_is_wrong():
    asked = world.scene_of(31, 0, height=96, width=96, still=True)
    drawn = painter.draw(asked, 1)
    right = judge.judge_clips(drawn, asked)
    assert right.closeness > 0.85
    near = [judge.judge_clips(hurt(drawn, amount), asked).closeness for amount in (0.0, 0.1, 0.4, 0.8)]
    assert near == sorted(near, reverse=True)
    assert len(set(near)) == len(near)  # where the share of passes may stand still
    thing = asked.things[0]
    wrong = {
        "color": next(color for color in world.COLORS if color not in {one.color for one in asked.things}),
        "texture": next(one for one in world.TEXTURES if one != thing.texture),
    }
    for word, value in wrong.items():
        shown = replace(asked, things=(replace(thing, **{word: value}), *asked.things[1:]))
        assert judged(shown, asked, 1).closeness < right.closeness - 0.02, word
    assert judge.judge_clips(np.zeros_like(drawn), asked).closeness < 0.6


def test_drawn_pictures_pass_and_are_asked_nothing_that_takes_time():
    scenes = [world.scene_of(31, index, height=96, width=96, still=True) for index in range(12)]
    verdicts = [judged(scene, frames=1) for scene in scenes]
    assert np.mean([verdict.score for verdict in verdicts]) >= 0.98
    assert not {"path", "size", "turn", "camera"} & {n.partition(".")[0] for v in verdicts for n in v.answers}


@pytest.mark.slow
def test_a_wrong_word_is_told_by_its_question():
    asked = one_thing()
    right = judged(asked)
    assert not failed(right)
    assert (right.share("path"), right.share("relation")) == (1.0, None)  # means over the things; nothing was asked
    for question, *wrong in (
        ("present", {"color": "green"}), ("shape", {"shape": "circle"}, {"shape": "triangle"}),
        ("texture", {"texture": "striped"}), ("ground", {"ground": "maroon"}),
        ("path", {"motion": "moving left"}, {"motion": "moving up-right"}, {"speed": "quickly"}, {"speed": "slowly"}),
        ("ground_texture", {"ground_texture": "dotted"}), ("camera", {"pan": "up"}),
        ("style", {"style": "outlined"}, {"style": "dim"}, {"style": "soft"}),
    ):  # fmt: skip
        for words in wrong:
            assert question in failed(judged(one_thing(**words), asked)), words
    for asked, shown in (("growing", "still"), ("still", "growing"), ("shrinking", "growing")):
        assert failed(judged(one_thing(motion=shown), one_thing(motion=asked))) == {"size"}
    turning = one_thing(motion="turning")
    assert not failed(judged(turning))
    assert "turn" in failed(judged(one_thing(motion="still"), turning))


def test_half_the_speed_and_a_wrong_shade_have_errors_that_grow():
    asked, shown = one_thing(), one_thing(speed="slowly")
    errors = [judged(shown, asked, frames).answers["path.0"].value for frames in (17, 33, 49)]
    assert 1.5 < errors[0] < errors[1] < errors[2]
    scene, video = one_thing(), painter.draw(one_thing())
    mask = painter.masks(scene, 17)[0][..., None]
    shaded = [video * (1 - mask) + mask * np.array([232 - by, 36 + by, 36]) for by in (0, 25, 50)]
    distances = [judge.judge_clips(x.astype(np.uint8), scene).answers["color.0"].value for x in shaded]
    assert distances[0] < 2 < distances[1] < distances[2]


def test_a_missing_thing_one_too_many_and_a_relation_the_other_way_round_are_told():
    two = beside(one_thing(motion="still"), color="green")
    one = replace(two, things=two.things[:1])
    verdict = judged(one, two)
    assert {"present", "count"} <= failed(verdict)
    assert verdict.answers["present.0"].passed
    assert not verdict.answers["present.1"].passed
    assert failed(judged(two, one)) == {"count"}
    pair = replace(beside(one_thing(motion="still")), grouped=True)
    assert not failed(judged(pair))
    assert failed(judged(one, pair)) >= {"count"}
    right = replace(beside(one_thing(motion="still"), color="green"), relation="left of")
    wrong = replace(right, things=right.things[::-1])
    assert not failed(judged(right))
    assert "relation" in failed(judged(right, wrong))


def test_an_empty_clip_fails_all_that_is_asked_and_the_more_one_is_hurt_the_lower_it_scores():
    scene = one_thing()
    empty = painter.draw(replace(scene, things=(replace(scene.things[0], start=(-200.0, 0.0)),)))
    assert failed(judge.judge_clips(empty, scene)) >= {"present", "color", "shape", "texture", "path", "size", "count"}
    noise = np.random.default_rng(0).random((17, 64, 64, 3))
    assert judge.judge_clips(noise, scene).score < 0.4
    drawn = [(painter.draw(scene, 9), scene) for scene in SCENES[:4]]
    means = [np.mean([judge.judge_clips(hurt(x, by), scene).score for x, scene in drawn]) for by in (0.0, 0.4, 0.8)]
    assert all(high > low + 0.02 for high, low in pairwise(means)), means


def test_masks_fit_what_was_drawn():
    for scene in SCENES[:8]:
        parts, truth = unmix.unmix(painter.draw(scene, 5)), painter.masks(scene, 5)
        assert parts.ground == scene.ground
        for color in {thing.color for thing in scene.things}:
            drawn = sum(m for m, thing in zip(truth, scene.things, strict=True) if thing.color == color)
            found = parts.masks[color]
            least = 0.8 if scene.style in ("", "dim") else 0.4  # outlines are black, soft edges mixed
            assert np.minimum(found, drawn).sum() >= least * np.maximum(found, drawn).sum()
    with pytest.raises(ValueError, match=r"\[frames, height, width, 3\].*found \(3, 64, 64\)"):
        judge.judge_clips(np.zeros((3, 64, 64)), one_thing())
