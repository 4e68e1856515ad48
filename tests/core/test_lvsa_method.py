"""LVSA: its config, its lists over tiles and steps, and how it meets decay, pooling, other methods and runs."""

import dataclasses

import numpy as np
import pytest
import torch
from dit_accel_kernels import EXACT, POOLED, SKIPPED
from one_layer import MODEL, OneLayer, context_of, random_call

from dit_accel import LVSA, ConfigError
from dit_accel.adapters.adapter import Family
from dit_accel.methods.attention.lvsa import LVSAHandler
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan
from dit_accel.plan.tiling import Tiling

LAYOUT = TokenLayout(frames=12, height=4, width=4, text_before=4, text_after=9)
CONFIG = LVSA(trained_frames=5, window=1, block_size=16)
FAMILY = Family(
    name="some", repo="", layers=1, heads=2, head_dim=8, ffn_dim=8, patch=(1, 2, 2), vae=(4, 8), height=16, width=16,
    num_frames=17, trained_frames=5,
)  # fmt: skip


def handler(config=CONFIG, family=FAMILY):
    return LVSAHandler(config, dataclasses.replace(MODEL, family=family, tiling=Tiling(config.block_size or 128)))


def test_the_trained_length_is_the_models_or_asked_for():
    assert handler(LVSA()).settings.trained_frames == 5
    assert handler(LVSA(trained_frames=9)).settings.trained_frames == 9
    with pytest.raises(ConfigError, match=r"lvsa.*length.*any, .*sizes"):
        LVSAHandler(LVSA(), MODEL)
    with pytest.raises(ConfigError, match=r"lvsa.*length.*some .*lvsa\.trained_fr"):
        handler(LVSA(), dataclasses.replace(FAMILY, trained_frames=None))


@pytest.mark.parametrize("block", [16, 32, 64])
def test_a_tile_is_exact_where_any_two_of_its_frames_meet(block):
    settings = handler(dataclasses.replace(CONFIG, block_size=block)).settings
    layout = dataclasses.replace(LAYOUT, height=3, width=5)
    for offset in settings.offsets(layout):
        visible = settings.rule.visible(layout.frames, offset)
        pairs = np.kron(visible, np.ones((15, 15), bool))
        kept = settings.kept(layout, offset)
        for i in range(len(kept)):
            for j in range(len(kept)):
                inside = pairs[i * block : (i + 1) * block, j * block : (j + 1) * block]
                assert kept[i, j] == inside.any()


def test_tiles_of_a_frame_are_the_rule_and_text_is_exact():
    settings = handler(dataclasses.replace(CONFIG, rest="pooled")).settings
    for step in range(7):
        states = settings.tiles(LAYOUT, step).states()[0].numpy()
        stride = settings.rule.stride(12)
        expected = np.where(settings.rule.visible(12, step % stride), EXACT, POOLED)
        assert np.array_equal(states[:12, :12], expected)
        assert (states[12:] == EXACT).all()
        assert (states[:, 12:] == EXACT).all()
        assert settings.tiles(LAYOUT, step) is settings.tiles(LAYOUT, step + stride)
    skipped = handler().settings.tiles(LAYOUT, 0).states()
    assert (skipped == SKIPPED).any()
    assert not (skipped == POOLED).any()
    still = handler(dataclasses.replace(CONFIG, rotate=False)).settings
    assert still.tiles(LAYOUT, 0) is still.tiles(LAYOUT, 3)


def test_anchors_move_from_step_to_step():
    torch.manual_seed(0)
    call, layer = random_call(LAYOUT), OneLayer(handler(), steps=20)
    outs = [layer.call(call.q, call.k, call.v, LAYOUT, step=step) for step in range(14)]
    stride = handler().settings.rule.stride(12)
    assert stride == 11
    for step in range(14):
        same = [torch.equal(outs[step], out) for out in outs]
        assert same == [(other - step) % stride == 0 for other in range(14)]
    standing = OneLayer(handler(dataclasses.replace(CONFIG, rotate=False)))
    outs = [standing.call(call.q, call.k, call.v, LAYOUT, step=step) for step in range(3)]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_it_says_what_it_leaves():
    short = handler().check_layout(dataclasses.replace(LAYOUT, frames=5))
    assert short == "lvsa leaves nothing out: 5 latent frames, trained on 5"
    text = handler().check_layout(LAYOUT)
    rule = handler().settings.rule
    assert text == (
        "lvsa: 12 latent frames, trained on 5; each sees 3 around it, the first 1 and every "
        f"{rule.stride(12)}th, moving by one a step, {rule.stride(12)} steps a round; {rule.density(12):.1%} of the "
        "frame pairs"
    )
    assert "at the same places in every step" in handler(dataclasses.replace(CONFIG, rotate=False)).check_layout(LAYOUT)


def test_the_estimate_is_the_mean_over_a_round():
    saving = handler().estimate(LAYOUT, 8)
    density = saving.tiles.keep(np.ones((12, 12))).mean()
    assert density == pytest.approx(handler().settings.rule.density(12))
    assert handler().estimate(dataclasses.replace(LAYOUT, frames=5), 8).tiles is None


def test_it_counts_the_step_of_the_run():
    plan = handler().plan
    call = random_call(LAYOUT)
    made = [plan(AttentionPlan(), call, context_of(LAYOUT, step_index=step)).tiles for step in (0, 1)]
    assert made[0] is not made[1]
    training = plan(AttentionPlan(), call, context_of(LAYOUT, step_index=1, training=True)).tiles
    assert training is made[0]
