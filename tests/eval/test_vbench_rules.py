"""VBench's sampling and rules, recomputed another way on made clips with known answers, edges included."""

import math

import numpy as np
import pytest
import torch
from dit_accel_eval.vbench import rules, sampling
from dit_accel_eval.vbench.rules import VideoScore
from dit_accel_eval.vbench.sampling import Video

from dit_accel import ConfigError


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("total", "count", "places"),
    [
        (16, 16, list(range(16))),
        (17, 16, [*range(15), 15]),  # stretches of 1, the last of 2, whose middle is its first
        (33, 16, [*range(0, 30, 2), 31]),
        (10, 4, [0, 3, 5, 8]),  # 0-1, 2-4, 5-6, 7-9
        (3, 5, [0, 1, 2, 2, 2]),
        (1, 3, [0, 0, 0]),
    ],
)
def test_middle_frames_are_those_of_equal_stretches(total, count, places):
    assert sampling.middle(total, count) == places


@pytest.mark.parametrize(
    ("fps", "step"), [(1, 1), (8, 1), (11.9, 1), (12, 2), (12.1, 2), (16, 2), (20, 2), (24, 3), (28, 4), (60, 8)]
)
def test_eighths_of_a_second_round_halves_to_even(fps, step):
    frames = noise(20, 4, 4, 3)
    assert (sampling.eighths(Video(name="a", frames=frames, fps=fps)) == frames[::step]).all()


def test_frames_are_sized_as_their_networks_take_them():
    wide, high = noise(2, 100, 151, 3), noise(2, 151, 100, 3)
    assert sampling.for_dino(wide).shape == (2, 3, 224, 338)  # 338.24 cut off
    assert sampling.for_dino(high).shape == (2, 3, 338, 224)
    assert sampling.for_clip(wide).shape == (2, 3, 224, 224)
    assert sampling.for_musiq(wide).shape == (2, 3, 100, 151)
    assert sampling.for_musiq(noise(1, 300, 1024, 3)).shape == (1, 3, 150, 512)
    flat = np.full((1, 64, 64, 3), 128, np.uint8)
    for sized, (mean, deviation) in (
        (sampling.for_dino(flat), sampling.IMAGENET),
        (sampling.for_clip(flat), sampling.CLIP),
    ):
        for channel in range(3):
            expected = (128 / 255 - mean[channel]) / deviation[channel]
            assert torch.allclose(sized[:, channel], torch.tensor(expected), atol=1e-5)


def test_bicubic_frames_overshoot_unless_they_are_rounded_as_bytes_are():
    edge = np.zeros((1, 112, 112, 3), np.uint8)
    edge[:, :, 56:] = 255
    mean, deviation = (torch.tensor(one)[:, None, None] for one in sampling.CLIP)
    free, held = (
        255 * (one * deviation + mean) for one in (sampling.for_clip(edge), sampling.for_clip(edge, rounded=True))
    )
    assert free.min() < -5
    assert free.max() > 260
    assert held.min() > -0.01
    assert held.max() < 255.01
    assert torch.allclose(held, held.round(), atol=1e-3)


def test_the_middle_square_begins_at_a_half_rounded_to_even():
    frames = torch.arange(229.0).expand(1, 3, 224, 229)
    assert sampling.centre(frames)[0, 0, 0, 0] == 2  # 2.5
    assert sampling.centre(torch.arange(231.0).expand(1, 3, 224, 231))[0, 0, 0, 0] == 4  # 3.5


def test_consistency_is_that_of_angles_with_the_frame_before_and_the_first():
    angles = np.radians([0, 10, 40, 160])
    features = torch.tensor(np.stack([np.cos(angles), np.sin(angles)], 1))
    pairs = [(10, 10), (30, 40), (120, 160)]  # degrees to the one before, and to the first
    expected = np.mean([max(0, math.cos(math.radians(one))) / 2 + max(0, math.cos(math.radians(two))) / 2
                        for one, two in pairs])  # fmt: skip
    found = rules.consistency(features)
    assert found.value == pytest.approx(expected)
    assert (found.parts, found.more["cnt_per_video"]) == (3, 3)
    assert found.more["video_sim"] == pytest.approx(3 * expected)
    with pytest.raises(ConfigError, match=r"2 frames.*1"):
        rules.consistency(features[:1])


def test_videos_weigh_as_many_parts_as_they_have():
    scores = [VideoScore(value=1.0, parts=1), VideoScore(value=0.0, parts=3)]
    assert rules.over_videos(scores) == 0.25
    assert rules.over_videos([VideoScore(value=True), VideoScore(value=False)]) == 0.5


def test_flickering_is_the_mean_difference_of_neighbours():
    frames = noise(5, 6, 7, 3)
    apart = [abs(int(two) - int(one)) for one, two in zip(frames[:-1].ravel(), frames[1:].ravel(), strict=True)]
    assert rules.flickering(frames).value == pytest.approx(1 - sum(apart) / len(apart) / 255)
    assert rules.flickering(np.repeat(frames[:1], 4, 0)).value == 1


@pytest.mark.parametrize(("count", "drawn"), [(3, [1]), (4, [1]), (5, [1, 3]), (8, [1, 3, 5])])
def test_smoothness_draws_every_odd_frame_that_has_one_behind(count, drawn):
    frames = noise(count, 4, 5, 3)
    asked = []

    def between(one, two):
        asked.append((one, two))
        return ((one.astype(int) + two) // 2).astype(np.uint8)

    found = rules.smoothness(frames, between)
    levels = frames.astype(float)
    apart = [np.abs((levels[at - 1] + levels[at + 1]) // 2 - levels[at]).mean() for at in drawn]
    assert found.value == pytest.approx(1 - np.mean(apart) / 255)
    assert len(asked) == len(drawn)
    with pytest.raises(ConfigError, match="at least 3 frames"):
        rules.smoothness(frames[:2], between)


def shifts(*pixels: float):
    """Return a flow that moves everything by these many pixels to the right, pair by pair."""
    left = iter(pixels)

    def flow(one, two):
        found = np.zeros((2, *one.shape[:2]))
        found[0] = next(left)
        return found

    return flow


def clip(frames: int, side: int = 128) -> np.ndarray:
    return np.zeros((frames, side, 2 * side, 3), np.uint8)


def test_the_strongest_vectors_are_a_share_rounded_down():
    flow = np.zeros((2, 5, 9))
    flow[:, 0, :4] = [[3, 6, 0, 9], [4, 8, 1, 12]]  # 5, 10, 1 and 15 long
    assert rules.strongest(flow, 0.05) == pytest.approx(12.5)  # 2 of 45
    with pytest.raises(ConfigError, match="no strongest 2%"):
        rules.strongest(flow, 0.02)


def test_dynamic_takes_a_quarter_of_the_pairs_beyond_6_pixels_on_256():
    least = 6 * 128 / 256  # the short side is 128
    moving, still = least + 0.01, least
    # 16 frames: 4 pairs; 10: round(2.5) = 2; 6: round(1.5) = 2; 3: 1
    for frames, needed in ((16, 4), (10, 2), (6, 2), (3, 1), (18, 4), (22, 6)):
        pairs = frames - 1
        enough = [moving] * needed + [still] * (pairs - needed)
        assert rules.is_dynamic(clip(frames), shifts(*enough[::-1])).value is True
        if needed > 1:
            assert rules.is_dynamic(clip(frames), shifts(*enough[1:], still)).value is False
    for frames in (1, 2):
        with pytest.raises(ConfigError, match=rf"3 frames.*8.*{frames}"):
            rules.is_dynamic(clip(frames), shifts())


def test_the_static_filter_bounds_neighbours_and_the_way_round():
    least = 3 * 128 / 256
    move = least + 0.01
    # 16 frames: 2 pairs may move; round trips up to 2 * 2 * T
    still = [0.0] * 13
    assert rules.is_static(clip(16), shifts(move, move, *still, 4 * least, 4 * least))
    assert not rules.is_static(clip(16), shifts(move, move, move, *still[1:], 0, 0))
    assert not rules.is_static(clip(16), shifts(*still, 0, 0, 4 * least + 0.01, 0))
    assert not rules.is_static(clip(16), shifts(*still, 0, 0, 0, 4 * least + 0.01))
    with pytest.raises(ConfigError, match=r"5 frames.*4"):
        rules.is_static(clip(4), shifts())


def test_objects_are_shares_of_frames():
    seen = [["cat", "dog"], ["cat"], ["dog"], []]
    found = rules.shows(seen, "cat and dog")
    assert (found.value, found.parts) == (0.25, 4)
    assert found.more == {"success_frame_count": 1, "frame_count": 4}
    assert rules.shows(seen, "cat").value == 0.5


def test_a_scene_is_all_its_words_within_words_as_well():
    captions = ["a train station at night", "a train", "stations and trains"]
    assert rules.is_scene(captions, "train station").value == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("file", "actions", "right"),
    [
        ("A person is riding a bike-0.mp4", [("riding a bike", 0.85)], True),
        ("A person is riding a bike-0.mp4", [("riding a bike", 0.84996)], True),  # rounds to .85
        ("A person is riding a bike-0.mp4", [("riding a bike", 0.8499)], False),
        ("A person is riding a bike-0.mp4", [("marching", 0.99)], False),
        ("A Person Is marching_x-3.mp4", [("marching", 0.9)], True),
        ("A person is push-up-3.mp4", [("push-up", 0.9)], False),  # ends at the first hyphen
        ("A person is marching-0.mp4", [*((f"other {i}", 0.99) for i in range(5)), ("marching", 0.9)], False),
    ],
)
def test_an_action_is_one_of_the_five_likeliest_and_likely(file, actions, right):
    found = rules.is_action(actions, file)
    assert (found.value, found.more) == (right, {"cor_num_per_video": int(right)})


def test_a_colour_is_counted_among_frames_that_call_one():
    captions = [
        [("a red umbrella", "umbrella"), ("a blue car", "car")],
        [("a blue umbrella", "umbrella")],
        [("an umbrella", "umbrella")],  # calls no colour
        [("a red car", "car")],
        [("a bored umbrella", "umbrella")],  # red is in bored
    ]
    found = rules.is_colored(captions, "a red umbrella", "red")
    assert found is not None
    assert found.value == pytest.approx(2 / 3)
    assert rules.is_colored(captions[2:4], "a red umbrella", "red") is None


BESIDE = [(0, 0, 10, 10), (20, 2, 30, 12)]
OVERLAP = [(0, 0, 10, 10), (5, 0, 15, 10)]  # a third overlaps
ABOVE = [(0, 0, 10, 10), (2, 20, 12, 30)]


@pytest.mark.parametrize(
    ("boxes", "relation", "score"),
    [
        (BESIDE, "on the left of", 1),
        (BESIDE, "on the right of", 1),
        (BESIDE, "on the top of", 0),
        (ABOVE, "on the bottom of", 1),
        (ABOVE, "on the left of", 0),
        (OVERLAP, "on the left of", 0.1 / (1 / 3)),
        (OVERLAP, "on the top of", 0),
        ([(0, 0, 10, 10), (20, 20, 30, 30)], "on the left of", 0),  # as far beside as above
    ],
)
def test_boxes_stand_along_one_axis(boxes, relation, score):
    assert rules.beside(*boxes, relation) == pytest.approx(score)
    assert rules.beside(*boxes[::-1], relation) == pytest.approx(score)


def test_a_frame_counts_its_best_pair_of_either_object():
    frames = [
        [("cat", BESIDE[0]), ("dog", BESIDE[1])],
        [("cat", ABOVE[0]), ("dog", ABOVE[1]), ("tree", BESIDE[1])],
        [("cat", BESIDE[0]), ("cat", BESIDE[1])],  # two cats are a pair, too
        [("dog", BESIDE[0])],
    ]
    found = rules.stands(frames, "cat", "dog", "on the left of")
    assert (found.value, found.parts) == (0.5, 4)
    assert found.more["frame_results"] == [1, 0, 1, 0]


def test_wrong_relations_and_boxes_are_refused():
    with pytest.raises(ConfigError, match="relation 'near'"):
        rules.beside(*BESIDE, "near")
    with pytest.raises(ConfigError, match=r"boxes.*area"):
        rules.beside((1, 1, 1, 1), (1, 1, 1, 1), "on the left of")


def test_likeness_is_a_mean_of_cosines():
    texts = torch.tensor([[1.0, 0.0]])
    frames = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    found = rules.likeness(texts, frames)
    assert (found.value, found.parts, found.more["cur_sim"]) == (pytest.approx(1.6 / 3), 3, 0)
