"""dit-accel where the embedded models, a distribution of their own, are not installed."""

import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner
from wan_tiny import denoise, tiny_transformer

import dit_accel
from dit_accel.adapters.embedded import assets, embedded_names
from dit_accel.adapters.model_files import model_source
from dit_accel.cli.app import app
from dit_accel.errors import ConfigError, install

ROOT = Path(__file__).parents[2]


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "dit_accel_assets", None)  # as Python keeps what can't be imported


def test_they_are_there_or_not_and_a_package_that_they_lack_is_named(monkeypatch, tmp_path):
    assert embedded_names() == assets().model_names()
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "dit_accel_assets", None)
        assert embedded_names() == ()
        with pytest.raises(ConfigError, match=install("assets")):
            assets()
    (tmp_path / "dit_accel_assets.py").write_text("import no_such_package\n")
    monkeypatch.delitem(sys.modules, "dit_accel_assets", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        embedded_names()


@pytest.mark.parametrize(
    "words",
    ["generate circle --model wan-tiny -o a.mp4", "describe", "eval compare --easycache",
     "tune pipeline --target psnr=30 -o fast.toml", "finetune clips -o lora"],
)  # fmt: skip
def test_what_takes_one_by_default_says_what_to_install(absent, monkeypatch, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    found = CliRunner().invoke(app, words.split())
    assert (found.exit_code, found.stderr.count("\n")) == (2, 1)
    assert "'wan-tiny'" in found.stderr
    assert install("assets") in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["clips"]


def test_folders_hub_ids_and_attaching_need_none_of_them(absent, tmp_path):
    assert model_source(str(tmp_path)) == str(tmp_path)
    assert model_source("owner/name") == "owner/name"
    found = CliRunner().invoke(app, ["models"])
    assert (found.exit_code, f"embedded: none are installed; {install('assets')}" in found.stdout) == (0, True)
    transformer = tiny_transformer(num_layers=1)
    with dit_accel.attach(transformer, dit_accel.RadialAttention(dense_steps=0)) as attachment:
        denoise(transformer, 1)
        assert "radial" in str(attachment.report())


def test_no_module_imports_them_as_it_is_loaded():
    for room in ("dit_accel", "pipelines/dit_accel_pipelines", "eval/dit_accel_eval"):
        for path in (ROOT / room).rglob("*.py"):
            assert not re.search(r"^(from|import) dit_accel_assets", path.read_text(), re.MULTILINE), path
