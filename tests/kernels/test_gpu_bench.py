"""The GPU bench's two commands run from end to end in the interpreter, on toy shapes, and need little else."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "kernels" / "bench"
sys.path.insert(0, str(BENCH))

import gpu  # noqa: E402
import timed  # noqa: E402
from inputs import keep_bits, lists  # noqa: E402
from predictions import SHAPES  # noqa: E402

TINY = ("--device", "cpu", "--tiny")
BARE = """
import sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("rich", "typer", "diffusers", "transformers", "dit_accel", "safetensors", "scipy"):
            raise ModuleNotFoundError(f"a bare machine has no {name}")

sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
if "cpu" in sys.argv:
    import triton_interpreter
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script on a machine that has torch, triton and numpy and little else."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "kernels", ROOT / "tests" / "support")))}
    command = [sys.executable, "-c", BARE, str(BENCH / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@pytest.mark.slow
def test_check(tmp_path):
    out = tmp_path / "gpu.jsonl"
    found = run("check", *TINY, "--match", "bshd-g1", "--out", str(out))  # all kinds; test_grid has the rest
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {r["kind"] for r in records} == {"check"}
    assert all(r["ok"] and 0 <= r["error"] <= r["allowed"] for r in records)
    parts = {r["part"].split(",")[0] for r in records}
    assert parts >= {"out", "lse", "grad_q", "grad_k", "grad_v", "tiles", "votes"}
    assert {r["device"] for r in records} == {"CPU, interpreted"}
    assert f"{len(records)} of {len(records)} comparisons within the rule" in found.stdout


@pytest.mark.slow
def test_time(tmp_path):
    out = tmp_path / "gpu.jsonl"
    found = run("time", *TINY, "--shape", "wan-720p", "--out", str(out))
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    records = [json.loads(line) for line in out.read_text().splitlines()]
    seen = {(r["candidate"], r["density"]) for r in records}
    ours = {("triton", d) for d in (0.1, 0.25, 0.27, 0.5, 1.0)}
    assert ours | {("triton-backward", 0.27), ("triton-decay", 0.27), ("triton-pooled", 0.1), ("flex", 0.27)} <= seen
    assert {("triton-routed", 0.1), ("triton-kept", 0.27), ("triton-votes", 0.27)} <= seen
    failed = {r["candidate"] for r in records if "error" in r}
    assert failed <= {"sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "flex"}
    assert all(r["ok"] and 0 <= r["rows_error"] <= r["rows_allowed"] for r in records if "error" not in r)
    assert "interpreted: times mean nothing" in found.stdout


def test_what_makes_a_run_fail():
    """A wrong result, a launch that does not compile, a call of ours that raises, and nothing compared at all."""
    good = dict(kind="time", candidate="triton", ok=True)
    raised = dict(kind="time", candidate="triton-decay", error="RuntimeError: no")
    rival = dict(kind="time", candidate="sdpa-flash", error="RuntimeError: no kernel")
    assert not gpu.wrong([good, rival, dict(kind="compiled", launches=1, of=2, seconds=1.0)])
    assert gpu.wrong([good, {**good, "ok": False}])
    assert gpu.wrong([good, dict(kind="check", case="x", part="run", ok=False, error="RuntimeError: no")])
    assert gpu.wrong([good, dict(kind="compile", launch="fwd", error="no")])
    assert gpu.wrong([good, raised])
    assert gpu.wrong([])
    assert gpu.wrong([rival])


def test_timed_calls_that_all_raise_end_with_1_and_are_counted(monkeypatch, capsys):
    def broken(*_: object):
        def prepare():
            raise RuntimeError("no kernel image")

        return {("triton", 0.27): prepare, ("sdpa-flash", 1.0): prepare}

    monkeypatch.setattr(gpu, "calls_of", broken)
    monkeypatch.setattr(gpu.faulthandler, "dump_traceback_later", lambda *_, **__: None)  # pytest has its own
    monkeypatch.setattr(sys, "argv", ["gpu.py", "time", *TINY, "--shape", "mochi"])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 1
    shown = capsys.readouterr().out
    assert "0 of 0 comparisons within the rule\n1 timed calls of ours raised" in shown


@pytest.mark.parametrize(("checked", "timed", "worst"), [(0, 0, 0), (1, 0, 1), (0, 2, 2), (3, 1, 3)])
def test_make_runs_both_commands_and_ends_with_the_worse_exit_code(tmp_path, checked, timed, worst):
    python = tmp_path / "python"
    log = tmp_path / "log"
    python.write_text(f'#!/bin/sh\necho "$2" >> {log}\n[ "$2" = check ] && exit {checked}\nexit {timed}\n')
    python.chmod(0o755)
    found = subprocess.run(
        ["make", "bench-gpu", f"PYTHON={python}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert log.read_text().split() == ["check", "time"]
    assert (found.returncode == 0) == (worst == 0)
    assert worst == 0 or f"Error {worst}" in found.stderr


@pytest.mark.slow
def test_rows_of_a_timed_call_are_compared():
    """A wrong row, key gradient or decay shows in the sampled tiles; what is right does not."""
    shape = replace(SHAPES["wan-720p"], heads=2, tokens=120, dim=16, block=32)
    for name, density in (("triton", 0.27), ("triton-decay", 0.27), ("triton-pooled", 0.1), ("triton-routed", 0.1)):
        call = timed.calls_of(shape, torch.float32, "cpu")[name, density]()
        out, *rest = call.run()
        error, allowed = call.check((out, *rest))
        assert error <= allowed
        out[:, -1, -1] += 0.01
        error, allowed = call.check((out, *rest))
        assert error > allowed
    inputs = tuple(torch.randn(1, 2, 120, 16) for _ in range(3))
    call = timed.gradients(inputs, lists(120, 32, 0.5, 0, "cpu"), 0.5)
    grads = [x.clone() for x in call.run()]
    error, allowed = call.check(tuple(grads))
    assert error <= allowed
    grads[2][:, -1, 64:96] *= 1.01
    error, allowed = call.check(tuple(grads))
    assert error > allowed


def test_a_timed_call_shows_what_was_predicted_for_this_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    args, shape = argparse.Namespace(device="cuda"), SHAPES["wan-720p"]
    found = gpu.prediction(shape, "triton", 0.27, args)
    assert gpu.prediction(shape, "flex", 0.27, args) == {}
    assert gpu.prediction(shape, "triton", 0.27, argparse.Namespace(device="cpu")) == {}
    record = dict(kind="time", shape="wan-720p", candidate="triton", density=0.27, seconds=0.05, tflops=600.0, ok=True)
    assert f"at least {found['predicted_bound'] * 1e3:.3f} ms (l2)" in gpu.line({**record, **found})


def test_kept_tiles_have_the_diagonal_and_the_density():
    chosen = timed.count_bits(keep_bits(1, 3, 40, 0.25, "cpu"))
    assert chosen.unique().tolist() == [10]
    bits = timed.unpack_bits(keep_bits(1, 3, 40, 0.25, "cpu"), 40)
    assert bits.diagonal(dim1=-2, dim2=-1).all()


def test_shapes_are_those_of_the_models():
    assert set(gpu.ORDER) == set(SHAPES)


@pytest.mark.slow
def test_what_the_budget_does_not_reach_is_named():
    found = run("time", *TINY, "--shape", "mochi", "--budget", "0")
    assert "left out for time: mochi triton 0.27, mochi sdpa-flash 1" in found.stdout
    found = run("check", *TINY, "--match", "g6-pooled+backward", "--budget", "0")
    assert "left out for time: fp32-d16-b16-" in found.stdout
    assert "0 of 0 comparisons" in found.stdout


def test_bad_arguments_are_named():
    found = run("time", "--device", "cpu", "--shape", "wan")
    assert "--shape takes wan-480p, wan-720p" in found.stderr


@pytest.mark.skipif(os.path.exists("/dev/nvidia0") or os.path.exists("/dev/kfd"), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so():
    found = run("check")
    assert "--device cuda needs a CUDA or ROCm GPU, found none: --device cpu --tiny tests the script" in found.stderr
