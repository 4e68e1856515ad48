"""The GPU bench runs from end to end in the interpreter, on toy shapes, and judges goals from what it timed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "kernels" / "bench"
sys.path.insert(0, str(BENCH))

import gpu  # noqa: E402
import gpu_checks  # noqa: E402
from inputs import keep_bits  # noqa: E402
from roofline import SHAPES  # noqa: E402


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(BENCH / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@pytest.mark.slow
def test_checks_times_and_goals(tmp_path):
    out = tmp_path / "gpu.jsonl"
    found = run("--device", "cpu", "--tiny", "--shape", "wan-720p", "--out", str(out))
    assert found.returncode == 0, found.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    checks = [r for r in records if r["kind"] == "check"]
    assert {r["part"] for r in checks} == {"out", "lse", "grad_q", "grad_k", "grad_v", "tiles", "votes"}
    features = {r["feature"] for r in checks}
    assert {f"{name}, {rest}" for name in ("plain", "decay") for rest in ("skipped", "pooled")} <= features
    assert {"routing", "votes", "kept tiles, skipped", "kept tiles, pooled"} <= features
    assert all(r["ok"] and 0 <= r["error"] <= r["allowed"] for r in checks)
    assert f"{len(checks)} of {len(checks)} checks within the rule" in found.stdout
    timed = {(r["candidate"], r["density"]) for r in records if r["kind"] == "time"}
    ours = {("triton", d) for d in (0.1, 0.25, 0.27, 0.5, 1.0)}
    assert ours | {("triton-backward", 0.27), ("triton-decay", 0.27), ("triton-pooled", 0.1), ("flex", 0.27)} <= timed
    assert {("triton-routed", 0.1), ("triton-kept", 0.27), ("triton-votes", 0.27)} <= timed
    failed = {r["candidate"] for r in records if "error" in r and r["kind"] == "time"}
    assert failed <= {"sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "flex"}
    assert {r["device"] for r in records} == {"CPU, interpreted"}
    assert "backward over forward" in found.stdout
    assert "interpreted: times and goals mean nothing" in found.stdout
    assert "not measured best SDPA over ours, 128k at 0.1" in found.stdout


def test_goals_are_judged_by_the_worst_shape():
    """Times that a card might show, in seconds: 10 for all tiles, linear but for what the goals are about."""

    def record(shape: str, candidate: str, density: float, seconds: float, **more) -> dict:
        return {"kind": "time", "shape": shape, "candidate": candidate, "density": density, "seconds": seconds, **more}

    records = [
        *(record("wan-720p", "triton", d, 10 * d) for d in (0.1, 0.25, 0.27, 0.5, 1.0)),
        *(record("128k", "triton", d, 10 * d) for d in (0.1, 0.27, 1.0)),
        record("wan-720p", "sdpa-flash", 1.0, 8.1),
        record("wan-720p", "sdpa-cudnn", 1.0, 5.4),
        record("128k", "sdpa-efficient", 1.0, 4.0),
        record("wan-720p", "triton-kept", 0.27, 3.0),
        record("wan-720p", "triton-votes", 0.27, 3.03),
        record("wan-720p", "triton-routed", 0.1, 1.6, density_found=0.16),
        record("128k", "triton-routed", 0.1, 1.5, density_found=0.1),
        {"kind": "time", "shape": "wan-480p", "candidate": "triton-routed", "density": 0.1, "error": "no"},
        {"kind": "check", "ok": True},
    ]
    found = {name: value for name, value, _, _ in gpu.goals(records)}
    assert found["time over density x all-tiles time"] == pytest.approx(1.0)
    assert found["best SDPA over ours, wan-720p at 0.27"] == pytest.approx(2.0)
    assert found["best SDPA over ours, 128k at 0.1"] == pytest.approx(4.0)
    assert found["with votes over without"] == pytest.approx(1.01)
    assert found["with routing over without"] == pytest.approx(1.5)
    assert found["FlexAttention over ours"] is None


def test_a_check_fails_where_it_must():
    truth = [torch.ones(8, dtype=torch.float64)]
    good, bad = torch.ones(8) + 1e-4, torch.ones(8) + 1e-2
    [record] = gpu_checks._compared("x", [bad], [good], truth, torch.float32)
    assert not record["ok"]
    [record] = gpu_checks._compared("x", [good], [good], truth, torch.float32)
    assert record["ok"]
    bits = torch.arange(64) % 3 > 0
    flipped = bits ^ (torch.arange(64) < 2)
    assert gpu_checks._disagreement(flipped, bits, bits) == (2 / 64, 1 / 64)
    assert gpu_checks._disagreement(flipped, flipped, bits) == (2 / 64, 5 / 64)


def test_kept_tiles_have_the_diagonal_and_the_density():
    chosen = gpu.count_bits(keep_bits(1, 3, 40, 0.25, "cpu"))
    assert chosen.unique().tolist() == [10]
    bits = gpu_checks.unpack_bits(keep_bits(1, 3, 40, 0.25, "cpu"), 40)
    assert bits.diagonal(dim1=-2, dim2=-1).all()


def test_shapes_are_those_of_the_models():
    assert set(gpu.ORDER) == set(SHAPES)


def test_what_the_budget_does_not_reach_is_named():
    found = run("--device", "cpu", "--tiny", "--shape", "mochi", "--budget", "0")
    assert "left out for time: checks after this one, mochi triton 0.27, mochi sdpa-flash 1" in found.stdout


def test_bad_arguments_are_named():
    found = run("--device", "cpu", "--shape", "wan")
    assert "--shape takes wan-480p, wan-720p" in found.stderr


@pytest.mark.skipif(os.path.exists("/dev/nvidia0") or os.path.exists("/dev/kfd"), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so():
    found = run()
    assert "--device cuda needs a CUDA or ROCm GPU, found none: --device cpu --tiny tests the script" in found.stderr
