"""The drawn world: deterministic, inside the frame, true to its prompts; its checker is right, or silent."""

from itertools import pairwise

import numpy as np
import pytest
from dit_accel_assets import check_prompt, checker, clips, vocabulary


def test_the_same_seed_draws_the_same_clip():
    first, second = clips.clip_of(7), clips.clip_of(7)
    assert first[:2] == second[:2]
    assert np.array_equal(first[2], second[2])
    assert not np.array_equal(first[2], clips.clip_of(8)[2])


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


def test_prompts_name_what_is_drawn_in_known_words():
    for seed in range(200):
        prompt, scene, _ = clips.clip_of(seed, frames=1)
        words = check_prompt(prompt, "wan-plain")
        assert {scene.color, scene.shape, scene.direction} <= set(words)
        assert (scene.background in words) or " on " not in prompt
        assert (scene.speed in words) if scene.speed else not {"slowly", "quickly"} & set(words)
    found = check_prompt("A red Circle, moving UP-LEFT.", "wan-plain")
    assert found == ("a", "red", "circle", "moving", "up-left")  # case and punctuation do not matter


def test_training_never_sees_a_held_out_combination():
    trained = {clips.clip_of(seed, frames=1)[1].words for seed in range(300)}
    held_out = {clips.clip_of(seed, frames=1, held_out=True)[1].words for seed in range(64)}
    assert not trained & held_out
    assert all(clips.is_held_out_plain(*words) for words in held_out)


def test_other_lengths_shapes_words_and_forms_are_refused():
    for frames in (0, 4, 16, -3):
        with pytest.raises(ValueError, match=rf"frames={frames}: .*4k\+1 frames"):
            clips.draw_plain(clips.clip_of(0)[1], frames)
    with pytest.raises(ValueError, match=r"shape 'blob'.*circle"):
        clips.signed_distance("blob", np.zeros(1), np.zeros(1), 3.0)
    with pytest.raises(ValueError, match=r"word\(s\) purple, elephant") as error:
        check_prompt("a purple elephant moving right", "wan-plain")
    assert all(word in str(error.value) for word in vocabulary("wan-plain"))
    with pytest.raises(ValueError, match=r"\[frames, height, width, 3\].*found \(3, 64, 64\)"):
        checker.check_clip(np.zeros((3, 64, 64)))


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
