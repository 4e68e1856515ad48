"""The rules of rotary frequencies: published numbers, what each kind does, and what is refused."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_accel import ConfigError
from dit_accel.rules.rotary_frequencies import KINDS, corrections, dominant, edited, frequencies

HUNYUAN, COGVIDEOX, WAN, FLUX = (16, 256.0), (16, 1e4), (44, 1e4), (56, 1e4)  # channels and base of an axis

lengths = st.floats(1, 4096)
axes = st.tuples(st.integers(2, 64).map(lambda n: 2 * n), st.floats(2, 1e6))


def longer(kind, *axis, **options):
    return edited(kind, frequencies(*axis), **options)


def periods(*axis):
    return 2 * np.pi / frequencies(*axis)


def test_the_dominant_frequency_is_the_published_one():
    for axis, trained, place, period in (
        (HUNYUAN, 33, 3, 50.3),
        (COGVIDEOX, 13, 1, 19.9),
        (WAN, 21, 3, 22.1),  # LVSA's
        (FLUX, 128, 9, 121.3),  # FLUX.1, 2048 pixels
        (FLUX, 83, 8, 87.3),  # Qwen-Image, 1328 pixels
    ):
        own = frequencies(*axis)
        assert dominant(own, trained) == place
        assert 2 * np.pi / own[place] == pytest.approx(period, abs=0.05)


def test_riflex_is_its_code():
    found = 2 * np.pi / longer("riflex", *HUNYUAN, trained=33, length=66)
    own = periods(*HUNYUAN)
    assert (found != own).nonzero()[0].tolist() == [3]
    assert found[3] == pytest.approx(66 / 0.9)
    named = longer("riflex", *HUNYUAN, trained=33, length=99, period=25.0)
    assert (named != frequencies(*HUNYUAN)).nonzero()[0].tolist() == [2]
    assert math.cos(66 * longer("riflex", *HUNYUAN, trained=33, length=66, turn=1.0)[3]) == pytest.approx(1.0)


def test_ultraimage_corrects_the_published_lists():
    own = frequencies(*FLUX)
    assert corrections(own, 128, 225) == (9,)  # FLUX.1 at 3600 pixels
    assert corrections(own, 83, 256) == (8, 9)  # Qwen-Image at 4096
    flux = 2 * np.pi / longer("ultraimage", *FLUX, trained=128, length=225, turn=0.85)
    assert flux[9] == pytest.approx(264.7, abs=0.05)
    assert (flux != periods(*FLUX)).nonzero()[0].tolist() == [9]
    qwen = 2 * np.pi / longer("ultraimage", *FLUX, trained=83, length=256)
    assert qwen[[8, 9]].tolist() == pytest.approx([256, 256])
    listed = longer("ultraimage", *FLUX, trained=83, length=384, indices=(8, 9))
    assert (listed != own).nonzero()[0].tolist() == [8, 9]
    shuffled = own[::-1].copy()
    assert edited("ultraimage", shuffled, trained=83, length=256).tolist() == edited(
        "ultraimage", own, trained=83, length=256
    )[::-1].tolist()  # fmt: skip


@given(axis=axes, trained=lengths, ratio=st.floats(1.01, 16))
def test_the_formulas(axis, trained, ratio):
    own, length = frequencies(*axis), trained * ratio
    dim, theta = axis
    s = length / trained
    assert longer("pi", *axis, trained=trained, length=length) == pytest.approx(own / s)
    base = theta * s ** (dim / (dim - 2))
    assert longer("ntk", *axis, trained=trained, length=length) == pytest.approx(frequencies(dim, base))
    ramp = np.clip((trained * own / (2 * np.pi) - 1) / 31, 0, 1)
    yarn = longer("yarn", *axis, trained=trained, length=length)
    assert yarn == pytest.approx(ramp * own + (1 - ramp) * own / s)


@given(axis=axes, kind=st.sampled_from(KINDS), trained=lengths, ratio=st.floats(0.01, 1))
def test_nothing_changes_up_to_the_trained_length(axis, kind, trained, ratio):
    own = frequencies(*axis)
    assert longer(kind, *axis, trained=trained, length=trained * ratio).tolist() == own.tolist()


@given(axis=axes, kind=st.sampled_from(KINDS), trained=st.floats(1, 200), ratio=st.floats(1, 16))
def test_frequencies_fall_by_s_at_most_and_the_others_stay(axis, kind, trained, ratio):
    own = frequencies(*axis)
    try:
        found = longer(kind, *axis, trained=trained, length=trained * ratio)
    except ConfigError:
        assert kind in ("riflex", "ultraimage")
        assert (2 * np.pi / own).max() < 0.9 * trained
        return
    assert np.isfinite(found).all()
    assert (found <= own * (1 + 1e-12)).all()
    assert (found > 0).all()
    changed = (found != own).nonzero()[0]
    if kind == "riflex":
        assert len(changed) <= 1
        assert changed.size == 0 or found[changed[0]] == pytest.approx(0.9 * 2 * np.pi / (trained * ratio))
    elif kind == "ultraimage":
        assert found[changed] == pytest.approx(np.full(changed.size, 2 * np.pi / (trained * ratio)))
    else:
        assert (found >= own / ratio * (1 - 1e-9)).all()


def test_learned_frequencies_have_no_place_of_their_own():
    own = np.array([[0.5, -0.1], [0.2, 0.3]])
    assert edited("pi", own, trained=4, length=8).tolist() == (own / 2).tolist()
    assert edited("yarn", own, trained=4, length=8).shape == own.shape
    for kind in ("ntk", "riflex", "ultraimage"):
        with pytest.raises(ConfigError, match=rf"'{kind}'.*\(2, 2\).*'pi'"):
            edited(kind, own, trained=4, length=8)


def test_the_least_period_that_is_near_is_dominant():
    """NEAR times the extent itself is near; of longer ones the shortest is taken, in whatever order they stand."""
    own = 2 * np.pi / np.array([40.0, 9.0, 18.0, 8.999])
    assert dominant(own, 10) == 1
    assert dominant(own, 10.001) == 2
    assert dominant(own, 44.4) == 0
    with pytest.raises(ConfigError, match=r"8\.999 to 40 positions.*44\.5"):
        dominant(own, 44.5)


def test_a_period_that_fits_twice_to_the_token_is_corrected():
    own = 2 * np.pi / np.array([10.0, 20.0, 40.0])
    assert corrections(own, 10, 39.999) == (0,)
    assert corrections(own, 10, 40) == (0, 1)
    assert corrections(own, 10, 80.001) == (0, 1, 2)


def test_a_frequency_changes_from_its_period_on():
    own = 2 * np.pi / np.array([10.0, 20.0])
    assert edited("riflex", own, trained=10, length=10.0).tolist() == own.tolist()
    assert edited("riflex", own, trained=9, length=10.0, period=10.0).tolist() == own.tolist()
    assert edited("riflex", own, trained=9, length=10.001, period=10.0)[0] == pytest.approx(0.9 * 2 * np.pi / 10.001)
    assert edited("riflex", own, trained=9, length=12, period=14.9)[0] != own[0]  # the nearer of both
    assert edited("riflex", own, trained=9, length=22, period=15.1)[1] != own[1]


def test_options_at_their_bounds():
    assert frequencies(2, 1.001).tolist() == [1.0]
    assert frequencies(4, 9.0, exponents=[0.0, 0.5]).tolist() == pytest.approx([1.0, 1 / 3])
    for kind, options in (
        ("riflex", dict(turn=1.0)), ("ultraimage", dict(turn=1e-9)), ("ultraimage", dict(indices=(0,))),
        ("ultraimage", dict(indices=(7,))), ("riflex", dict(period=1e-9)),
    ):  # fmt: skip
        assert longer(kind, 16, 256.0, trained=33, length=66, **options).shape == (8,)


def test_axes_that_are_none():
    for dim, theta, exponents, message in (
        (0, 9.0, None, "got dim=0"),
        (1, 9.0, None, "got dim=1"),
        (3, 9.0, None, "got dim=3"),
        (4, 1.0, None, r"above 1, got theta=1\.0"),
        (4, 9.0, [0.0], r"dim=4.*2 frequencies, got 1 exponents"),
    ):
        with pytest.raises(ConfigError, match=message):
            frequencies(dim, theta, exponents=exponents)


def test_the_ramp_of_yarn_ends_at_one_turn_and_at_32():
    own = 2 * np.pi * np.array([32.0, 16.5, 1.0, 0.5]) / 64
    found = edited("yarn", own, trained=64, length=128)
    assert found == pytest.approx(own * np.array([1.0, 0.75, 0.5, 0.5]))


def test_an_axis_of_one_frequency():
    for kind in ("ntk", "yarn", "riflex", "ultraimage"):
        assert np.isfinite(longer(kind, 2, 100.0, trained=4, length=8)).all()


def test_bad_options_are_refused():
    lengths = dict(trained=4, length=8)
    for kind, options, message in (
        ("rifelx", {}, r"'rifelx'.*'riflex'\?"),
        ("pi", dict(period=3), r"'pi'.*got period=3;"),
        ("ntk", dict(turn=0.9), r"'ntk'.*no turn"),
        ("riflex", dict(indices=(1,)), r"'riflex'.*got indices=\(1,\)"),
        ("riflex", dict(period=0), r"period.*above 0, got 0"),
        ("riflex", dict(turn=1.5), r"turn.*0.*1, got 1.5"),
        ("riflex", dict(turn=0), r"turn.*0.*1, got 0"),
        ("ultraimage", dict(indices=(-1,)), r"indices.*0.*got \(-1,\)"),
        ("ultraimage", dict(indices=()), r"indices.*0.*got \(\)"),
        ("ultraimage", dict(indices=(8,)), r"8 frequencies, 0 to 7, got indices=\(8,\)"),
        ("riflex", dict(trained=4000, length=8000), r"6.283 to 804.2 positions"),
    ):
        with pytest.raises(ConfigError, match=message):
            longer(kind, 16, 256.0, **{**lengths, **options})
