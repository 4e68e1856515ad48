"""LVSA: its config, its lists over tiles and steps, and how it meets decay, pooling, other methods and runs."""

import dataclasses

import numpy as np
import pytest
import torch
from dit_accel_kernels import EXACT, POOLED, SKIPPED
from one_layer import MODEL, OneLayer, context_of, random_call
from wan_tiny import denoise, require_runs_do_not_meet, tiny_transformer

import dit_accel
from dit_accel import LVSA, ConfigError, LiteAttention, RadialAttention, RoPE, SparseD, UltraViCo
from dit_accel.adapters.adapter import Family
from dit_accel.methods.attention.lvsa import LVSAHandler
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan
from dit_accel.plan.tiling import Tiling
from dit_accel.testing.recording import recorded, require_as_planned, require_text_exact

LAYOUT = TokenLayout(frames=12, height=4, width=4, text_before=4, text_after=9)
CONFIG = LVSA(trained_frames=5, window=1, block_size=16)
FAMILY = Family(
    name="some", repo="", layers=1, heads=2, head_dim=8, ffn_dim=8, patch=(1, 2, 2), vae=(4, 8), height=16, width=16,
    num_frames=17, trained_frames=5,
)  # fmt: skip


def handler(config=CONFIG, family=FAMILY):
    return LVSAHandler(config, dataclasses.replace(MODEL, family=family, tiling=Tiling(config.block_size or 128)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(window=-1), r"lvsa\.window.*got -1"),
        (dict(first=-2), r"lvsa\.first.*got -2"),
        (dict(trained_frames=0), r"lvsa\.trained_frames.*got 0"),
        (dict(rest="drop"), r"lvsa\.rest.*got 'drop'"),
        (dict(block_size=100), r"lvsa\.block_size.*got 100"),
        (dict(rotate=1), r"lvsa\.rotate.*got 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LVSA(**options)


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


def test_clips_that_are_no_longer_stay_dense():
    transformer = tiny_transformer()
    plain = denoise(transformer, 2, frames=5)
    with dit_accel.attach(transformer, LVSA(trained_frames=5, window=1, block_size=16)) as attachment:
        assert torch.equal(denoise(transformer, 2, frames=5), plain)
        assert attachment.report().density == 1.0
        assert "lvsa leaves nothing out: 5 latent frames, trained on 5" in str(attachment.report())
        denoise(transformer, 2, frames=9)
        assert attachment.report().density < 1


def test_it_says_what_it_leaves():
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


TOGETHER = {
    "decay": (UltraViCo(trained_frames=3, alpha=0.5, first_frame=True),),
    "decay in bands": (UltraViCo(trained_frames=3, alpha=0.5, beta=0.2, period=5, gamma=1.0),),
    "radial": (RadialAttention(block_size=16, dense_steps=0, dense_layers=0),),
    "lite": (LiteAttention(block_size=16, dense_steps=0),),
    "sparsed": (SparseD(block_size=16, density=0.5, dense_steps=0, dense_last_steps=0, dense_layers=0),),
    "positions": (RoPE(trained_frames=3, kind="ntk"),),
}


@pytest.mark.sample
@pytest.mark.parametrize("rest", ["skip", "pooled"])
@pytest.mark.parametrize("others", TOGETHER)
def test_one_call_computes_what_they_say_together(others, rest):
    transformer = tiny_transformer()
    config = LVSA(trained_frames=4, window=1, block_size=16, rest=rest)
    with dit_accel.attach(transformer, config, *TOGETHER[others]) as attachment, recorded(attachment) as calls:
        found = denoise(transformer, 3, frames=9)
        again = denoise(transformer, 3, frames=9)
        assert attachment.report().density < 1
    assert torch.equal(found, again)
    require_as_planned(calls)
    for call in calls:
        require_text_exact(call)
    if others.startswith("decay"):
        assert all(call.plan.frame_decay is not None and call.plan.tiles is not None for call in calls)
    with dit_accel.attach(transformer, *TOGETHER[others], config):
        assert torch.equal(denoise(transformer, 3, frames=9), found)


def test_runs_do_not_meet():
    require_runs_do_not_meet(LVSA(trained_frames=2, window=0, block_size=16, rest="pooled"))


def test_it_counts_the_step_of_the_run():
    plan = handler().plan
    call = random_call(LAYOUT)
    made = [plan(AttentionPlan(), call, context_of(LAYOUT, step_index=step)).tiles for step in (0, 1)]
    assert made[0] is not made[1]
    training = plan(AttentionPlan(), call, context_of(LAYOUT, step_index=1, training=True)).tiles
    assert training is made[0]
