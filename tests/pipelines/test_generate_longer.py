"""`dit-accel generate --ultravico` on the embedded model, whose trained length is known."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dit_accel.cli.app import app

SMALL = ["--num-inference-steps", "1", "--height", "32", "--width", "32", "--seed", "3"]


@pytest.mark.parametrize(
    ("frames", "calls", "said"),
    [
        ("33", "attention calls: 12 dense, 0 sparse", "ultravico changes nothing: 17 latent frames, trained on 17"),
        ("37", "attention calls: 0 dense, 12 sparse", "ultravico: 19 latent frames, 1.12 times the trained 17"),
    ],
)
def test_clips_longer_than_trained_decay_and_the_report_says_so(tmp_path: Path, frames: str, calls: str, said: str):
    out = tmp_path / "a.mp4"
    arguments = ["generate", "a red circle moving right", *SMALL, "--num-frames", frames, "--ultravico", "-o", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert calls in result.stderr
    assert said in " ".join(result.stderr.split())
    record = json.loads((tmp_path / "a.mp4.json").read_text())
    assert "trained_frames" in json.dumps(record)
