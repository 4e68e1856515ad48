"""What a server's setting may be, and what its plugins load while nobody asks for them."""

import subprocess
import sys

import pytest

from dit_accel import ConfigError, EasyCache
from dit_accel.serving.settings import ServerSetting, read_setting, requested


def test_a_word_is_a_preset_and_none_is_nothing():
    for level in ("careful", "balanced", "fast"):
        assert read_setting(level) == ServerSetting(preset=level)
        assert not read_setting(level).empty
    assert read_setting("none").empty
    assert requested({}) == requested({"DIT_ACCEL": "  "}) == ""
    assert requested({"DIT_ACCEL": " fast\n"}) == "fast"


def test_a_file_gives_methods_and_what_it_says_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.toml").write_text(
        "[easycache]\nthreshold = 0.1\n\n[run]\nnum_inference_steps = 8\nsolver = 'euler'\n"
    )
    setting = ServerSetting((EasyCache(threshold=0.1),), run=("num_inference_steps", "solver"))
    assert read_setting(str(tmp_path / "own.toml")) == read_setting("~/own.toml") == setting


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"\xff\xfe[", r"own\.toml"),
        (b"[easycache", r"own\.toml"),
        (b"", r"own\.toml.*'none'"),
        (b"[easycach]", "easycache"),
        (None, r"own\.toml"),
    ],
)
def test_a_bad_file_is_told_by_its_path(content, named, tmp_path):
    path = tmp_path / "own.toml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match=named):
        read_setting(str(path))
    with pytest.raises(ConfigError, match=r"'own\.yaml'.*careful, balanced, fast, none"):
        read_setting("own.yaml")


def test_plugins_that_nobody_asks_for_load_nothing(monkeypatch):
    monkeypatch.delenv("DIT_ACCEL", raising=False)
    plugins = ("vllm_omni", "sglang")
    code = "; ".join(f"from dit_accel.serving.{one} import register; register()" for one in plugins)
    command = [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"]
    loaded = {*subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()}
    assert {f"dit_accel.serving.{one}" for one in plugins} <= loaded
    assert not {"torch", "diffusers", *plugins} & loaded
