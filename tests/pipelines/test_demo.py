"""The demo that `make demo` runs, with few steps."""

import json
from pathlib import Path

import imageio_ffmpeg
import typer
from dit_accel_pipelines.demo import main
from PIL import Image
from typer.testing import CliRunner


def test_the_demo_compares_and_writes(tmp_path: Path):
    app = typer.Typer()
    app.command()(main)
    out = tmp_path / "demo"
    result = CliRunner().invoke(app, ["--out", str(out), "--num-frames", "9", "--num-inference-steps", "2"])
    assert result.exit_code == 0, result.output
    files = {"dense.mp4", "radial.mp4", "fewer-steps.mp4", "comparison.png", "comparison.json"}
    assert {entry.name for entry in out.iterdir()} == files
    dense, radial, fewer = json.loads((out / "comparison.json").read_text())
    assert (dense["density"], dense["psnr"], dense["steps"]) == (1.0, None, 2)
    assert 0.1 < radial["density"] < 0.95
    assert fewer["steps"] == 2  # of 1.9, at this size
    assert radial["psnr"] > 5
    assert all(
        name in result.stdout for name in ("density", "steps", "seconds", "PSNR", "dense", "radial", "fewer-steps")
    )
    assert next(imageio_ffmpeg.read_frames(str(out / "radial.mp4")))["size"] == (256, 256)
    assert Image.open(out / "comparison.png").height > 3 * 256
