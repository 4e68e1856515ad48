"""`tune period`: what it measures and writes, the published models' spectra, and curves whose make is known."""

import json
import tomllib

import numpy as np
import pytest
import torch
from dit_accel_eval.runs.loaded import tuning_request
from dit_accel_eval.tune.period import Logits, harmonics, spectrum, tune_period
from hypothesis import given
from hypothesis import strategies as st
from one_layer import context_of, random_call
from typer.testing import CliRunner

from dit_accel import ConfigError, RadialAttention, UltraViCo
from dit_accel.attachment.layers import PlannedCall
from dit_accel.cli.app import app
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan
from dit_accel.rules.rotary_frequencies import frequencies

LAYOUT = TokenLayout(frames=6, height=2, width=3, text_before=2, text_after=1)
SMALL = dict(height=32, width=32, num_inference_steps=1)


def test_logits_are_summed_by_frames():
    torch.manual_seed(0)
    call, logits = random_call(LAYOUT), Logits()
    logits.add(PlannedCall(plan=AttentionPlan(), context=context_of(LAYOUT), call=call, out=call.v))
    q, k = (x[:, :, 2:38].reshape(2, 2, 6, 6, 8) for x in (call.q, call.k))
    expected = torch.stack([(q[:, :, f] * k[:, :, g]).sum(-1).mean() for f in range(6) for g in range(6)]) * 8**-0.5
    torch.testing.assert_close(logits.total.flatten(), expected.double(), atol=1e-5, rtol=1e-5)
    assert logits.calls == 1


def test_it_writes_and_prints(tmp_path):
    out = tmp_path / "wan.toml"
    flags = ["--height", "32", "--width", "32", "--num-inference-steps", "1", "-o", str(out)]
    result = CliRunner().invoke(
        app, ["tune", "period", "--model", "wan-plain", "--prompt", "a red circle", *flags, "--json"]
    )
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["frames"] == 34  # twice the trained length
    assert len(found["found"]["periods"]) == 6
    assert sum(found["found"]["amplitudes"]) == pytest.approx(1)
    assert [path.name for path in tmp_path.iterdir()] == ["wan.toml"]
    assert len(found["curve"]) == 34
    table = tomllib.loads(out.read_text())["ultravico"]
    assert table["trained_frames"] == 17
    assert ("period" in table) == (found["found"]["share"] > 0.5)
    UltraViCo(**{name: value for name, value in table.items() if name != "name"})
    assert "attention" in out.read_text().splitlines()[1]


def test_what_can_not_be_measured_is_refused(tmp_path):
    for options, message in (
        (dict(methods=(RadialAttention(),)), "tune period.*got --radial"),
        (dict(model="flux-tiny"), r"rotary positions.*flux"),
    ):
        with pytest.raises(ConfigError, match=message):
            tune_period(tuning_request(prompts=("a red circle",), **SMALL, **options), tmp_path / "a.toml")


HUNYUAN, COGVIDEOX, WAN = ((16, 256.0), 33), ((16, 1e4), 13), ((44, 1e4), 21)


def curve_of(own, amplitudes, frames):
    return 0.3 + np.cos(np.outer(np.arange(frames), own)) @ amplitudes


def test_families_of_the_published_models():
    assert harmonics(frequencies(*HUNYUAN[0]), 3) == (0, 1, 2, 3)  # 50.3 and its halves
    assert harmonics(frequencies(*COGVIDEOX[0]), 1) == (0, 1)  # 3.16 counts as 3
    assert harmonics(frequencies(*WAN[0]), 3) == (3,)  # 22.1 alone


def test_a_harmonic_model_repeats_and_an_inharmonic_one_does_not():
    own = frequencies(*HUNYUAN[0])
    found = spectrum(curve_of(own, np.array([0.2, 0.2, 0.3, 0.5, 0.1, 0.1, 0.0, 0.0]), 100), own)
    assert (found.period, found.gamma) == (pytest.approx(50.27, abs=0.01), 4.0)
    assert found.share > 0.75
    cog = frequencies(*COGVIDEOX[0])
    found = spectrum(curve_of(cog, np.array([0.3, 0.5, 0.1, 0.1, 0, 0, 0, 0]), 52), cog)
    assert (found.period, found.gamma) == (pytest.approx(19.87, abs=0.01), 1.0)
    wan = frequencies(*WAN[0])
    found = spectrum(curve_of(wan, np.array([0.3, 0.25, 0.25, 0.32, 0.2] + [0.0] * 17), 63), wan)
    assert found.period is None
    assert found.gamma is None


@given(
    amplitudes=st.lists(st.floats(0.05, 1), min_size=4, max_size=4), constant=st.floats(-5, 5),
    frames=st.integers(60, 120),
)  # fmt: skip
def test_the_fit_finds_what_a_curve_is_made_of(amplitudes, constant, frames):
    own = frequencies(16, 256.0)[:4]
    found = spectrum(constant + curve_of(own, np.array(amplitudes), frames), own)
    assert np.array(found.amplitudes) == pytest.approx(np.array(amplitudes) / sum(amplitudes), abs=1e-3)
    assert found.error < 1e-2
    assert sum(found.amplitudes) == pytest.approx(1)


def test_what_is_too_slow_to_be_told_from_a_constant_is_no_part():
    """Amplitudes such as those of wan-tiny: of 18 frames seven of its twelve frequencies see less than a quarter."""
    own = frequencies(24, 1e4)
    amplitudes = np.array([0.56, 1.05, 0.08, 0.08, 0.05, 0.03, 0.02, 0.06, 0.03, 0.03, 0.02, 0.07])
    found = spectrum(curve_of(own, amplitudes, 18), own)
    assert (found.period, found.gamma) == (pytest.approx(13.54, abs=0.01), 1.0)
    assert found.amplitudes[5:] == (0.0,) * 7


def test_a_multiple_is_near_a_whole_number_whatever_its_size():
    assert harmonics(np.array([0.1, 1.05, 2.15, 2.51]), 0) == (0, 3)  # 10.5 and 21.5 are out of step
    assert harmonics(np.array([0.1, 0.316, 0.95]), 0) == (0, 1)


def test_a_constant_curve_has_no_period():
    found = spectrum(np.full(30, 0.7), frequencies(16, 256.0))
    assert found.period is None
    assert set(found.amplitudes) == {0.0}


def test_the_error_is_what_the_fit_leaves():
    own = frequencies(16, 256.0)[:2]
    noise = np.random.default_rng(0).normal(size=200)
    found = spectrum(curve_of(own, np.array([0.0, 0.0]), 200) + noise, own)
    assert 0.9 < found.error <= 1
    assert spectrum(curve_of(own, np.array([0.5, 0.5]), 200), own).error < 1e-6
