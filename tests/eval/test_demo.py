"""The demo that `make demo` runs, on few and small frames."""

import json
from pathlib import Path
from types import SimpleNamespace

import demo
import imageio_ffmpeg
import numpy as np
import pytest
import typer
from PIL import Image
from report_tables import DEMO, demo_text
from typer.testing import CliRunner

from dit_accel import ConfigError


@pytest.mark.slow
def test_the_demo_compares_and_writes(tmp_path: Path):
    app = typer.Typer()
    app.command()(demo.main)
    out = tmp_path / "demo"
    result = CliRunner().invoke(app, ["--out", str(out), "--num-frames", "1", "--seeds", "2"])
    assert result.exit_code == 0, result.output
    assert {entry.name for entry in out.iterdir()} == {"comparison.mp4", "comparison.gif", "comparison.json"}
    written = json.loads((out / "comparison.json").read_text())
    dense, fewer, ours = written["arms"]
    assert (dense["num_inference_steps"], dense["work"]) == (30, [30.0, 30.0])
    assert fewer["num_inference_steps"] == np.ceil(30 * np.median(np.divide(ours["seconds"], dense["seconds"])))
    assert 5 <= np.mean(ours["work"]) < 0.75 * ours["num_inference_steps"]
    assert list(ours["methods"]) == ["easycache"]
    assert (dense["psnr"], min(ours["psnr"]) > 15) == ([], True)
    assert written["shown_seed"] in (0, 1)
    for text in ("against fewer steps", "dense", "fewer steps", "preset fast", "2 seeds", "That is one prompt"):
        assert text in result.stdout
    width, height = 3 * 64 * demo.SCALE, 2 * 64 * demo.SCALE + 4 * demo.LINE
    assert next(imageio_ffmpeg.read_frames(str(out / "comparison.mp4")))["size"] == (width, height)
    assert Image.open(out / "comparison.gif").size == (width, height)


def test_a_pause_of_the_machine_does_not_decide_the_rival(monkeypatch):
    """One dense run took ten times as long as the others."""
    seconds = iter([4.0, 2.4, 40.0, 2.4, 4.0, 2.4])

    def run(model, arm, seed):
        return SimpleNamespace(seconds=next(seconds, 2.5), frames=np.zeros((1, 8, 8, 3)), counts=None)

    monkeypatch.setattr(demo, "_run", run)
    monkeypatch.setattr(demo, "_outcome", lambda name, arm, runs, dense, model: (name, arm, runs))
    model = SimpleNamespace(run=lambda *args, **options: None)
    _, (name, fewer, _), _ = demo.compare(model, 3)
    assert (name, fewer.num_inference_steps) == ("fewer steps", 18)


def test_the_picture_is_of_the_seed_of_median_lead_and_the_middle_prompt_of_those_that_chose():
    ours, fewer = (SimpleNamespace(psnr=psnr) for psnr in ([40.0, 30.0, 35.0, 50.0], [30.0, 31.0, 30.0, 20.0]))
    assert demo.middle_seed(ours, fewer) == 2
    # PSNRs of the preset's cache in 30 steps on clips 200 and 203: 42.5 and 45.7 dB
    assert demo.shown_prompt("wan-tiny") == "two cyan grainy circles shrinking on a grainy black background"


@pytest.mark.parametrize(
    ("leads", "found"),
    [
        ([3.0, 1.0], "with too few seeds to compare its distance to the full run with {}: +2.0 dB over 2 seeds"),
        ([0.5, 1.5, 1.0, 0.8, 1.2, 1.0], "nearer to the full run than {}: +1.0 [+0.6, +1.4] dB over 6 seeds"),
        ([-0.5, -1.5, -1.0, -0.8, -1.2, -1.0], "farther from the full run than {}: -1.0 [-1.4, -0.6] dB over 6 seeds"),
        ([-1.0, 1.0, -2.0, 2.0, 0.0, 0.0], "with no sure difference in distance to the full run from {}: +0.0 ["),
    ],
)  # fmt: skip
def test_a_run_is_told_with_its_machine_and_rival(tmp_path: Path, leads, found):
    dense = {"num_inference_steps": 20, "psnr": [], "seconds": [4.0, 4.0]}
    fewer = {"num_inference_steps": 13, "psnr": [30.0] * len(leads), "seconds": [2.5, 2.7]}
    ours = {"arm": "preset fast", "psnr": [30.0 + lead for lead in leads], "seconds": [2.4, 2.4]}
    run = {"device": "a processor, 2 cores", "threads": 1, "model": "wan-tiny", "arms": [dense, fewer, ours]}
    (tmp_path / DEMO).parent.mkdir(parents=True)
    (tmp_path / DEMO).write_text(json.dumps(run))
    found = found.format("as much time spent on fewer steps (13, in 2.6 s)")
    assert demo_text(tmp_path).startswith(f"**1.7 times as fast** (the whole call, 2.4 s for 4.0), and {found}")
    assert demo_text(tmp_path).endswith(f" (one thread, a processor, 2 cores; [the run]({DEMO})).")


def test_a_prompt_of_unknown_words_and_an_unknown_model_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"word\(s\) kite"):
        demo.main(out=tmp_path, model="wan-plain", prompt="a kite", seeds=1, num_frames=None)
    with pytest.raises(ConfigError, match=r"'wan-tinny'.*'wan-tiny'"):
        demo.main(out=tmp_path, model="wan-tinny", prompt=None, seeds=1, num_frames=None)
