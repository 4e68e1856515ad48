"""Ctrl-C and SIGTERM end a command soon and cleanly, wherever they find it."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dit_accel.cli import stopping
from dit_accel.cli.stopping import Terminated, keeps, stoppable

HEAD = """
import atexit, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore Ctrl-C
from dit_accel.cli import installed_commands, main, stopping
stopping.PATIENCE = 0.5

def now():
    print("now", file=sys.stderr, flush=True)
"""
TAIL = """
installed_commands.commands = lambda: {"work": work}
main()
"""

SWALLOWED = """
def work():
    now()
    try:
        time.sleep(60)
    except BaseException:
        time.sleep(60)
"""

WHILE_LOADING = """
import tempfile
folder = tempfile.mkdtemp()
open(folder + "/slow.py", "w").write("import __main__, time; __main__.now(); time.sleep(60)")
sys.path.insert(0, folder)

def work():
    from dit_accel.files import written_whole
    with written_whole("half.txt") as path:
        path.write_text("half")
        import slow
"""

SLOW_END = """
def work():
    atexit.register(lambda: (now(), time.sleep(60)))
"""


@contextlib.contextmanager
def started(body: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HEAD + body + TAIL, "work"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("body", "number", "name"),
    [
        (SWALLOWED, signal.SIGTERM, "SIGTERM"),
        (WHILE_LOADING, signal.SIGINT, "Ctrl-C"),
        (SLOW_END, signal.SIGTERM, "SIGTERM"),
    ],
    ids=["swallowed", "loading", "slow end"],
)
def test_a_signal_ends_a_command_wherever_it_is(tmp_path: Path, body: str, number: signal.Signals, name: str):
    with started(body, tmp_path) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "now\n"
        process.send_signal(number)
        _, line = process.communicate(timeout=20)
    assert (process.returncode, line) == (128 + number, f"error: stopped by {name}; nothing half-written is left\n")
    assert [*tmp_path.iterdir()] == []


def test_a_signal_after_the_last_line_changes_nothing(tmp_path: Path):
    with started("def work(): atexit.register(signal.raise_signal, signal.SIGINT)\n", tmp_path) as process:
        _, text = process.communicate(timeout=20)
    assert (process.returncode, text) == (0, "")


def test_a_process_that_computes_for_another_ends_without_a_word(tmp_path: Path):
    body = """
def work():
    stopping.end_on_signals()
    signal.raise_signal(signal.SIGINT)
    now()
    signal.raise_signal(signal.SIGTERM)
"""
    with started(body, tmp_path) as process:
        _, text = process.communicate(timeout=20)
    assert (process.returncode, text) == (143, "now\n")


def test_everything_is_as_before_afterwards():
    before = [signal.getsignal(number) for number in stopping.NAMES]
    with stoppable() as guard, stoppable() as inner:
        assert inner is guard
        keeps("all stands")
        assert guard.number is None
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
        assert (guard.number, guard.line) == (signal.SIGTERM, "stopped by SIGTERM; all stands")
    assert [signal.getsignal(number) for number in stopping.NAMES] == before
    keeps("nothing runs, and nothing is said")


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable() as guard:
            signal.raise_signal(signal.SIGINT)
        assert guard.number is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
