"""The checker: right on drawn clips, soft or noisy ones too, and silent where there is nothing to see."""

import numpy as np
import pytest
from dit_accel_assets import checker, clips


def soften(video: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur by a cross of five pixels and add noise, about what decoding latents does."""
    noisy = video / 255 + rng.normal(0, 0.04, video.shape)
    return np.clip(sum([noisy, *(np.roll(noisy, s, a) for a in (1, 2) for s in (1, -1))]) / 5, 0, 1)


def test_at_least_98_percent_right_on_drawn_clips():
    rng, wrong = np.random.default_rng(0), []
    for seed in range(100):
        _, scene, video = clips.clip_of(seed, frames=17 if seed % 4 else 33, held_out=seed % 3 == 0)
        found = checker.check_clip(soften(video, rng) if seed % 2 else video)
        if (found.color, found.shape, found.direction, found.background) != scene.words:
            wrong.append((seed, scene.words, found))
        assert abs(found.travel - scene.travel) < 3.0
    assert len(wrong) <= 2, wrong


def test_an_empty_clip_shows_nothing():
    video = np.full((5, 64, 64, 3), clips.BACKGROUNDS["navy"], dtype=np.uint8)
    found = checker.check_clip(video)
    assert (found.color, found.shape, found.direction, found.background) == (None, None, None, "navy")


def test_a_still_object_has_no_direction():
    _, scene, video = clips.clip_of(0)
    found = checker.check_clip(np.repeat(video[:1], 9, axis=0))
    assert found.direction is None
    assert (found.color, found.shape) == (scene.color, scene.shape)


def test_swapping_the_frames_turns_the_direction_around():
    for seed in range(8):
        _, scene, video = clips.clip_of(seed)
        x, y = clips.DIRECTIONS[scene.direction]
        assert clips.DIRECTIONS[checker.check_clip(video[::-1]).direction] == (-x, -y)


def test_a_clip_of_another_form_is_refused():
    with pytest.raises(ValueError, match=r"\[frames, height, width, 3\].*found \(3, 64, 64\)"):
        checker.check_clip(np.zeros((3, 64, 64)))
