"""LVSA: its rule as published, its lists over tiles and steps, and what it says of them."""

import dataclasses
import itertools

import numpy as np
import pytest
from dit_accel_kernels import EXACT, POOLED, SKIPPED
from hypothesis import given, settings
from hypothesis import strategies as st
from one_layer import FAMILY, MODEL, context_of, random_call

from dit_accel import LVSA, ConfigError
from dit_accel.methods.attention.lvsa import LVSAHandler
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan
from dit_accel.plan.tiling import Tiling
from dit_accel.rules.lvsa import AnchorRule

LAYOUT = TokenLayout(frames=12, height=4, width=4, text_before=4, text_after=9)
CONFIG = LVSA(trained_frames=5, window=1, block_size=16)


def handler(config=CONFIG, family=FAMILY):
    return LVSAHandler(config, dataclasses.replace(MODEL, family=family, tiling=Tiling(config.block_size or 128)))


def test_the_trained_length_is_the_models_or_asked_for():
    assert handler(LVSA()).settings.trained_frames == 3
    assert handler(LVSA(trained_frames=9)).settings.trained_frames == 9
    with pytest.raises(ConfigError, match=r"lvsa.*length.*any, .*sizes"):
        LVSAHandler(LVSA(), MODEL)
    with pytest.raises(ConfigError, match=r"lvsa.*length.*some .*lvsa\.trained_fr"):
        handler(LVSA(), dataclasses.replace(FAMILY, trained_frames=None))


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_a_tile_is_exact_where_any_two_of_its_frames_meet(block):
    made = handler(dataclasses.replace(CONFIG, block_size=block))
    layout, settings, each = dataclasses.replace(LAYOUT, height=5, width=9), made.settings, []
    tiles = -(-layout.visual_tokens // block)
    for offset in settings.offsets(layout):
        pairs = np.kron(settings.rule.visible(layout.frames, offset), np.ones((45, 45), bool))
        pairs = np.pad(pairs, (0, tiles * block - len(pairs))).reshape(tiles, block, tiles, block)
        each.append(pairs.any((1, 3)))
        assert np.array_equal(settings.kept(layout, offset), each[-1])
    saving, rows = made.estimate(layout, 8), slice(1, 4)
    assert np.array_equal(saving.tiles.keep(np.full((3, tiles), 0.7), rows), 0.7 * np.mean(each, axis=0)[rows])


@pytest.mark.parametrize(("rest", "other"), [("pooled", POOLED), ("skip", SKIPPED)])
def test_tiles_of_a_frame_are_the_rule_and_text_is_exact(rest, other):
    settings = handler(dataclasses.replace(CONFIG, rest=rest)).settings
    stride = settings.rule.stride(12)
    for step in range(7):
        states = settings.tiles(LAYOUT, step).states()[0].numpy()
        expected = np.where(settings.rule.visible(12, step % stride), EXACT, other)
        assert np.array_equal(states[:12, :12], expected)
        assert (states[12:] == EXACT).all()
        assert (states[:, 12:] == EXACT).all()
        assert settings.tiles(LAYOUT, step) is settings.tiles(LAYOUT, step + stride)


@pytest.mark.parametrize(("rotate", "training", "apart"), [(True, False, 11), (False, False, 1), (True, True, 1)])
def test_anchors_move_from_step_to_step(rotate, training, apart):
    made, call = handler(dataclasses.replace(CONFIG, rotate=rotate)), random_call(LAYOUT)
    assert made.settings.rule.stride(12) == 11
    contexts = [context_of(LAYOUT, step_index=step, training=training) for step in range(14)]
    tiles = [made.plan(AttentionPlan(), call, context).tiles for context in contexts]
    for step, other in itertools.product(range(14), repeat=2):
        assert (tiles[step] is tiles[other]) == ((other - step) % apart == 0)


def test_it_says_what_it_leaves():
    short = dataclasses.replace(LAYOUT, frames=5)
    assert handler().check_layout(short) == "lvsa leaves nothing out: 5 latent frames, trained on 5"
    assert "each sees 3 around it, the first 1 and every 11th, moving by one a step" in handler().check_layout(LAYOUT)
    seen = [handler().settings.rule.visible(12, offset).mean() for offset in range(11)]
    assert handler().settings.rule.density(12) == np.mean(seen)
    assert handler().estimate(short, 8).tiles is None


rules = st.builds(AnchorRule, trained_frames=st.integers(1, 40), window=st.integers(0, 9), first=st.integers(0, 4))


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
    for frame, others in ((5, {3, 5, 6}), (0, {2, 3, 5}), (11, {8, 9, 11})):  # around 5 wider to one side, past 4 and 7
        assert set(np.flatnonzero(seen[frame])) == anchors | others


@pytest.mark.parametrize(("first", "trained"), [(1, 5), (4, 5), (5, 5), (6, 5)])
def test_a_clip_is_left_whole_up_to_the_trained_length_and_one_beyond_the_first_frames(first, trained):
    rule, whole = AnchorRule(trained_frames=trained, window=1, first=first), max(trained, first + 1)
    assert rule.stride(whole) == 1
    assert rule.stride(whole + 1) > 1


def test_anchors_come_round_to_the_beginning():
    rule = AnchorRule(trained_frames=7, window=1, first=0)
    assert np.flatnonzero(rule.anchors(10, 4, 3)).tolist() == [1, 3, 7]  # 3, 7, 11 mod 10
    assert rule.anchors(10, 4, 7).tolist() == rule.anchors(10, 4, 3).tolist()


@given(rule=rules, frames=st.integers(1, 60), offset=st.integers(0, 60))
@settings(max_examples=50, deadline=None)
def test_every_frame_sees_itself_the_first_ones_and_as_many_others(rule, frames, offset):
    seen, stride = rule.visible(frames, offset), rule.stride(frames)
    assert seen.diagonal().all()
    assert seen[:, : rule.first].all()
    anchors = rule.anchors(frames, stride, offset)
    others = min(2 * rule.window + 1, int((~anchors).sum()))
    assert (seen.sum(1) == anchors.sum() + others).all()


@given(rule=rules, frames=st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_over_a_round_of_steps_every_frame_sees_every_other(rule, frames):
    rounds = [rule.visible(frames, step) for step in range(rule.stride(frames))]
    assert np.any(rounds, axis=0).all()
    assert rule.visible(frames).tolist() == rounds[0].tolist() == rule.visible(frames, len(rounds)).tolist()
