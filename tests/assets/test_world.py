"""The drawn worlds, the plain one and the richer one: deterministic, true to their words; the plain one's checker."""

import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from dit_accel_assets import check_prompt, checker, clips, painter, prompts, vocabulary, world
from dit_accel_assets.clips import DIRECTIONS

PINNED = (
    "a blue triangle above a green striped square on a dotted gray background, the camera pans right",
    "a red checked square moving up on a shaded maroon background, in outlined style",
)
PINNED_MEAN = 73.6731
SCENES = [world.scene_of(1, index) for index in range(200)]


def test_seed_and_index_decide_the_scene_and_what_was_trained_on_stays_what_it_was():
    assert world.scene_of(4, 2) == world.scene_of(4, 2)
    assert len({world.scene_of(4, 2), world.scene_of(4, 3), world.scene_of(5, 2)}) == 3
    assert np.array_equal(painter.draw(SCENES[0]), painter.draw(world.scene_of(1, 0)))
    assert prompts.prompt_of(world.scene_of(5, 0, height=40, width=40)) == PINNED[0]
    assert prompts.prompt_of(world.scene_of(0, 3, held_out=True)) == PINNED[1]
    mean = np.mean([painter.draw(world.scene_of(5, index, height=40, width=40), 5).mean() for index in range(20)])
    assert mean == pytest.approx(PINNED_MEAN, abs=1e-3)


@pytest.mark.parametrize(("height", "width"), [(40, 40), (64, 96), (96, 64)])
def test_a_longer_clip_begins_with_the_shorter_one(height, width):
    for index in range(4):
        scene = world.scene_of(2, index, height=height, width=width)
        long = painter.draw(scene, 49)
        assert long.shape == (49, height, width, 3)
        assert np.array_equal(long[:17], painter.draw(scene, 17))
        assert np.array_equal(painter.masks(scene, 49)[:, :17], painter.masks(scene, 17))


def test_a_crossing_thing_enters_on_one_side_and_leaves_on_the_other_once():
    scenes = [s for s in SCENES if s.things[0].motion.startswith("crossing") and not s.pan]
    assert len(scenes) >= 3
    for scene in scenes:
        shows = painter.masks(scene, 61)[0].sum((1, 2)) > 0
        assert not shows[0]
        assert not shows[-1]
        assert np.count_nonzero(np.diff(shows.astype(int))) == 2


def test_speeds_are_pixels_a_frame_and_the_camera_moves_all():
    for scene in SCENES:
        steps = np.diff(world.centers(scene, 49), axis=1)
        for thing, step in zip(scene.things, steps, strict=True):
            own = step + scene.pan_velocity
            assert np.allclose(own, own[0])
            low, high = world.SPEEDS[thing.speed] if thing.motion.startswith("moving") else (0.0, 0.0)
            if thing.motion.startswith("crossing"):
                low = high = world.CROSSING_SPEED
            assert low - 1e-9 <= np.hypot(*own[0]) <= high + 1e-9
            if thing.motion.startswith("moving"):
                x, y = DIRECTIONS[thing.motion.split()[1]]
                assert own[0] @ np.array([x, y]) == pytest.approx(np.hypot(*own[0]) * np.hypot(x, y))


def test_growing_and_shrinking_go_one_way_and_stop_at_the_smallest_side():
    for scene in SCENES:
        for thing, sides in zip(scene.things, world.object_sizes(scene, 97), strict=True):
            change = np.diff(sides)
            sign = {"growing": 1, "shrinking": -1}.get(thing.motion, 0)
            assert (change * sign >= 0).all()
            assert (change[:10] * sign > 0).all() == bool(sign)
            assert sides.min() >= world.SMALLEST


def test_relations_hold_and_things_stay_inside_for_the_trained_length_but_for_those_that_cross():
    related = [scene for scene in SCENES if scene.relation]
    assert len(related) > 15
    for scene in related:
        one, other = world.centers(scene, world.FRAMES)
        x, y = world.RELATIONS[scene.relation]
        assert ((one - other) @ np.array([x, y]) > 0).all()
    for scene in SCENES:
        reach = world.object_sizes(scene, world.FRAMES) / 2
        for thing, path, half in zip(scene.things, world.centers(scene, world.FRAMES), reach, strict=True):
            inside = ((path - half[:, None] >= 0) & (path + half[:, None] <= (scene.width, scene.height))).all(1)
            assert inside.all() or thing.motion.startswith("crossing")


def test_training_never_sees_a_held_out_combination_and_every_word_is_used():
    trained = {thing.words for scene in SCENES for thing in scene.things}
    held_out = {world.scene_of(0, index, held_out=True).things[0].words for index in range(100)}
    assert all(world.is_held_out(*words) for words in held_out)
    assert not any(world.is_held_out(*words) for words in trained)
    used = {word for index in range(1500) for word in prompts.prompt_of(world.scene_of(9, index)).split()}
    assert set(prompts.world_vocabulary()) - {word.strip(",") for word in used} == {"going"}  # in paraphrases alone
    plain = {clips.clip_of(seed, frames=1)[1].words for seed in range(300)}
    held_out = {clips.clip_of(seed, frames=1, held_out=True)[1].words for seed in range(64)}
    assert not plain & held_out
    assert all(clips.is_held_out_plain(*words) for words in held_out)


def test_prompts_name_what_is_drawn_in_known_words():
    rng = np.random.default_rng(0)
    known = set(prompts.world_vocabulary())
    for scene in SCENES:
        for text in (prompts.prompt_of(scene), prompts.prompt_of(scene, rng)):
            words = set(re.findall(r"[^\s,]+", text))
            assert words <= known
            for thing in scene.things:
                assert thing.color in words
                assert thing.texture in words or thing.texture == "plain"
                assert {thing.shape, f"{thing.shape}s", f"{thing.shape}es"} & words
        assert scene.ground in prompts.prompt_of(scene)
        assert not scene.style or f"{scene.style} style" in prompts.prompt_of(scene)
        assert not scene.pan or f"pans {scene.pan}" in prompts.prompt_of(scene)


def test_what_is_in_front_hides_what_is_behind_and_in_a_still_scene_nothing_moves():
    scene = next(s for s in SCENES if len(s.things) == 2)
    front, back = scene.things
    scene = replace(scene, things=(front, replace(back, start=front.start)))
    seen = painter.masks(scene, 1)
    assert (seen.sum(0) <= 1 + 1e-6).all()
    assert seen[1].sum() < 0.9 * painter.masks(replace(scene, things=(scene.things[1],)), 1)[0].sum()
    for index in range(40):
        scene = world.scene_of(3, index, still=True)
        assert {thing.motion for thing in scene.things} == {"still"}
        assert np.array_equal(*painter.draw(scene, 5)[[0, 4]])


def test_the_worlds_of_all_words_are_drawn_differently():
    (thing, *_), texture = SCENES[0].things, "checked"
    scene = replace(SCENES[0], things=(thing,), grouped=False, relation="", style="", pan="", ground_texture=texture)
    for field, names in (("shape", world.SHAPES), ("texture", world.TEXTURES), ("color", world.COLORS)):
        scenes = [replace(scene, things=(replace(thing, **{field: name}),)) for name in names]
        assert len({painter.draw(x, 5).tobytes() for x in scenes}) == len(names)
    for field, names in (("style", world.STYLES), ("pan", ("", *world.PANS)), ("ground", world.GROUNDS)):
        scenes = [replace(scene, **{field: name}) for name in names]
        assert len({painter.draw(x, 5).tobytes() for x in scenes}) == len(names)


def test_other_lengths_sizes_shapes_textures_words_and_forms_are_refused():
    for draw, scene in ((painter.draw, SCENES[0]), (clips.draw_plain, clips.clip_of(0)[1])):
        for frames in (0, 4, 16, -3):
            with pytest.raises(ValueError, match=rf"frames={frames}: .*4k\+1 frames"):
                draw(scene, frames)
    with pytest.raises(ValueError, match=r"16x64.*32x32"):
        world.scene_of(0, 0, height=16)
    with pytest.raises(ValueError, match=r"texture 'furry'.*plain, striped"):
        painter.texture("furry", np.zeros(1), np.zeros(1), 4.0, (0.0, 0.0), 1.0)
    with pytest.raises(ValueError, match=r"shape 'blob'.*circle"):
        clips.signed_distance("blob", np.zeros(1), np.zeros(1), 3.0)
    with pytest.raises(ValueError, match=r"word\(s\) purple, elephant") as error:
        check_prompt("a purple elephant moving right", "wan-plain")
    assert all(word in str(error.value) for word in vocabulary("wan-plain"))
    with pytest.raises(ValueError, match=r"\[frames, height, width, 3\].*found \(3, 64, 64\)"):
        checker.check_clip(np.zeros((3, 64, 64)))


@pytest.mark.parametrize("frames", [1, 5, 17, 33])
def test_the_object_stays_inside_the_frame(frames):
    for seed in range(40):
        _, scene, video = clips.clip_of(seed, frames=frames)
        assert video.shape == (frames, clips.SIZE, clips.SIZE, 3)
        ground = np.asarray(clips.BACKGROUNDS[scene.background], dtype=np.uint8)
        border = np.concatenate([video[:, 0], video[:, -1], video[:, :, 0], video[:, :, -1]], axis=1)
        assert np.abs(border.astype(int) - ground).max() <= 32  # at most the soft tip of a triangle


def test_travel_does_not_depend_on_the_number_of_frames_and_every_speed_word_has_its_own_range():
    _, scene, _ = clips.clip_of(3)
    for frames in (5, 17, 33):
        path = clips.plain_centers(scene, frames)
        assert np.hypot(*(path[-1] - path[0])) == pytest.approx(scene.travel)
    assert all(low[1] < high[0] for low, high in pairwise(sorted(clips.TRAVEL.values())))


def test_plain_prompts_name_what_is_drawn_in_known_words():
    for seed in range(200):
        prompt, scene, _ = clips.clip_of(seed, frames=1)
        words = check_prompt(prompt, "wan-plain")
        assert {scene.color, scene.shape, scene.direction} <= set(words)
        assert (scene.background in words) or " on " not in prompt
        assert (scene.speed in words) if scene.speed else not {"slowly", "quickly"} & set(words)
    found = check_prompt("A red Circle, moving UP-LEFT.", "wan-plain")
    assert found == ("a", "red", "circle", "moving", "up-left")  # case and punctuation do not matter


def soften(video: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur by a cross of five pixels and add noise, about what decoding latents does."""
    noisy = video / 255 + rng.normal(0, 0.04, video.shape)
    return np.clip(sum([noisy, *(np.roll(noisy, s, a) for a in (1, 2) for s in (1, -1))]) / 5, 0, 1)


def test_the_checker_is_right_on_drawn_clips_soft_and_noisy_ones_too():
    rng, wrong = np.random.default_rng(0), []
    for seed in range(50):
        _, scene, video = clips.clip_of(seed, frames=17 if seed % 4 else 33, held_out=seed % 3 == 0)
        found = checker.check_clip(soften(video, rng) if seed % 2 else video)
        if (found.color, found.shape, found.direction, found.background) != scene.words:
            wrong.append((seed, scene.words, found))
        assert abs(found.travel - scene.travel) < 3.0
    assert len(wrong) <= 1, wrong


def test_the_checker_sees_nothing_in_an_empty_clip_no_direction_in_a_still_and_the_other_one_backwards():
    empty = checker.check_clip(np.full((5, 64, 64, 3), clips.BACKGROUNDS["navy"], dtype=np.uint8))
    assert (empty.color, empty.shape, empty.direction, empty.background) == (None, None, None, "navy")
    for seed in range(8):
        _, scene, video = clips.clip_of(seed)
        x, y = clips.DIRECTIONS[scene.direction]
        assert clips.DIRECTIONS[checker.check_clip(video[::-1]).direction] == (-x, -y)
    still = checker.check_clip(np.repeat(video[:1], 9, axis=0))
    assert (still.direction, still.color, still.shape) == (None, scene.color, scene.shape)
