"""The command that prints how a server is started: its line, and what is missing."""

import shlex
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from dit_accel_pipelines.generation import serve
from typer.testing import CliRunner

from dit_accel.cli.app import app
from dit_accel.serving.settings import read_setting


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    """A folder with settings, beside both servers and the plugin."""
    (tmp_path / "a.toml").write_text("[easycache]\nthreshold = 0.1\n")
    (tmp_path / "b.toml").write_text("[slg]\nlayers = [99]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serve, "version", lambda package: "1.0")
    monkeypatch.setattr(serve, "entry_points", lambda **_: ["dit_accel"])
    for engine in serve.ENGINES.values():
        monkeypatch.delenv(engine.allowed, raising=False)
    return tmp_path


LINES = [
    ([], "vllm serve {model} --omni --diffusion-load-format diffusers", "balanced", "attaches easycache"),
    (["--engine", "sglang", "--setting", "fast"], "sglang serve --model-path {model} --backend diffusers", "fast", ""),
    (["--engine", "sglang", "--setting", "a.toml"], "sglang serve", "{here}/a.toml", "attaches easycache\n"),
]


@pytest.mark.parametrize(("words", "command", "setting", "said"), LINES)
def test_the_line_starts_a_server_with_a_setting_that_the_plugin_reads(words, command, setting, said, here: Path):
    result = CliRunner().invoke(app, ["serve", "wan-tiny", *words])
    (variable, *line) = shlex.split(result.stdout)
    model = next(word for word in line if word.endswith("wan-tiny"))
    assert shlex.join(line).startswith(command.format(model=model))
    assert (Path(model).is_dir(), result.exit_code) == (True, 0)
    assert variable == f"DIT_ACCEL={setting.format(here=here)}"
    assert not read_setting(variable.partition("=")[2]).empty
    assert said in result.stderr


def test_what_is_missing_is_a_line_each_and_the_exit_code(here: Path, monkeypatch):
    def version(package: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr(serve, "version", version)
    monkeypatch.setattr(serve, "entry_points", lambda **_: [])
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    result = CliRunner().invoke(app, ["serve", "wan-tiny", "--engine", "sglang"])
    assert (result.exit_code, len(result.stdout.splitlines())) == (1, 1)
    lines = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert ["sglang is not" in lines[0], "dit_accel is not" in lines[1], "SGLANG_PLUGINS=other" in lines[2]] == [
        True
    ] * 3


REFUSED = [
    (["--engine", "tgi"], "there is no engine 'tgi'; known: sglang, vllm-omni"),
    (["--setting", "none.toml"], "none.toml can't be read"),
    (["--setting", "b.toml"], "99"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_what_a_server_would_refuse_is_refused_here(words, message, here: Path):
    result = CliRunner().invoke(app, ["serve", "wan-tiny", *words])
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in " ".join(result.stderr.split())
