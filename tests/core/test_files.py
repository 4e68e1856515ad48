"""Files appear whole or not at all, what can't be written is told beforehand, and JSON is JSON."""

import json
import math
import os
import stat
from pathlib import Path

import pytest

from dit_accel.errors import ConfigError
from dit_accel.files import check_writable, json_text, written_whole


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_an_error_leaves_no_file_and_keeps_the_old_one(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted() -> None:
        with written_whole(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == ["a.txt"]
    assert path.read_text() == "old"


def test_a_file_takes_its_place_with_ordinary_rights(tmp_path: Path):
    path = tmp_path / "a.txt"
    with written_whole(path) as temporary:
        assert temporary.suffix == ".txt"
        temporary.write_text("new")
    assert path.read_text() == "new"
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_a_link(tmp_path: Path, exists: bool):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "a.txt", tmp_path / "link.txt"
    if exists:
        target.write_text("old")
    link.symlink_to(target)
    check_writable(link)
    with written_whole(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert names(tmp_path / "there") == ["a.txt"]


def test_the_longest_name_can_be_written(tmp_path: Path):
    path = tmp_path / ("a" * (os.pathconf(tmp_path, "PC_NAME_MAX") - 4) + ".txt")
    check_writable(path)
    with written_whole(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_what_cannot_be_written_is_told(tmp_path: Path, monkeypatch):
    with pytest.raises(ConfigError, match=r"output .*none/a\.txt can't be written: .*none is not a folder; create it"):
        check_writable(tmp_path / "none" / "a.txt")
    with pytest.raises(ConfigError, match="can't be written: File name too long; choose another folder or name"):
        check_writable(tmp_path / ("a" * 300))
    (tmp_path / "b.txt").mkdir()
    with pytest.raises(ConfigError, match="can't be written: it is a folder; name a file in it"):
        check_writable(tmp_path / "b.txt")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="can't be written: it is not a regular file; choose another name"):
        check_writable(tmp_path / "link")

    (tmp_path / "c.txt").write_text("")
    with monkeypatch.context() as patched:  # root may write everything
        patched.setattr("os.access", lambda path, mode: mode != os.W_OK)
        with pytest.raises(ConfigError, match=r"the table .*c.txt can't be written: it is read-only; choose another"):
            check_writable(tmp_path / "c.txt", "the table")

    def refused(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    with pytest.raises(ConfigError, match="can't be written: Permission denied; choose another folder or name"):
        check_writable(tmp_path / "a.txt")
    assert names(tmp_path) == ["b.txt", "c.txt", "link", "pipe"]


def test_json_is_always_valid():
    text = json_text({"a": math.nan, "b": [math.inf, (-math.inf, 1.5)], "c": Path("x"), "d": True, 1: None})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads(text, parse_constant=refuse)
    assert read == {"a": None, "b": [None, [None, 1.5]], "c": "x", "d": True, "1": None}
