"""`dit-accel tune period` on the embedded model, and what it refuses."""

import json
import tomllib

import pytest
import torch
from dit_accel_eval.runs.loaded import tuning_request
from dit_accel_eval.tune.period import Logits, tune_period
from one_layer import context_of, random_call
from typer.testing import CliRunner

from dit_accel import ConfigError, RadialAttention, UltraViCo
from dit_accel.attachment.layers import PlannedCall
from dit_accel.cli.app import app
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan

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
