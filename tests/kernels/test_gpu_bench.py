"""The GPU bench runs from end to end in the interpreter, on toy shapes, and judges goals from what it timed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "kernels" / "bench"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(BENCH / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def test_checks_times_and_goals(tmp_path):
    out = tmp_path / "gpu.jsonl"
    found = run("--device", "cpu", "--tiny", "--shape", "wan-720p", "--out", str(out))
    assert found.returncode == 0, found.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    checks = [r for r in records if r["kind"] == "check"]
    assert {r["part"] for r in checks} == {"out", "lse", "grad_q", "grad_k", "grad_v"}
    assert {r["rest"] for r in checks} == {"skipped", "pooled"}
    assert all(r["ok"] and 0 <= r["error"] <= r["allowed"] for r in checks)
    assert f"{len(checks)} of {len(checks)} checks within the rule" in found.stdout
    timed = {(r["candidate"], r["density"]) for r in records if r["kind"] == "time"}
    ours = {("triton", d) for d in (0.1, 0.25, 0.27, 0.5, 1.0)}
    assert ours | {("triton-backward", 0.27), ("triton-decay", 0.27), ("triton-pooled", 0.1), ("flex", 0.27)} <= timed
    assert {r["device"] for r in records} == {"CPU, interpreted"}
    assert "backward over forward" in found.stdout
    assert "not measured best SDPA over ours, 128k at 0.1" in found.stdout


def test_what_the_budget_does_not_reach_is_named():
    found = run("--device", "cpu", "--tiny", "--shape", "mochi", "--budget", "0")
    assert "left out for time: mochi triton 0.27, mochi sdpa-flash 1" in found.stdout


def test_bad_arguments_are_named():
    found = run("--device", "cpu", "--shape", "wan")
    assert "--shape takes wan-480p, wan-720p" in found.stderr


@pytest.mark.skipif(os.path.exists("/dev/nvidia0") or os.path.exists("/dev/kfd"), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so():
    found = run()
    assert "--device cuda needs a CUDA or ROCm GPU, found none: --device cpu --tiny tests the script" in found.stderr
