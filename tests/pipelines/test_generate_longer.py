"""`dit-accel generate --ultravico` on the embedded model, whose trained length is known."""

import json
from pathlib import Path

import pytest
from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.request import Request, resolve
from typer.testing import CliRunner

from dit_accel import ConfigError
from dit_accel.cli.app import app
from dit_accel.cli.method_options import select_methods

SMALL = ["--model", "wan-plain", "--num-inference-steps", "1", "--height", "32", "--width", "32", "--seed", "3"]


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


def warned(tmp_path, *flags: str, **options):
    methods = tuple(select_methods(flags, None, ()))
    asked = {"model": "wan-plain", **options}
    request = Request(prompts=("a red circle",), output=tmp_path / "a.mp4", methods=methods, **asked)
    return resolve(request).warnings


def test_sizes_beyond_the_trained_one_are_told(tmp_path: Path):
    (said,) = warned(tmp_path, num_frames=67)
    assert said == (
        "34 latent frames are 2.00 times the 17 that wan-plain was trained on, beyond which clips repeat themselves or "
        "fall apart; attach --ultravico or --lvsa or --rope"
    )
    assert len(warned(tmp_path, "radial", num_frames=67)) == 1
    for flag in ("rope", "lvsa", "ultravico"):
        assert not warned(tmp_path, flag, num_frames=67)
    assert not warned(tmp_path, num_frames=33)
    (large,) = warned(tmp_path, model="flux-tiny", height=144, width=144)
    assert large.startswith("18 rows of tokens are 1.50 times the 12 that flux-tiny was trained on, beyond which pict")
    assert large.endswith("attach --ultraimage or --rope")
    assert not warned(tmp_path, "ultraimage", model="flux-tiny", height=144, width=144)


@pytest.mark.parametrize("flags", [(), ("--quiet",)])
def test_they_are_warned_of_before_anything_is_made_also_when_quiet(tmp_path: Path, flags):
    out = ["--num-frames", "67", "-o", str(tmp_path / "a.mp4"), *flags]
    result = CliRunner().invoke(app, ["generate", "a red circle moving right", *SMALL, *out])
    assert result.exit_code == 0, result.stderr
    said = "warning: 34 latent frames are 2.00 times the 17 that wan-plain was trained on, beyond which clips repeat"
    notes = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    assert result.stderr.removeprefix("".join(f"{line}\n" for line in notes)).startswith(said)
    assert result.stderr.count("beyond which") == 1
    assert len(notes) == (not flags)  # that no method is attached


def test_of_several_processes_one_warns(capsys):
    for stages, warned in ((Stages(), True), (Stages(quiet=True), True), (Stages(silent=True), False)):
        stages.warn("too long")
        assert ("warning: too long" in capsys.readouterr().err) == warned


def test_lengths_beyond_the_tables_are_refused(tmp_path: Path):
    assert warned(tmp_path, num_frames=511)
    with pytest.raises(ConfigError, match=r"wan.*256 tokens.*frames, got 257"):
        warned(tmp_path, num_frames=513)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rope", "--set", "rope.kind=riflex"], "rope, kind riflex: 19 tokens along frames, trained on 17"),
        (["--lvsa", "--set", "lvsa.window=2"], "lvsa: 19 latent frames, trained on 17; each sees 5 around it"),
    ],
)
def test_the_switches_of_longer_clips(tmp_path: Path, flags, said):
    out = tmp_path / "a.mp4"
    arguments = ["generate", "a red circle moving right", *SMALL, "--num-frames", "37", *flags, "-o", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert said in " ".join(result.stderr.split())
    assert "beyond which" not in result.stderr


def test_the_switch_of_larger_pictures(tmp_path: Path):
    size = ["--height", "112", "--width", "128", "--num-inference-steps", "2"]
    model = ["--model", "flux-tiny", "--ultraimage", "-o", str(tmp_path / "a.png")]
    result = CliRunner().invoke(app, ["generate", "a red circle", *size, *model])
    assert result.exit_code == 0, result.stderr
    assert "ultraimage: 14 x 16 tokens, trained on 12 x 12; positions corrected" in " ".join(result.stderr.split())
    assert "heads as measured in the first step" in result.stderr
