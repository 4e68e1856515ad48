"""Ctrl-C and SIGTERM end a command soon and cleanly, wherever they find it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dit_accel.cli.stopping import watch

HEAD = """
import atexit, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore Ctrl-C
from dit_accel.cli import installed_commands, main, stopping
stopping.STOP.patience = 0.5

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

CLEANS_UP = """
def work():
    stopping.STOP.files = "all stands"
    try:
        now()
        time.sleep(60)
    finally:
        now()
"""


@pytest.mark.parametrize(
    ("body", "number", "last"),
    [
        (SWALLOWED, signal.SIGTERM, "now\nerror: stopped by SIGTERM; nothing half-written is left\n"),
        (WHILE_LOADING, signal.SIGINT, "now\nerror: stopped by Ctrl-C; nothing half-written is left\n"),
        (SLOW_END, signal.SIGTERM, "now\nerror: stopped by SIGTERM; nothing half-written is left\n"),
        (AFTER_THE_END, None, ""),
        (CLEANS_UP, signal.SIGTERM, "now\nnow\nerror: stopped by SIGTERM; all stands\n"),
    ],
    ids=["swallowed", "loading", "slow end", "after the last line", "in a block that cleans up"],
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
    assert (process.returncode, text) == (128 + number if number else 0, last)
    assert [*tmp_path.iterdir()] == []


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch):
    handlers = {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_DFL}
    monkeypatch.setattr(signal, "getsignal", handlers.get)
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    watch()
    assert handlers[signal.SIGINT] == signal.SIG_IGN
    assert handlers[signal.SIGTERM] not in (signal.SIG_IGN, signal.SIG_DFL)
