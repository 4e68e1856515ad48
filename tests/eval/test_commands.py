"""What all commands do alike: misspelt models, outputs that another run writes, threads, ends of processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import demo
import dit_accel_pipelines.finetuning.run as finetuning
import dit_accel_pipelines.generation.generate as generation
import pytest
import torch
import typer
from dit_accel_eval.suites import running
from dit_accel_eval.tune import caches as tune_caches
from dit_accel_pipelines.generation.threads import CHOSEN_BY, one_thread, threads
from fake_model import ARM, HEAD
from typer.testing import CliRunner

from dit_accel.cli import app as cli
from dit_accel.files import held

PROMPT = "a red circle"
ALONE = {"demo": typer.Typer()}
ALONE["demo"].command()(demo.main)


def start(*arguments: str):
    if arguments[0] in ALONE:
        return CliRunner().invoke(ALONE[arguments[0]], list(arguments[1:]))
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", PROMPT, "--model", "wan-tinny"],
        ["describe", "--model", "wan-tinny"],
        ["plan", "--model", "wan-tinny"],
        ["tune", "magcache", "--model", "wan-tinny"],
        ["tune", "heads", "--model", "wan-tinny", "--prompt", PROMPT],
        ["tune", "pipeline", "--target", "psnr=30", "--model", "wan-tinny", "--prompt", PROMPT],
        ["finetune", "--drawn", "2", "--model", "wan-tinny"],
        ["eval", "run", "s.toml", "--out", "s.jsonl"],
    ],
    ids=" ".join,
)
def test_a_misspelt_model_is_one_line_in_every_command(here: Path, arguments):
    (here / "s.toml").write_text((HEAD + ARM).replace("wan-plain", "wan-tinny"))
    found = start(*arguments)
    told = "error: 'wan-tinny' is no embedded model; did you mean 'wan-tiny'? known: flux-sizes, "
    assert (found.exit_code, found.stdout, found.stderr.count("\n")) == (2, "", 1)
    assert found.stderr.startswith(told)
    assert [entry.name for entry in here.iterdir()] == ["s.toml"]


RUNS = {
    "generate": (["generate", PROMPT, "-o", "a.gif"], "a.gif", "output"),
    "tune": (["tune", "magcache", "-o", "m.toml"], "m.toml", "tune's output"),
    "finetune": (["finetune", "--drawn", "1", "--num-frames", "5", "-o", "lora"], "lora", "the training's folder"),
    "eval run": (["eval", "run", "s.toml", "--out", "s.jsonl"], "s.jsonl", "the results file"),
    "demo": (["demo", "--out", "demo"], "demo", "the demo's folder"),
}


@pytest.mark.parametrize(("arguments", "written", "what"), RUNS.values(), ids=RUNS)
def test_a_second_run_on_one_output_is_refused_by_name(here: Path, arguments, written: str, what: str):
    (here / "s.toml").write_text(HEAD + ARM)
    with held(written):
        found = start(*arguments)
        told = str(found.exception) if arguments[0] in ALONE else found.stderr
        assert f"{what} {here / written} is being written by process " in told
        assert found.exit_code == (1 if arguments[0] in ALONE else 2)
    assert not list(here.glob(".*.lock"))


class ReachedError(Exception):
    """The work of a command began."""


@pytest.fixture
def seen(monkeypatch) -> list[int]:
    """The threads that torch has where each command's work begins, of three before."""
    counted: list[int] = []

    def reached(*args, **options):
        counted.append(torch.get_num_threads())
        raise ReachedError

    monkeypatch.setattr(generation, "load_pipeline", reached)
    monkeypatch.setattr(finetuning, "_trained", reached)
    monkeypatch.setattr(tune_caches, "tune_magcache", reached)
    monkeypatch.setattr(demo, "EmbeddedModel", reached)
    monkeypatch.setattr(running, "_loaded", reached)
    for name in CHOSEN_BY:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield counted
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


@pytest.mark.parametrize("arguments", [run[0] for run in RUNS.values()], ids=RUNS)
def test_embedded_models_run_on_one_thread(here: Path, seen, arguments):
    (here / "s.toml").write_text(HEAD + ARM)
    start(*arguments)
    assert seen == [1]
    assert not (here / "lora").exists()


def test_timed_suites_others_models_and_what_is_chosen_have_their_own_threads(monkeypatch, here: Path, seen):
    (here / "s.toml").write_text(HEAD + ARM)
    start("eval", "run", "s.toml", "--out", "s.jsonl", "--time")
    start("eval", "run", "s.toml", "--out", "s.jsonl", "--threads", "4")
    assert seen == [2, 4]
    seen.clear()
    with one_thread(embedded=False):
        assert torch.get_num_threads() == 3
    with threads(2), threads(None):
        assert torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    start("generate", PROMPT, "-o", "a.gif")
    assert seen == [3]


WORKS = """
import os, signal, sys, time
from pathlib import Path

def work(made, item):
    from dit_accel.files import written_whole
    with written_whole(f"{item}.txt"):
        Path(f"at-{item}").write_text(str(os.getpid()))
        time.sleep(60)

def both():
    from dit_accel_eval.runs.pool import run_beside
    run_beside(dict, work, [0, 1, 2], 2)

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
