"""The drawn world: deterministic, inside the frame, and true to its prompts."""

from itertools import pairwise

import numpy as np
import pytest
from dit_accel_assets import check_prompt, clips, vocabulary


def test_the_same_seed_draws_the_same_clip():
    first, second = clips.clip_of(7), clips.clip_of(7)
    assert first[0] == second[0]
    assert first[1] == second[1]
    assert np.array_equal(first[2], second[2])
    assert not np.array_equal(first[2], clips.clip_of(8)[2])


@pytest.mark.parametrize("frames", [1, 5, 17, 33])
def test_the_object_stays_inside_the_frame(frames):
    for seed in range(60):
        _, scene, video = clips.clip_of(seed, frames=frames)
        assert video.shape == (frames, clips.SIZE, clips.SIZE, 3)
        ground = np.asarray(clips.BACKGROUNDS[scene.background], dtype=np.uint8)
        border = np.concatenate([video[:, 0], video[:, -1], video[:, :, 0], video[:, :, -1]], axis=1)
        assert np.abs(border.astype(int) - ground).max() <= 32  # at most the soft tip of a triangle


def test_travel_does_not_depend_on_the_number_of_frames():
    _, scene, _ = clips.clip_of(3)
    for frames in (5, 17, 33):
        path = clips.plain_centers(scene, frames)
        assert np.hypot(*(path[-1] - path[0])) == pytest.approx(scene.travel)


def test_prompts_name_what_is_drawn_in_known_words():
    for seed in range(200):
        prompt, scene, _ = clips.clip_of(seed, frames=1)
        words = check_prompt(prompt, "wan-plain")
        assert {scene.color, scene.shape, scene.direction} <= set(words)
        assert (scene.background in words) or " on " not in prompt
        assert (scene.speed in words) if scene.speed else not {"slowly", "quickly"} & set(words)


def test_training_never_sees_a_held_out_combination():
    trained = {clips.clip_of(seed, frames=1)[1].words for seed in range(300)}
    held_out = {clips.clip_of(seed, frames=1, held_out=True)[1].words for seed in range(64)}
    assert not trained & held_out
    assert all(clips.is_held_out_plain(*words) for words in held_out)


def test_every_speed_word_covers_its_own_range_of_distances():
    ranges = sorted(clips.TRAVEL.values())
    assert all(low[1] < high[0] for low, high in pairwise(ranges))


@pytest.mark.parametrize("frames", [0, 4, 16, -3])
def test_frames_must_be_of_the_form_4k_plus_1(frames):
    scene = clips.clip_of(0)[1]
    with pytest.raises(ValueError, match=rf"frames={frames}: .*4k\+1 frames"):
        clips.draw_plain(scene, frames)


def test_an_unknown_shape_is_named():
    with pytest.raises(ValueError, match=r"shape 'blob'.*circle"):
        clips.signed_distance("blob", np.zeros(1), np.zeros(1), 3.0)


def test_unknown_words_are_named_with_the_vocabulary():
    expected = r"word\(s\) purple, elephant"
    with pytest.raises(ValueError, match=expected) as error:
        check_prompt("a purple elephant moving right", "wan-plain")
    assert all(word in str(error.value) for word in vocabulary("wan-plain"))


def test_case_and_punctuation_do_not_matter():
    assert check_prompt("A red Circle, moving UP-LEFT.", "wan-plain") == ("a", "red", "circle", "moving", "up-left")
