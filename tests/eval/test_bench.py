"""The bench: real shapes of every family that it knows, arms that take turns, a budget, and what can't run here."""

import contextlib
import itertools
import json
import os
import re
import signal
import time
from dataclasses import replace

import pytest
import torch
from dit_accel_eval.bench import forwards
from dit_accel_eval.bench.forwards import BenchArm, BenchPlan, bench_arms, bench_of, run_bench
from dit_accel_eval.bench.loop import Beside, OutOfMemoryError, in_turn
from dit_accel_eval.bench.options import SHAPES, BenchOptions, Shape, named_shapes
from dit_accel_eval.bench.real_shapes import LATENTS, find_family, make_model, memory_of_logits, memory_of_model
from dit_accel_eval.runs.results import read_lines
from toy_bench import toy_bench
from typer.testing import CliRunner

from dit_accel import ConfigError, RadialAttention, StaticCache
from dit_accel.cli.app import app
from dit_accel.errors import DitAccelError
from dit_accel.estimate.prediction import estimate

FAMILIES = {
    "cogvideox": "cogvideox-2b", "flux": "flux.1-dev", "hunyuan-video": "hunyuan-video", "ltx": "ltx-video-2b",
    "mochi": "mochi-1", "sd3": "sd3-medium", "wan": "wan2.1-1.3b",
}  # fmt: skip


CPU = torch.device("cpu")


def narrow(name: str = "wan2.1-1.3b", steps: int = 4, layers: int = 2):
    """A bench of a released model, of two heads."""
    _, family = find_family(name)
    frames = None if family.vae[0] == 1 else 4 * family.vae[0] + 1
    shape = Shape(name=name, family=name, height=128, width=192, num_frames=frames)
    options = BenchOptions(family=name, heads=2, layers=layers, num_inference_steps=steps)
    return bench_of(shape, options, CPU, torch.float32)


@pytest.fixture
def here(monkeypatch):
    """Arms run in this process, which begins no other."""

    def made(plan, bench_of, given, device, dtype, free):
        return contextlib.nullcontext(replace(bench_of(*given, device, dtype), free=free))

    monkeypatch.setattr(forwards, "Beside", made)


QUICK = ("ltx", "wan")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(LATENTS)]
)
def test_every_family_that_is_described_runs_with_the_plan_s_layout(name):
    """`make_model` holds the forward's grid against the plan's."""
    made = narrow(FAMILIES[name])
    (line,) = run_bench(made, [BenchArm(name="dense")], rounds=1)
    assert line["work"] == pytest.approx(1)
    assert (line["ratio"]["median"], line["against"]) == (1, "dense")
    assert line["tokens"] == made.plan.dense.layout.tokens
    assert 0 < line["attention_seconds"]["median"] < line["block_seconds"]["median"] < line["step_seconds"]["median"]
    assert line["flops_a_step"] == pytest.approx(made.plan.dense.total_flops / made.plan.dense.forwards)
    assert line["tflops"] == pytest.approx(line["flops_a_step"] / line["step_seconds"]["median"] / 1e12)


def test_a_whole_config_is_that_of_the_released_model():
    """All layers of a family, empty: the count of parameters is the released model's."""
    from accelerate import init_empty_weights

    adapter, family = find_family("wan2.1-1.3b")
    with init_empty_weights():
        transformer, _ = make_model(adapter, family, estimate(adapter, family, height=64, width=64, num_frames=5))
    assert sum(one.numel() for one in transformer.parameters()) == pytest.approx(1.42e9, rel=0.01)


@pytest.mark.slow
def test_methods_are_timed_beside_dense_with_their_work_and_prediction():
    radial = RadialAttention(dense_steps=0, dense_last_steps=0, dense_layers=0, block_size=16, decay_factor=0.2)
    arms = bench_arms([radial, StaticCache(every=2, warmup_steps=2, last_steps=1)])
    assert [arm.name for arm in arms if arm.methods] == ["radial", "staticcache", "radial + staticcache"]
    wanted = [arm for arm in arms if arm.methods or arm.backend in ("native", "sage")]
    lines = {line["arm"]: line for line in run_bench(narrow(steps=6), wanted, rounds=2)}
    dense, radial, cache = (lines[name] for name in ("dense, native", "radial", "staticcache"))
    assert "reason" in lines["dense, sage"]
    assert dense["work"] == pytest.approx(1)
    assert radial["attended"] < 1
    assert lines["radial + staticcache"]["work"] < min(radial["work"], cache["work"], 0.9)
    assert cache["predicted"] > 1.2
    assert dense["predicted"] is None
    json.dumps(lines, allow_nan=False)


def test_the_dense_arm_that_the_others_are_held_against_is_the_one_of_the_least_seconds_told(monkeypatch):
    """One slow step makes a backend's mean the worse one, however quick most of its steps are."""
    took = {"native": [0.1, 0.1, 0.1, 1.0], "_native_math": [0.2] * 4}
    made = narrow(steps=4)
    ran = made(BenchArm(name="dense"), 4)
    monkeypatch.setattr(
        forwards.Bench, "__call__", lambda bench, arm, steps: replace(ran, steps=took[arm.backend][:steps])
    )
    arms = [BenchArm(name=name, backend=name) for name in took]
    lines = run_bench(made, arms, rounds=2)
    assert [line["step_seconds"]["median"] for line in lines] == pytest.approx([0.325, 0.2])
    assert {line["against"] for line in lines} == {"_native_math"}


def test_an_arm_that_fails_is_told_and_the_others_run(monkeypatch):
    made, bad = narrow(steps=2), BenchArm(name="bad", methods=(StaticCache(every=2),))
    monkeypatch.setattr(forwards.dit_accel, "attach", lambda *_, **__: 1 / 0)
    lines = run_bench(made, [BenchArm(name="dense"), bad], rounds=1)
    assert lines[1]["reason"] == "ZeroDivisionError: division by zero"
    assert lines[0]["step_seconds"]["median"] > 0
    with pytest.raises(ConfigError, match=r"attention backend.*diffusers"):
        run_bench(made, [BenchArm(name="dense", backend="sage")], rounds=1)


def test_an_arm_without_memory_for_it_is_a_row_of_the_table_with_both_numbers(monkeypatch, here):
    """With a little more than the model takes: enough for attention in tiles, and too little for every logit."""
    shape = "wan2.1-1.3b:128x192x17"
    plan = BenchPlan.of(named_shapes(shape)[0], BenchOptions(shapes=shape, heads=2, num_inference_steps=1))
    model, logits = memory_of_model(plan, torch.float32), memory_of_logits(plan, "flex")
    assert logits == 4 * 4 * 2 * 480**2
    monkeypatch.setattr(forwards, "free_memory", lambda device: model + logits // 2)
    few = [BenchArm(name=f"dense, {one}", backend=one) for one in ("native", "flex")]
    monkeypatch.setattr(forwards, "bench_arms", lambda methods: [*few, *bench_arms(methods)[-1:]])
    sparser = ["--set", "radial.block_size=16", "--set", "radial.decay_factor=0.2"]
    found = CliRunner().invoke(app, ["bench", "--shapes", shape, "--rounds", "1", "--radial", *sparser])
    assert found.exit_code == 0, found.output
    assert "dense, flex is refused: it needs about 0.8 GiB, and 0.8 GiB are free" in found.stdout
    assert "backends that do not run here: none" in found.stderr
    rows = {cells[0]: cells for cells in (re.split(r"\s{2,}", line) for line in found.stdout.splitlines())}
    assert rows["dense, flex"][1] == "memory"
    density = rows["arm"].index("density")
    assert 0 < float(rows["radial"][density]) < 1  # in the one step, although a run begins with dense ones


def test_an_arm_that_runs_out_of_memory_in_a_later_round_leaves_the_others(monkeypatch):
    made, count = narrow(steps=1), itertools.count()
    ran = made(BenchArm(name="dense"), 1)

    def run(bench, arm, steps):
        if arm.name == "large" and next(count) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB")
        return ran

    monkeypatch.setattr(forwards.Bench, "__call__", run)
    dense, large = run_bench(made, [BenchArm(name="dense"), BenchArm(name="large")], rounds=3)
    assert (dense["rounds"], large["reason"], large["out_of_memory"]) == (3, "ran out of memory", True)


@pytest.mark.slow
def test_a_process_that_is_killed_ends_an_arm_and_the_next_begins_another():
    with Beside(None, toy_bench, ("made",), CPU, torch.float32, 4 << 30) as bench:
        assert bench("dense", 3) == ("made", "cpu", torch.float32, "dense", 3)
        with pytest.raises(DitAccelError, match=r"KeyError: 'sage'"):
            bench("sage", 1)
        first = bench._process.pid
        os.kill(first, signal.SIGKILL)
        with pytest.raises(OutOfMemoryError):
            bench("dense", 1)
        assert bench("dense", 1)[3:] == ("dense", 1)
        assert bench._process.pid != first
        last = bench._process
    assert last.exitcode == -signal.SIGKILL


def test_the_named_shapes_are_the_sequences_of_the_released_models_and_need_memory_accordingly():
    """Tokens by hand: latents of an eighth, patches of two, a frame and one for every four; text where it joins."""
    options = BenchOptions(shapes="all", num_inference_steps=1)
    plans = {shape.name: BenchPlan.of(shape, options) for shape in named_shapes("all")}
    assert {name: plan.dense.layout.tokens for name, plan in plans.items()} == {
        "flux-1mp": 64 * 64 + 512, "flux-4mp": 128 * 128 + 512, "wan-480p": 21 * 30 * 52, "wan-720p": 21 * 45 * 80,
        "hunyuan-720p": 33 * 45 * 80 + 256,
    }  # fmt: skip
    assert list(plans) == list(SHAPES)
    assert named_shapes("wan-480p, wan-480p") == [plans["wan-480p"].shape]
    narrow_options = BenchOptions(shapes="all", heads=2, num_inference_steps=1)
    for name, least, most in (("wan-480p", 30, 40), ("wan-720p", 150, 220), ("flux-1mp", 0.5, 2)):
        plan = BenchPlan.of(named_shapes(name)[0], narrow_options)
        assert least < (memory_of_model(plan, torch.float32) + memory_of_logits(plan, "flex")) / 2**30 < most
        assert memory_of_model(plan, torch.float32) < 8 * 2**30


def test_no_round_begins_that_the_time_left_is_too_short_for():
    runs = []
    arms = {"a": lambda: runs.append("a") or time.sleep(0.02), "b": lambda: runs.append("b")}
    assert len(list(in_turn(arms, 2))) == 2
    assert runs == ["a", "b"] * 2
    assert len(list(in_turn(arms, 50, deadline=time.perf_counter() + 0.1))) < 7
    assert len(list(in_turn(arms, 50, deadline=0.0))) == 1


def test_a_shape_that_the_budget_has_no_time_for_is_left_out(monkeypatch):
    """By the one before it, of which a pass takes 1 s."""
    clock = iter([0.0, 0.0, 2.0, 2.0])
    monkeypatch.setattr(forwards.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(forwards, "run_bench", lambda one, *_, **__: [{"shape": one.plan.shape.name, "rounds": 1}])
    said: list[str] = []
    long, short = named_shapes("wan2.1-1.3b:384x384x17,wan2.1-1.3b:128x128x17")
    options = BenchOptions(shapes="", heads=1, num_inference_steps=1, budget=15)
    lines = list(forwards.run_shapes([long, short], [], options=options, device=CPU, dtype=torch.float32,
                                     say=said.append))  # fmt: skip
    assert [line["shape"] for line in lines] == [short.name]
    work = [BenchPlan.of(shape, options).dense.total_flops for shape in (long, short)]
    assert f"{long.name} is left out: it would take about {2 * work[0] / work[1]:.0f} s; raise --budget" in said


def test_what_can_not_be_timed_is_said():
    for arguments, message in (
        (["--family", "z-image-turbo"], "bench can't make the inputs of z-image-turbo yet; "),
        (["--family", "wan2.1-1.3b", "--layers", "31"], "wan2.1-1.3b has 30 layers, got --layers 31; ask for 1 to 30"),
        (["--family", "flux.1-dev", "--layers", "1", "--height", "64", "--width", "64"], "has two kinds of blocks"),
        (["--family", "wan2.1-1.3b", "--heads", "13"], "wan2.1-1.3b has 12 heads, got --heads 13; ask for 1 to 12"),
        ([], "bench needs either --family NAME, such as wan2.1-1.3b, or --shapes all; give one"),
        (["--shapes", "all", "--num-frames", "5"], "--shapes have sizes of their own, got --num-frames; write FAMILY:"),
        (["--shapes", "wan-48p"], "no shape is called 'wan-48p'; did you mean 'wan-480p'?"),
        (["--shapes", "wan2.1-1.3b:481x832x81"], "height must be a multiple of 16 for wan2.1-1.3b, got 481"),
        (["--shapes", ","], "--shapes names none; say all, or some of flux-1mp"),
        (["--shapes", "all", "--dtype", "float23"], "there is no dtype 'float23'; did you mean 'float32'?"),
    ):
        found = CliRunner().invoke(app, ["bench", *arguments])
        assert (found.exit_code, message in found.stderr) == (2, True)


def test_the_command_prints_a_table_and_appends_lines(tmp_path, monkeypatch, here):
    monkeypatch.setattr(
        forwards, "bench_arms", lambda methods: [one for one in bench_arms(methods) if one.backend != "flex"]
    )
    out = tmp_path / "b.jsonl"
    arguments = ["bench", "--family", "wan2.1-1.3b", "--heads", "2", "--height", "128", "--width", "128", "--radial"]
    arguments += ["--num-frames", "5", "--num-inference-steps", "2", "--rounds", "1", "-o", str(out)]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert "2 layers of 2 of 12 heads, 128 tokens (128 x 128, 5 frames), float32" in found.stdout
    assert "times dense" in found.stdout
    assert "radial" in found.stdout
    assert "backends that do not run here: " in found.stderr
    assert "wan2.1-1.3b, 128 tokens\nround 1 of 1 is done" in found.stderr
    count = len(read_lines(out))
    found = CliRunner().invoke(app, [*arguments, "--quiet", "--json"])
    assert found.exit_code == 0
    assert json.loads(found.stdout) == read_lines(out)[count:]
    assert len(read_lines(out)) == 2 * count


def test_a_method_that_is_asked_for_and_can_not_run_is_an_error_behind_the_table(monkeypatch, here):
    arms = lambda methods: [BenchArm(name="dense"), BenchArm(name="radial", methods=tuple(methods))]  # noqa: E731
    monkeypatch.setattr(forwards, "bench_arms", arms)
    found = CliRunner().invoke(app, ["bench", "--shapes", "flux.1-dev:64x64", "--rounds", "1", "--radial"])
    assert (found.exit_code, "flux.1-dev, 2 layers of 2 of 24 heads, 528 tokens" in found.stdout) == (2, True)
    assert "it can't run here: radial: radial makes no sense on flux" in " ".join(found.stderr.split())


def test_shapes_are_timed_dense_and_by_the_presets_where_no_method_is_named(here):
    found = CliRunner().invoke(app, ["bench", "--shapes", "wan2.1-1.3b:64x64x5,ltx-video-2b:64x64x9", "--rounds", "1"])
    assert found.exit_code == 0, found.output
    assert "wan2.1-1.3b, 2 layers of 2 of 12 heads, 32 tokens" in found.stdout
    assert "ltx-video-2b, 2 layers of 2 of 32 heads" in found.stdout
    assert found.stdout.count("\nsol of fast  ") == 2
    assert "sol of fast computed every pair" in found.stdout  # of one tile
