"""The GPU bench: its plan, what it does about cases that crash, hang or raise, its dry run, and its timed calls."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "kernels" / "bench"
sys.path.insert(0, str(BENCH))

import calls  # noqa: E402
import gpu  # noqa: E402
import grid  # noqa: E402
import timed  # noqa: E402
from inputs import keep_bits  # noqa: E402
from predictions import SHAPES  # noqa: E402

DRY = BENCH / "results" / "gpu-dry.jsonl"
HERE = {"device": "a card", "code": "1"}
BARE = f"""
import os, sys, time
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("rich", "typer", "diffusers", "transformers", "dit_accel", "safetensors", "scipy"):
            raise ModuleNotFoundError(f"a bare machine has no {{name}}")

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, {str(BENCH)!r})
import gpu
"""
FAULTY = """
from dataclasses import dataclass
import torch

@dataclass
class Fake:
    name: str
    seconds: int = 9
    backend: str = "triton"

    @property
    def ours(self):
        return self.name != "rival"

    def missing(self, device):
        return "a package" if self.name == "missing" else None

    def run(self, device):
        if self.name == "crash":
            print("an illegal access", flush=True)
            os.kill(os.getpid(), 11)
        if self.name in ("hang", "rival"):
            time.sleep(60)
        return [{"kind": "check", "part": "out", "error": 0.0, "allowed": 1.0, "ok": True}]

gpu.groups = lambda: {"a": list(map(Fake, ("first", "crash", "missing", "hang"))), "b": [Fake("rival"), Fake("last")]}
gpu.compile_ahead = lambda *given: None
gpu.CASE_SECONDS = 1
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda: "a card"
"""
SMALL = """
kinds = [case for case in gpu.grid.cases() if case.at.dim == 64 and case.kind == "plain"]
gpu.groups = lambda: {"small": [kinds[0], kinds[-1], gpu.timed.timings()[1]]}
"""
MAIN = "if __name__ == '__main__': gpu.main()"


def begin(script: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a script on a machine that has torch, triton and numpy and little else."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(script), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def run(script: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and what is printed of a script."""
    process = begin(script, *arguments)
    out, error = process.communicate()
    return process.returncode, out + error


def records_in(path: Path) -> dict[str, dict]:
    return {r["case"]: r for r in map(json.loads, path.read_text().splitlines())}


@pytest.mark.slow
def test_what_crashes_or_hangs_costs_nothing_but_itself(tmp_path):
    script, out = tmp_path / "faulty.py", tmp_path / "gpu.jsonl"
    script.write_text(BARE + FAULTY + MAIN)
    code, shown = run(script, "--out", str(out))
    records = records_in(out)
    assert list(records) == ["first", "crash", "missing", "hang", "rival", "last"]
    assert [records[name].get("ok") for name in records] == [True, False, None, False, None, True]
    assert records["crash"]["error"] == "its process ended with -11"
    assert "an illegal access" in records["crash"]["output"]
    assert records["hang"]["kind"] == records["rival"]["kind"] == "ended"
    assert any("time.sleep" in text or "in run" in text for text in records["hang"]["output"])
    assert records["missing"] == records["missing"] | {"kind": "skipped", "needs": "a package"}
    assert code == 1
    assert "a card: 2 of 4 findings as they should be\nFAILED crash: " in shown
    before = out.read_text()
    assert run(script, "--out", str(out))[0] == 1  # the second start has nothing left to do
    assert out.read_text() == before


@pytest.mark.slow
def test_ctrl_c_ends_what_runs_and_keeps_what_has_ended(tmp_path):
    script, out = tmp_path / "faulty.py", tmp_path / "gpu.jsonl"
    script.write_text((BARE + FAULTY + MAIN).replace('"crash", ', "").replace("CASE_SECONDS = 1", "CASE_SECONDS = 99"))
    with begin(script, "--out", str(out)) as process:
        while not out.exists() or '"missing"' not in out.read_text():  # after which a case hangs
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, text = process.communicate(timeout=120)
    stopped = "stopped: what has ended is in the results, and the same command goes on\n"
    assert (process.returncode, text) == (130, stopped)
    assert list(records_in(out)) == ["first", "missing"]
    for running in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended since
            assert str(script).encode() not in running.read_bytes()


@pytest.mark.slow
def test_a_dry_run_goes_the_same_way_and_resumes(tmp_path):
    script, out = tmp_path / "small.py", tmp_path / "dry.jsonl"
    script.write_text(BARE + SMALL + MAIN)
    code, shown = run(script, "--dry-run", "sm_90", "--out", str(out))
    assert code == 0, shown[-4000:]
    first, last, rival = (r for r in records_in(out).values())
    assert first["launches"] == ["fwd-bf16-d64-b128-plain"]
    assert (last["case"].endswith("-fa4"), last["kind"]) == (True, "skipped")  # what FlashAttention-4 compiles
    assert (rival["case"], rival["kind"]) == ("wan-720p sdpa-flash 1", "skipped")
    assert {r["device"] for r in (first, last, rival)} == {"none: compiled for sm_90"}
    lines = out.read_text().splitlines()
    out.write_text("\n".join([*lines[:2], lines[2][:40]]))  # stopped within a line
    assert run(script, "--dry-run", "sm_90", "--out", str(out))[0] == 0
    again = out.read_text().splitlines()
    assert (again[:2], json.loads(again[-1]), len(again)) == (lines[:2], json.loads(lines[2]), 4)


def test_the_plan_is_of_short_pieces_and_holds_what_it_must():
    found = gpu.groups()
    packed = gpu.pieces(found)
    spent = [sum(map(gpu.limit, piece.values())) for piece in packed]
    assert max(spent) + 20 <= 480
    assert sum(spent) + 20 * len(spent) <= 2400
    assert {name for piece in packed for name in piece} == set(found)
    assert all(found.values())
    cases = [case for group in found.values() for case in group]
    assert len({case.name for case in cases}) == len(cases)
    checks, timings = ([x for x in cases if type(x) is kind] for kind in (grid.Case, timed.Timing))
    assert {64, 96, 128, 192, 256} == {case.at.dim for case in checks}
    wide = {(case.at.dim, case.at.dtype) for case in checks if "backward" in case.kind}
    assert {(128, "fp32"), (192, "fp32"), (256, "fp32"), (192, "bf16"), (256, "bf16")} <= wide
    assert {case.backend for case in checks} == {"triton", "fa4"}
    assert {case.backend for case in timings} == {"triton", "fa4", "flex", *timed.DENSE}
    assert {case.at.dim for case in timings} >= {64, 128, 192, 256}
    assert ("fp32", "triton-backward") in {(case.at.dtype, case.candidate) for case in timings}
    assert set(timed.ORDER) == set(SHAPES)


def test_the_plan_can_be_read(monkeypatch, capsys):
    def main(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
        gpu.main()
        return capsys.readouterr().out

    shown, cases = main("--list"), gpu.groups()["time-wan-720p"]
    count = len(gpu.pieces(gpu.groups()))
    assert re.findall(r"^piece (\d+): ", shown, re.MULTILINE) == [str(i + 1) for i in range(count)]
    assert f"  time-wan-720p: {len(cases)} cases, {gpu.limit(cases)} s\n" in shown
    with pytest.raises(SystemExit, match=r"--piece takes 1 to .*99"):
        main("--list", "--piece", "99")
    with pytest.raises(SystemExit, match=r"--dry-run takes sm_80.*sm_1$"):
        main("--dry-run", "sm_1")
    if not (os.path.exists("/dev/nvidia0") or os.path.exists("/dev/kfd")):
        with pytest.raises(SystemExit, match="CUDA or ROCm GPU, found none: --dry-run sm_90"):
            main()


@dataclass
class Fake:
    name: str
    ours: bool = True
    seconds: int = 1

    def missing(self, device):
        return None

    def run(self, device):
        if self.name.startswith("raises"):
            raise RuntimeError("no kernel image")
        wrong = self.name.startswith("wrong")
        return [dict(kind="check", part="out", error=2.0 * wrong, allowed=1.0, ok=not wrong)]


@pytest.fixture
def working(monkeypatch, tmp_path):
    """Results in a file, and `work` as on a card that answers."""
    monkeypatch.setattr(gpu.aot, "workers", lambda jobs: None)
    monkeypatch.setattr(gpu, "compile_ahead", lambda *given: None)
    monkeypatch.setattr(gpu, "usable", lambda: True)
    monkeypatch.setattr(gpu.faulthandler, "dump_traceback_later", lambda *_, **__: None)  # pytest has its own
    monkeypatch.setattr(gpu.faulthandler, "cancel_dump_traceback_later", lambda: None)
    return gpu.Results(tmp_path / "gpu.jsonl", HERE)


@pytest.mark.parametrize(
    ("names", "fails"),
    [
        (["good"], False), (["good", "wrong"], True), (["good", "raises"], True), (["good", "rival-raises"], False),
        (["rival-raises"], True), ([], True),
    ],
)  # fmt: skip
def test_what_makes_a_run_fail(working, capsys, names, fails):
    """A wrong result, a call of ours that raises, nothing compared at all, a case left over; not a rival that fails."""
    cases = [Fake(name.removeprefix("rival-"), ours=not name.startswith("rival")) for name in names]
    assert gpu.work("a", cases, working, None) == 0
    assert gpu.report({"a": cases}, working) == fails
    assert ("FAILED raises: RuntimeError: no kernel image" in capsys.readouterr().out) == ("raises" in "".join(names))
    assert gpu.report({"a": [*cases, Fake("more")]}, working)


def test_a_process_whose_card_answers_no_more_is_left(working, monkeypatch):
    monkeypatch.setattr(gpu, "usable", lambda: False)
    cases = [Fake("raises"), Fake("good")]
    assert gpu.work("a", cases, working, None) == gpu.BROKEN
    assert [case.name for case in working.remaining(cases)] == ["good"]
    assert gpu.work("a", cases, working, None) == 0
    assert not working.remaining(cases)


class Launch:
    def __init__(self, name, seconds=0.0, compiled=()):
        self.name, self.seconds, self.done = name, seconds, compiled

    def compiled(self):
        time.sleep(self.seconds)
        self.done.append(self.name)


def test_compiling_ahead_takes_each_launch_once_and_no_longer_than_it_may(monkeypatch):
    """A case whose launches can't be told, or don't compile, says so itself when it runs."""
    monkeypatch.setattr(gpu, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    done = []
    shared, slow = Launch("shared", compiled=done), Launch("slow", 2.0, done)
    broken = Launch("broken", compiled=None)
    cases = [Fake("first"), Fake("second"), Fake("raises"), Fake("third")]
    into = {"first": {"a": shared}, "second": {"a": shared, "b": broken}, "third": {"c": slow, "d": slow}}
    monkeypatch.setattr(Fake, "launches", lambda self, target: into[self.name], raising=False)
    start = time.monotonic()
    gpu.compile_ahead(cases, ThreadPoolExecutor(1), 0.2)
    assert time.monotonic() - start < 1
    assert done == ["shared"]


def test_findings_of_another_card_or_code_do_not_count_and_a_group_must_start(working, monkeypatch, capsys):
    gpu.work("a", [Fake("good")], working, None)
    for other in ({"device": "another"}, {"code": "2"}):
        assert gpu.Results(working.path, {**HERE, **other}).remaining([Fake("good")])
    assert not working.remaining([Fake("good")])
    monkeypatch.setattr(gpu, "one_process", lambda *given: (1, "", ["ImportError: no triton"]))
    gpu.supervise("b", [Fake("new")], working, None)
    assert gpu.report({"b": [Fake("new")]}, working)
    assert "FAILED b: start: its process ended with 1" in capsys.readouterr().out


@pytest.mark.parametrize(("target", "options"), [("bench-gpu", ""), ("bench-gpu-dry", "--dry-run sm_90")])
def test_make_runs_all_pieces_and_ends_with_their_exit_code(tmp_path, target, options):
    python, log = tmp_path / "python", tmp_path / "log"
    command = ["make", target, f"PYTHON={python}", f"BIN={tmp_path}", "-o", ".venv/.ready-test"]
    for code in (0, 1):
        python.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexit {code}\n')
        python.chmod(0o755)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert log.read_text().split("\n")[0].strip() == f"kernels/bench/gpu.py {options}".strip()
        assert (done.returncode == 0) == (code == 0)


def test_the_committed_dry_run_has_no_fault():
    records = [json.loads(text) for text in DRY.read_text().splitlines()]
    assert {r["device"] for r in records} == {"none: compiled for sm_90"}
    assert all(r["ok"] for r in records if r["kind"] != "skipped")
    assert sum(len(r.get("launches", ())) for r in records) > 100
    assert {r["kind"] for r in records} == {"compiled", "skipped"}


TINY = replace(SHAPES["wan-720p"], heads=2, tokens=120, dim=16, block=32)
TIMINGS = [timed.timing(TINY, candidate, density, "fp32") for candidate, density in timed.CALLS]


@pytest.mark.slow
@pytest.mark.parametrize("case", [x for x in TIMINGS if x.backend in ("triton", "flex")], ids=lambda x: x.name)
def test_a_timed_call_is_timed_and_compared(case):
    [record] = case.run("cpu")
    assert record["seconds"] > 0
    assert record.get("ok", record.get("agrees"))
    assert [record["shape"], record["candidate"], f"{record['density']:g}"] == case.name.split()
    assert 0 <= record["rows_error"] <= record["rows_allowed"]
    assert 0 < record["density_found"] <= 1


def test_what_is_not_installed_is_named():
    by_name = {x.candidate: x for x in TIMINGS}
    assert "flash_attn_interface" in (by_name["flash-attn-3"].missing("cpu") or "")
    assert "bfloat16 or float16 (found torch.float32)" in (by_name["fa4"].missing("cpu") or "")
    assert by_name["triton"].missing("cpu") is None
    cases = [case for case in grid.cases() if case.backend == "fa4"]
    assert all("sm_90 or sm_100" in (case.missing("cpu") or "") for case in cases)


@pytest.mark.slow
def test_rows_of_a_timed_call_are_compared():
    """A wrong row, key gradient or decay shows in the sampled tiles; what is right does not."""

    def fits(check, results) -> bool:
        error, allowed = check(tuple(results))
        return error <= allowed

    for case in TIMINGS:
        if case.name.split()[1:] in (["triton", "0.27"], ["triton-decay", "0.27"], ["triton-routed", "0.1"]):
            timed_call, check = timed.prepared(calls.make(case.kind, case.at, "cpu"), case.backend)
            results = list(timed_call())
            assert fits(check, results)
            results[0][:, -1, -1] += 0.01
            assert not fits(check, results)
    backward = timed.timing(TINY, "triton-backward", 0.5, "fp32")
    timed_call, check = timed.prepared(calls.make(backward.kind, backward.at, "cpu"), "triton")
    grads = [x.clone() for x in timed_call()]
    assert fits(check, grads)
    grads[2][:, -1, 64:96] *= 1.01
    assert not fits(check, grads)


def test_a_timed_call_shows_what_was_predicted_for_this_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    case = next(x for x in timed.timings() if x.name == "wan-720p triton 0.27")
    found = timed.prediction(case, 0.27, "cuda")
    assert timed.prediction(replace(case, candidate="flex"), 0.27, "cuda") == {}
    assert timed.prediction(case, 0.27, "cpu") == {}
    record = dict(kind="time", seconds=0.05, tflops=600.0, ok=True)
    shown = gpu.line(case.name, {**record, **found})
    assert shown.startswith("wan-720p triton 0.27")
    assert f"at least {found['predicted_bound'] * 1e3:.3f} ms (l2)" in shown


def test_kept_tiles_have_the_diagonal_and_the_density():
    bits = timed.unpack_bits(keep_bits(1, 3, 40, 0.25, "cpu"), 40)
    assert bits.sum(-1).unique().tolist() == [10]
    assert bits.diagonal(dim1=-2, dim2=-1).all()
