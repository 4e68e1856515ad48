"""LVSA's rule: strides and sparsities as published, who sees whom, and how anchors move on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.rules.lvsa import AnchorRule

rules = st.builds(
    AnchorRule, trained_frames=st.integers(1, 40), window=st.integers(0, 9), first=st.integers(0, 4)
)  # fmt: skip


@pytest.mark.parametrize(
    ("trained", "window", "frames", "stride", "sparsity"),
    [
        (21, 4, 33, 2, 21.2), (21, 4, 41, 3, 43.1), (21, 4, 81, 7, 73.2), (21, 4, 121, 10, 81.2),
        (21, 3, 33, 2, 27.3), (21, 3, 41, 3, 48.0), (21, 3, 81, 6, 73.3), (21, 3, 121, 9, 82.0),
        (33, 4, 41, 2, 26.8), (33, 4, 49, 2, 30.6), (33, 4, 65, 3, 51.8), (33, 4, 81, 3, 54.7), (33, 4, 121, 5, 71.4),
    ],
)  # fmt: skip
def test_the_released_strides_and_sparsities(trained, window, frames, stride, sparsity):
    rule = AnchorRule(trained_frames=trained, window=window, first=1)
    assert rule.stride(frames) == stride
    assert 100 * (1 - rule.density(frames)) == pytest.approx(sparsity, abs=0.051)


def test_who_sees_whom():
    rule = AnchorRule(trained_frames=7, window=1, first=1)
    assert rule.stride(12) == 3
    seen = rule.visible(12, offset=1)
    anchors = {0, 1, 4, 7, 10}
    assert set(np.flatnonzero(rule.anchors(12, 3, 1))) == anchors
    assert set(np.flatnonzero(seen[5])) == anchors | {3, 5, 6}  # 4 and 7 are anchors: wider to one side
    assert set(np.flatnonzero(seen[0])) == anchors | {2, 3, 5}
    assert set(np.flatnonzero(seen[11])) == anchors | {8, 9, 11}


def test_anchors_stand_at_the_beginning_unless_they_are_moved():
    rule = AnchorRule(trained_frames=7, window=1, first=1)
    assert rule.visible(12).tolist() == rule.visible(12, 0).tolist()
    assert rule.visible(12, 1).tolist() != rule.visible(12, 0).tolist()
    assert rule.visible(12, 3).tolist() == rule.visible(12, 0).tolist()


@pytest.mark.parametrize(("first", "trained"), [(1, 5), (4, 5), (5, 5), (6, 5)])
def test_a_clip_is_left_whole_up_to_the_trained_length_and_one_beyond_the_first_frames(first, trained):
    rule, whole = AnchorRule(trained_frames=trained, window=1, first=first), max(trained, first + 1)
    assert rule.stride(whole) == 1
    assert rule.stride(whole + 1) > 1


def test_anchors_come_round_to_the_beginning():
    rule = AnchorRule(trained_frames=7, window=1, first=0)
    assert np.flatnonzero(rule.anchors(10, 4, 3)).tolist() == [1, 3, 7]  # 3, 7, 11 mod 10
    assert rule.anchors(10, 4, 7).tolist() == rule.anchors(10, 4, 3).tolist()


@given(rule=rules, frames=st.integers(1, 90), offset=st.integers(0, 60))
def test_every_frame_sees_itself_the_first_ones_and_as_many_others(rule, frames, offset):
    seen, stride = rule.visible(frames, offset), rule.stride(frames)
    assert seen.diagonal().all()
    assert seen[:, : rule.first].all()
    if frames <= max(rule.first + 1, rule.trained_frames):
        assert stride == 1
    if stride == 1:
        assert seen.all()
        return
    anchors = rule.anchors(frames, stride, offset)
    others = min(2 * rule.window + 1, int((~anchors).sum()))
    assert (seen.sum(1) == anchors.sum() + others).all()


@given(rule=rules, frames=st.integers(1, 90))
def test_over_a_round_of_steps_every_frame_sees_every_other(rule, frames):
    rounds = [rule.visible(frames, step) for step in range(rule.stride(frames))]
    assert np.any(rounds, axis=0).all()
