"""UltraViCo's rule: decay by frame distance, the published values, and how long a clip gets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_accel import UltraViCo
from dit_accel.adapters import installed
from dit_accel.methods.attention.ultravico import UltraViCoHandler
from dit_accel.methods.base import Model
from dit_accel.rules.ultravico import DecayRule, extended_frames, output_frames, strengths


def test_wan_at_three_times_its_length():
    t = DecayRule(trained_frames=21, alpha=0.9).table(63)
    assert t.dtype == np.float32
    assert t.tolist() == [1.0] * 11 + [np.float32(0.9)] * 52


def test_hunyuan_at_four_times_its_length_has_its_published_bands():
    t = DecayRule(trained_frames=33, alpha=0.9, beta=0.8, period=50, gamma=4).table(132)
    bands = {*range(46, 55), *range(96, 105)}
    expected = [1.0 if d <= 16 else 0.8 if d in bands else 0.9 for d in range(132)]
    assert t.tolist() == np.float32(expected).tolist()


def test_the_window_goes_before_bands_and_distance_zero_is_no_band():
    t = DecayRule(trained_frames=9, alpha=0.9, beta=0.6, period=3, gamma=1).table(9)
    assert t.tolist() == np.float32([1, 1, 1, 1, 1, 0.6, 0.6, 0.6, 0.6]).tolist()
    wide = DecayRule(trained_frames=1, alpha=0.9, beta=0.6, period=20, gamma=6).table(16)
    assert wide.tolist() == np.float32([1, *[0.9] * 13, 0.6, 0.6]).tolist()


@given(
    trained=st.integers(1, 40), frames=st.integers(1, 160), alpha=st.floats(0.1, 1), beta=st.floats(0.1, 1),
    period=st.floats(1.5, 60), gamma=st.floats(0, 8),
)  # fmt: skip
def test_the_table_is_the_formula(trained, frames, alpha, beta, period, gamma):
    t = DecayRule(trained_frames=trained, alpha=alpha, beta=beta, period=period, gamma=gamma).table(frames)
    for d in range(frames):
        in_band = any(abs(d - m * period) <= gamma for m in range(1, 200))
        expected = 1.0 if d <= trained / 2 else beta if in_band else alpha
        assert t[d] == np.float32(expected)


@given(x=st.floats(-50, 50), t=st.floats(0.01, 1))
def test_the_minimum_is_the_piecewise_rule_and_keeps_the_order(x, t):
    assert min(x, t * x) == (t * x if x > 0 else x)
    assert min(x, t * x) <= min(x + 1, t * (x + 1))


PUBLISHED = [
    ("wan2.1-1.3b", 21, {2: (0.9, None), 3: (0.9, None), 4: (0.9, None)}, None, None),
    ("hunyuan-video", 33, {2: (0.95, 0.6), 3: (0.9, 0.6), 4: (0.9, 0.8), 5: (0.9, 0.8)}, 50, 4),
    ("cogvideox-5b", 13, {2: (0.9, 0.6), 3: (0.9, 0.6), 4: (0.85, 0.6)}, 20, 1),
]


@pytest.mark.parametrize(("name", "trained", "by_ratio", "period", "gamma"), PUBLISHED, ids=lambda x: str(x)[:15])
def test_published_defaults(name, trained, by_ratio, period, gamma):
    family = installed.family(name)
    adapter = next(adapter for adapter in installed.adapters().values() if family in adapter.families)
    for ratio, (alpha, beta) in by_ratio.items():
        model = Model(adapter=adapter, family=family, heads=family.heads, layers=family.layers)
        handler = UltraViCoHandler(UltraViCo(), model)
        rule = handler.rule(trained * ratio)
        assert (rule.trained_frames, rule.alpha, rule.beta, rule.period, rule.gamma) == (
            trained, alpha, beta, period, gamma,
        )  # fmt: skip
    assert handler.settings.first_frame == (name == "wan2.1-1.3b")


@pytest.mark.parametrize(
    ("name", "trained"),
    [("wan2.1-14b", 21), ("wan2.2-a14b", 21), ("wan2.2-ti2v-5b", 31), ("wan-plain", 17), ("helios-14b", None),
     ("wan2.2-animate-14b", None), ("skyreels-v2-14b-540p", None), ("flux.1-dev", None)],
)  # fmt: skip
def test_trained_lengths(name, trained):
    assert installed.family(name).trained_frames == trained


def test_known_trained_lengths_are_what_the_default_output_has():
    """Where a released model has one native length, its default output has it; the embedded one has two."""
    for family in installed.families().values():
        if family.trained_frames is not None and family.name != "wan-plain":
            assert output_frames(family.trained_frames * family.patch[0], family.vae[0]) == family.num_frames, family


def test_the_nearest_ratio_counts_and_of_two_the_larger():
    table = ((2.0, 0.95, 0.6), (3.0, 0.9, None), (4.0, 0.85, 0.8))
    assert strengths(table, 1.1) == (0.95, 0.6)
    assert strengths(table, 2.5) == (0.9, None)
    assert strengths(table, 3.4) == (0.9, None)
    assert strengths(table, 9.0) == (0.85, 0.8)


def test_the_output_frames_of_a_ratio():
    assert [extended_frames(21, ratio, 4) for ratio in (1, 2, 3, 4)] == [81, 165, 249, 333]
    assert extended_frames(33, 3, 4) == 393
    assert extended_frames(13, 1.5, 4) == 77  # 19.5 latent frames are 20
    assert extended_frames(17, 2, 2) == 67
