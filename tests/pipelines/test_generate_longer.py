"""`dit-accel generate` beyond the trained length and size, on embedded models, which are known to the pixel."""

import json
from pathlib import Path

import pytest
from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.request import Request, resolve
from typer.testing import CliRunner

from dit_accel import ConfigError
from dit_accel.cli.app import app
from dit_accel.cli.method_options import select_methods

SMALL = ["--model", "wan-plain", "--num-inference-steps", "1", "--height", "32", "--width", "32", "--num-frames"]
LARGER = ["--model", "flux-tiny", "--height", "112", "--width", "128", "--num-inference-steps", "2", "--ultraimage"]
RUNS = [
    ([*SMALL, "33", "--ultravico"], "ultravico changes nothing: 17 latent frames, trained on 17"),
    ([*SMALL, "33", "--ultravico"], "attention calls: 12 dense, 0 sparse"),
    ([*SMALL, "37", "--ultravico"], "ultravico: 19 latent frames, 1.12 times the trained 17"),
    ([*SMALL, "37", "--ultravico"], "attention calls: 0 dense, 12 sparse"),
    ([*SMALL, "37", "--rope", "--set", "rope.kind=riflex"], "kind riflex: 19 tokens along frames, trained on 17"),
    ([*SMALL, "37", "--lvsa", "--set", "lvsa.window=2"], "lvsa: 19 latent frames, trained on 17; each sees 5 around"),
    (LARGER, "ultraimage: 14 x 16 tokens, trained on 12 x 12; positions corrected"),
    (LARGER, "heads as measured in the first step"),
]
BEYOND = "34 latent frames are 2.00 times the 17 that wan-plain was trained on, beyond which clips repeat themselves or"


def test_methods_for_larger_outputs_say_in_the_report_what_they_did(tmp_path: Path):
    made: dict[str, str] = {}
    for arguments, line in RUNS:
        key = " ".join(arguments)
        if key not in made:
            result = CliRunner().invoke(app, ["generate", "a red circle", *arguments, "-o", str(tmp_path / "a.png")])
            assert result.exit_code == 0, result.stderr
            made[key] = " ".join(result.stderr.split())
            record = json.loads((tmp_path / "a.png.json").read_text())
            assert "--ultravico" not in arguments or "trained_frames" in json.dumps(record)
        assert line in made[key]
        assert "beyond which" not in made[key]


def warnings_of(tmp_path: Path, *flags: str, **options) -> list[str]:
    methods = tuple(select_methods(flags, None, ()))
    options = {"model": "wan-plain", **options}
    return resolve(Request(prompts=("a red circle",), output=tmp_path / "a.mp4", methods=methods, **options)).warnings


def test_sizes_beyond_the_trained_one_are_told(tmp_path: Path):
    assert warnings_of(tmp_path, num_frames=67) == [f"{BEYOND} fall apart; attach --ultravico or --lvsa or --rope"]
    assert len(warnings_of(tmp_path, "radial", num_frames=67)) == 1
    for flag in ("rope", "lvsa", "ultravico"):
        assert not warnings_of(tmp_path, flag, num_frames=67)
    assert not warnings_of(tmp_path, num_frames=33)
    (large,) = warnings_of(tmp_path, model="flux-tiny", height=144, width=144)
    assert large.startswith("18 rows of tokens are 1.50 times the 12 that flux-tiny was trained on, beyond which pict")
    assert large.endswith("attach --ultraimage or --rope")
    assert not warnings_of(tmp_path, "ultraimage", model="flux-tiny", height=144, width=144)
    assert warnings_of(tmp_path, num_frames=511)
    with pytest.raises(ConfigError, match=r"wan.*256 tokens.*frames, got 257"):
        warnings_of(tmp_path, num_frames=513)


def test_they_are_warned_of_before_anything_is_made_also_when_quiet(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("dit_accel_pipelines.generation.generate.load_pipeline", lambda request: 1 / 0)
    arguments = ["generate", "a red circle", *SMALL, "67", "-o", str(tmp_path / "a.mp4")]
    for flags in ([], ["--quiet"]):
        result = CliRunner().invoke(app, [*arguments, *flags])
        lines = [line for line in result.stderr.splitlines() if not line.startswith("error: ")]
        assert [line[: len(BEYOND) + 9] for line in lines if line.startswith("warning: ")] == [f"warning: {BEYOND}"]
        assert len(lines) == 2 - len(flags)  # a note that no method is attached
    Stages(silent=True).warn("too long")  # as all but one of several processes
    assert not capsys.readouterr().err
