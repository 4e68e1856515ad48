"""Ctrl-C and SIGTERM end a command soon and cleanly, wherever they find it."""

import os
import signal
import subprocess
import sys
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

AFTER_THE_END = """
def work():
    atexit.register(signal.raise_signal, signal.SIGINT)
"""

FOR_ANOTHER = """
def work():
    stopping.end_on_signals()
    signal.raise_signal(signal.SIGINT)
    now()
    signal.raise_signal(signal.SIGTERM)
"""


@pytest.mark.parametrize(
    ("body", "number", "last"),
    [
        (SWALLOWED, signal.SIGTERM, "now\nerror: stopped by SIGTERM; nothing half-written is left\n"),
        (WHILE_LOADING, signal.SIGINT, "now\nerror: stopped by Ctrl-C; nothing half-written is left\n"),
        (SLOW_END, signal.SIGTERM, "now\nerror: stopped by SIGTERM; nothing half-written is left\n"),
        (AFTER_THE_END, None, ""),
        (FOR_ANOTHER, None, "now\n"),
    ],
    ids=["swallowed", "loading", "slow end", "after the last line", "a process that computes for another"],
)
def test_a_signal_ends_a_command_wherever_it_is(tmp_path: Path, body: str, number: signal.Signals | None, last: str):
    command = [sys.executable, "-c", HEAD + body + TAIL, "work"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment, text = {**os.environ, "PYTHONPATH": path}, ""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment) as process:
        try:
            if number:
                text = process.stderr.readline()
                process.send_signal(number)
            text += process.communicate(timeout=20)[1]
        finally:
            process.kill()
    code = 128 + number if number else 128 + signal.SIGTERM if body is FOR_ANOTHER else 0
    assert (process.returncode, text) == (code, last)
    assert [*tmp_path.iterdir()] == []


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
