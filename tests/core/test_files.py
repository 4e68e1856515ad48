"""Files appear whole or not at all, one run writes them, what can't be written is told first, and JSON is JSON."""

import contextlib
import errno
import json
import math
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from dit_accel import files
from dit_accel.adapters.model_files import read_config
from dit_accel.cli import method_options
from dit_accel.errors import Busy, ConfigError, DitAccelError
from dit_accel.estimate.tuned import read_tuned
from dit_accel.files import check_writable, held, json_text, new_folder, remove_temporaries, written_whole
from dit_accel.methods.attention.lite.thresholds import read_thresholds
from dit_accel.methods.caches.profile_file import read_profile
from dit_accel.methods.guidance.head_specs import read_file
from dit_accel.serving.settings import read_setting

READERS = {
    "thresholds": read_thresholds,
    "profile": lambda path: read_profile(str(path), "profilingcache.blocks"),
    "heads": lambda path: read_file(path, "softpag.heads"),
    "--config": method_options._text,
    "serving": lambda path: read_setting(str(path)),
    "tuned": read_tuned,
    "model": lambda path: read_config(str(path.parent), path.name),
}


def raising(error):
    """Return a function that raises an error, whatever it is called with."""

    def fail(*_, **__):
        raise error

    return fail


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


FULL = r"a\.txt.*\(.*\).*free"


@pytest.mark.parametrize(
    ("error", "free", "kind", "match"),
    [
        (KeyboardInterrupt(), 1, KeyboardInterrupt, None),
        (FileNotFoundError("none"), 1, FileNotFoundError, "none"),
        *((OSError(code, os.strerror(code)), 1, ConfigError, FULL) for code in (errno.ENOSPC, errno.EDQUOT)),
        (RuntimeError("ffmpeg: No space left on device"), 1, ConfigError, FULL),
        (RuntimeError("failed writing file data/0"), 1, RuntimeError, "failed writing"),
        (RuntimeError("failed writing file data/0"), 4e-9, ConfigError, r"a\.txt.*\(No space left"),
    ],
)
def test_an_error_leaves_no_half_of_a_file_and_a_full_disk_is_one_sentence(
    tmp_path, monkeypatch, error, free, kind, match
):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free * 2**40))
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write() -> None:
        with written_whole(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(kind, match=match):
        write()
    assert (names(tmp_path), path.read_text()) == (["a.txt"], "old")


@pytest.mark.parametrize("name", ["/dev/zero", "pipe", "large"])
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_what_has_no_end_is_never_read(tmp_path: Path, monkeypatch, name: str, read):
    """Each reader of a file that an option names."""
    monkeypatch.setattr(files, "MOST_TEXT", 100)
    path = tmp_path / f"{Path(name).name}.toml"
    if name == "pipe":
        os.mkfifo(path)
    elif name == "large":
        path.write_text("#" * 101)
    else:
        path.symlink_to(name)
    with pytest.raises(DitAccelError, match=f"{path.name}.*(0 MiB|regular)|no {path.name}"):
        read(path)


@pytest.mark.parametrize("kind", ["new", "old", "link", "link to nothing", "the longest name"])
def test_a_file_takes_its_place_with_ordinary_rights(tmp_path: Path, kind: str):
    folder, plain = tmp_path / "there", tmp_path / "plain"
    folder.mkdir()
    plain.touch()
    longest = "a" * (os.pathconf(tmp_path, "PC_NAME_MAX") - 4)
    path = target = folder / f"{longest if kind == 'the longest name' else 'a'}.txt"
    if kind in ("old", "link"):
        target.write_text("old")
    if kind.startswith("link"):
        path = tmp_path / "link.txt"
        path.symlink_to(target)
    check_writable(path)
    with written_whole(path) as temporary:
        assert temporary.suffix == ".txt"
        temporary.write_text("new")
    assert (target.read_text(), names(folder)) == ("new", [target.name])
    assert path.is_symlink() == kind.startswith("link")
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_what_cannot_be_written_is_refused_before(tmp_path: Path, monkeypatch):
    (tmp_path / "b.txt").mkdir()
    (tmp_path / "c.txt").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name, match in (
        ("none/a.txt", r"none/a\.txt.*none .*folder"),
        ("a" * 300, "File name"),
        ("b.txt", r"b\.txt.*a folder"),
        ("link", r"link.*regular file"),
    ):
        with pytest.raises(ConfigError, match=match):
            check_writable(tmp_path / name)
    with monkeypatch.context() as patched:  # root may write everything
        patched.setattr("os.access", lambda path, mode: mode != os.W_OK)
        with pytest.raises(ConfigError, match=r"table .*c\.txt.*read-only"):
            check_writable(tmp_path / "c.txt", "the table")
    monkeypatch.setattr("tempfile.TemporaryFile", raising(PermissionError(13, "Permission denied")))
    with pytest.raises(ConfigError, match=r"a\.txt.*Permission denied"):
        check_writable(tmp_path / "a.txt")
    assert names(tmp_path) == ["b.txt", "c.txt", "link", "pipe"]


def test_json_is_always_valid():
    text = json_text({"a": math.nan, "b": [math.inf, (-math.inf, 1.5)], "c": Path("x"), "d": True, 1: None})
    read = json.loads(text, parse_constant=raising(AssertionError))
    assert read == {"a": None, "b": [None, [None, 1.5]], "c": "x", "d": True, "1": None}


def test_what_is_half_written_or_being_made_can_be_deleted_from_outside(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(files, "_making", threading.Lock())
    with contextlib.suppress(FileNotFoundError), held(tmp_path / "a.txt"), written_whole(tmp_path / "a.txt") as half:
        half.write_text("half")
        assert len(names(tmp_path)) == 2
        remove_temporaries()
        assert names(tmp_path) == []
    monkeypatch.setattr(files, "_making", threading.Lock())  # the last one was taken for good
    # as a signal arrives, too: a handler runs between two steps of the main thread, here right after the file is there
    made = os.open

    def interrupted(*given, **options):
        handle = made(*given, **options)
        remove_temporaries()
        assert names(tmp_path) == []
        return handle

    monkeypatch.setattr(os, "open", interrupted)
    with contextlib.suppress(FileNotFoundError), written_whole(tmp_path / "a.txt"):
        pass


HOLDING = """
import sys, time
from dit_accel.files import held
with held(sys.argv[1], "the results file"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_do_not_write_one_file(tmp_path: Path):
    path = tmp_path / "s.jsonl"
    command = [sys.executable, "-c", HOLDING, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            told = rf"results file .*s\.jsonl.*process {other.pid};"
            with pytest.raises(Busy, match=told), held(path, "the results file"):
                pass
            with held(tmp_path / "other.jsonl"):
                pass
        finally:
            other.kill()
    with held(path):  # the lock of a process that was killed
        assert names(tmp_path) == [".s.jsonl.lock"]
    with held(tmp_path / "none" / "s.jsonl"):  # a folder that is missing is for others to tell
        assert names(tmp_path) == []


def test_a_new_folder_goes_again_if_nothing_is_written(tmp_path: Path):
    folder = tmp_path / "a" / "b"

    def fail(file: str = "") -> None:
        with new_folder(folder):
            if file:
                (folder / file).touch()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert names(tmp_path) == []
    with pytest.raises(KeyError):
        fail("kept")
    assert names(folder) == ["kept"]
    with pytest.raises(ConfigError, match=r"kept.*\(File exists\)"), new_folder(folder / "kept"):
        pass
