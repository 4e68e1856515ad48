"""Processes that compute beside each other end with the one that started them, without a word of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORKS = """
import os, signal, sys, time
from pathlib import Path

def work(item):
    from dit_accel.files import written_whole
    with written_whole(f"{item}.txt"):
        Path(f"at-{item}").write_text(str(os.getpid()))
        time.sleep(60)

def both():
    from dit_accel_eval.runs.pool import run_beside
    run_beside(work, [0, 1, 2], 2)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from dit_accel.cli import run_alone
    run_alone(both)
"""


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_running(process):
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    ("number", "name", "group"), [(signal.SIGINT, "Ctrl-C", True), (signal.SIGTERM, "SIGTERM", False)]
)
def test_a_signal_ends_all_processes_at_once(tmp_path, number, name, group):
    script = tmp_path / "script.py"
    script.write_text(WORKS)
    noted = [tmp_path / "at-0", tmp_path / "at-1"]
    process = subprocess.Popen(
        [sys.executable, script], cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        wait_for(lambda: all(one.exists() and one.read_text() for one in noted))
        began = time.monotonic()
        (os.killpg if group else os.kill)(process.pid, number)
        _, told = process.communicate(timeout=20)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert (process.returncode, told) == (128 + number, f"error: stopped by {name}; nothing half-written is left\n")
    assert time.monotonic() - began < 5
    assert not any(is_running(int(one.read_text())) for one in noted)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["at-0", "at-1", "script.py"]


@pytest.mark.slow
def test_processes_end_with_one_that_is_killed(tmp_path):
    (tmp_path / "script.py").write_text(WORKS)
    noted = [tmp_path / "at-0", tmp_path / "at-1"]
    with subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path) as parent:
        wait_for(lambda: all(one.exists() and one.read_text() for one in noted))
        parent.kill()
    wait_for(lambda: not any(is_running(int(one.read_text())) for one in noted))


def test_an_error_of_one_ends_the_others(tmp_path):
    script = tmp_path / "script.py"
    failing = WORKS.replace("        time.sleep(60)", "        time.sleep(60 if item else 0)\n        1 / item")
    script.write_text(failing)
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=30)
    told = "error: ZeroDivisionError: division by zero (--traceback shows where)\n"
    assert (done.returncode, done.stderr) == (1, told)
    assert not list(tmp_path.glob("*.txt"))
