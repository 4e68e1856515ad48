"""Ctrl-C and SIGTERM end a command soon and cleanly, wherever they find it."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dit_accel.cli import stopping
from dit_accel.cli.stopping import Terminated, keeps, stoppable

HEAD = """
import atexit, ctypes, os, signal, sys, time, warnings, weakref
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore Ctrl-C
from dit_accel.cli import installed_commands, main

def kill(number=int(sys.argv.pop())):
    os.kill(os.getpid(), number)

def now():
    print("now", file=sys.stderr, flush=True)
"""
TAIL = """
installed_commands.commands = lambda: {"work": work}
main()
"""

SWALLOWED_BY_DEL = """
class Held:
    def __del__(self):
        kill()
        time.sleep(0.01)

def work():
    Held()
    time.sleep(60)
"""

SWALLOWED_BY_CALLBACK = """
class Held: pass

def work():
    held = Held()
    told = weakref.ref(held, lambda _: (kill(), time.sleep(0.01)))
    del held
    time.sleep(60)
"""

SWALLOWED_BY_LIBRARY = """
def work():
    try:
        kill()
        time.sleep(60)
    except BaseException:
        pass
    time.sleep(60)
"""

WHILE_LOADING = """
import tempfile
folder = tempfile.mkdtemp()
open(folder + "/slow.py", "w").write("import __main__, time; __main__.kill(); time.sleep(60)")
sys.path.insert(0, folder)

def work():
    import slow
"""

COMPILED = """
from dit_accel.cli import stopping
from dit_accel.files import written_whole
stopping.PATIENCE = 0.5

def work():
    lock, library = ctypes.create_string_buffer(128), ctypes.CDLL(None)
    library.pthread_mutex_lock(lock)
    with written_whole("half.txt") as path:
        path.write_text("half")
        now()
        library.pthread_mutex_lock(lock)  # for ever, whatever signals arrive
"""

SLOW_END = """
def work():
    now()
    try:
        time.sleep(60)
    finally:
        atexit.register(time.sleep, 60)
"""


@contextlib.contextmanager
def started(body: str, number: signal.Signals, folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HEAD + body + TAIL, "work", str(int(number))]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
@pytest.mark.parametrize(
    "body",
    [SWALLOWED_BY_DEL, SWALLOWED_BY_CALLBACK, SWALLOWED_BY_LIBRARY, WHILE_LOADING],
    ids=["del", "callback", "library", "loading"],
)
def test_a_signal_is_never_lost(tmp_path: Path, body: str, number: signal.Signals, name: str):
    with started(body, number, tmp_path) as process:
        _, told = process.communicate(timeout=20)
    assert (process.returncode, told) == (128 + number, f"error: stopped by {name}; nothing half-written is left\n")


@pytest.mark.parametrize("body", [COMPILED, SLOW_END], ids=["compiled code", "a slow end"])
def test_a_command_that_can_not_end_by_itself_is_ended(tmp_path: Path, body: str):
    with started(body, signal.SIGTERM, tmp_path) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "now\n"
        process.terminate()
        began = time.monotonic()
        _, told = process.communicate(timeout=20)
    assert (process.returncode, told) == (143, "error: stopped by SIGTERM; nothing half-written is left\n")
    assert time.monotonic() - began < 5
    assert [*tmp_path.iterdir()] == []


def test_a_signal_after_the_last_line_changes_nothing(tmp_path: Path):
    with started("def work(): atexit.register(kill)\n", signal.SIGINT, tmp_path) as process:
        _, told = process.communicate(timeout=20)
    assert (process.returncode, told) == (0, "")


def test_a_child_s_signal_is_not_its_parent_s(tmp_path: Path):
    forking = """
def work():
    warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, where threads run beside a fork
    child = os.fork()
    if not child:
        time.sleep(20)
        os._exit(0)
    os.kill(child, signal.SIGTERM)
    assert os.waitpid(child, 0)[1] == signal.SIGTERM
    time.sleep(0.2)
"""
    with started(forking, signal.SIGTERM, tmp_path) as process:
        _, told = process.communicate(timeout=20)
    assert (process.returncode, told) == (0, "")


def test_everything_is_as_before_afterwards():
    before = [signal.getsignal(number) for number in stopping.NAMES]
    hook, threads = sys.unraisablehook, threading.active_count()
    with stoppable() as guard, stoppable() as inner:
        assert inner is guard
        keeps("all stands")
        assert guard.code is None
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
        assert (guard.code, guard.line) == (143, "stopped by SIGTERM; all stands")
    assert [signal.getsignal(number) for number in stopping.NAMES] == before
    assert (sys.unraisablehook, threading.active_count()) == (hook, threads)
    keeps("nothing runs, and nothing is kept")


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable() as guard:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.05)
        assert guard.code is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_exceptions_that_python_drops_are_still_told(capsys):
    class Held:
        def __del__(self):
            raise ValueError("dropped")

    seen = []
    hook, sys.unraisablehook = sys.unraisablehook, lambda told: seen.append(told.exc_type)
    try:
        with stoppable():
            Held()
    finally:
        sys.unraisablehook = hook
    assert seen == [ValueError]
