"""VBench's rules of what was detected, which the world's scores take, on made clips with known answers."""

import pytest
import world_rules as rules

from dit_accel import ConfigError


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
    assert rules.middle(total, count) == places


def test_objects_are_shares_of_frames():
    seen = [["cat", "dog"], ["cat"], ["dog"], []]
    assert rules.shows(seen, "cat and dog") == 0.25
    assert rules.shows(seen, "cat") == 0.5


def test_a_colour_is_counted_among_frames_that_call_one():
    captions = [
        [("a red umbrella", "umbrella"), ("a blue car", "car")],
        [("a blue umbrella", "umbrella")],
        [("an umbrella", "umbrella")],  # calls no colour
        [("a red car", "car")],
        [("a bored umbrella", "umbrella")],  # red is in bored
    ]
    words = ("red", "blue")
    assert rules.is_colored(captions, "umbrella", "red", words) == pytest.approx(2 / 3)
    assert rules.is_colored(captions[2:4], "umbrella", "red", words) is None


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
    assert rules.stands(frames, "cat", "dog", "on the left of") == 0.5
    assert [rules.stands([one], "cat", "dog", "on the left of") for one in frames] == [1, 0, 1, 0]


def test_wrong_relations_and_boxes_are_refused():
    with pytest.raises(ConfigError, match="relation 'near'"):
        rules.beside(*BESIDE, "near")
    with pytest.raises(ConfigError, match=r"boxes.*area"):
        rules.beside((1, 1, 1, 1), (1, 1, 1, 1), "on the left of")
