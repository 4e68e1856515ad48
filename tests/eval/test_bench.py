"""The bench: real shapes of every family that it knows, arms that take turns, and what can't run here."""

import dataclasses
import json
import math

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from dit_accel_eval.bench import timing as bench_module
from dit_accel_eval.bench.real_shapes import BUILDERS, find_family, make_model
from dit_accel_eval.bench.timing import BenchArm, arms_of, make_bench, run_bench
from dit_accel_eval.runs.results import read_lines
from typer.testing import CliRunner

from dit_accel import ConfigError, RadialAttention, StaticCache
from dit_accel.adapters import installed
from dit_accel.cli.app import app
from dit_accel.estimate.sizes import token_layout
from dit_accel.methods.caches.native import DiffusersCache

FAMILIES = {
    "cogvideox": "cogvideox-2b", "flux": "flux.1-dev", "hunyuan-video": "hunyuan-video", "ltx": "ltx-video-2b",
    "mochi": "mochi-1", "sd3": "sd3-medium", "wan": "wan2.1-1.3b",
}  # fmt: skip


def narrow(name: str = "wan2.1-1.3b", steps: int = 4, layers: int = 2):
    """A bench of a released model, of two heads."""
    adapter, family = find_family(name)
    family = dataclasses.replace(family, heads=2, ffn_dim=64)
    frames = {} if family.vae[0] == 1 else {"num_frames": 4 * family.vae[0] + 1}
    return make_bench(
        adapter, family, layers=layers, steps=steps, height=128, width=192, device=torch.device("cpu"),
        dtype=torch.float32, **frames,
    )  # fmt: skip


QUICK = ("ltx", "wan")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(BUILDERS)]
)
def test_every_family_that_is_described_runs_with_the_plan_s_layout(name):
    """`make_model` holds the forward's grid against the plan's."""
    made = narrow(FAMILIES[name])
    (line,) = run_bench(made, [BenchArm(name="dense", kind="dense")], rounds=1)
    assert line["work"] == pytest.approx(1)
    assert (line["ratio"]["median"], line["against"]) == (1, "dense")
    assert line["tokens"] == made.planned.layout.tokens
    assert 0 < line["attention_seconds"]["median"] < line["block_seconds"]["median"] < line["step_seconds"]["median"]
    assert line["flops_a_step"] == pytest.approx(made.planned.total_flops / made.planned.forwards)
    assert line["tflops"] == pytest.approx(line["flops_a_step"] / line["step_seconds"]["median"] / 1e12)


def test_a_whole_config_is_that_of_the_released_model():
    """All layers of a family, empty: the count of parameters is the released model's."""
    from accelerate import init_empty_weights

    _, family = find_family("wan2.1-1.3b")
    layout = token_layout(family, height=64, width=64, num_frames=5)
    with init_empty_weights():
        transformer, _ = make_model(
            installed.adapters()["wan"], family, family.layers, layout, height=64, width=64, num_frames=5
        )
    assert sum(one.numel() for one in transformer.parameters()) == pytest.approx(1.42e9, rel=0.01)


@pytest.mark.slow
def test_methods_and_caches_are_timed_beside_dense_with_their_work_and_prediction():
    made = narrow(steps=6)
    radial = RadialAttention(dense_steps=0, dense_last_steps=0, dense_layers=0, block_size=16, decay_factor=0.2)
    cache = StaticCache(every=2, warmup_steps=2, last_steps=1)
    arms = arms_of([radial, cache])
    assert [arm.name for arm in arms if arm.kind != "dense"] == [
        "radial", "staticcache", "radial + staticcache", "FirstBlockCacheConfig", "TaylorSeerCacheConfig",
    ]  # fmt: skip
    wanted = [arm for arm in arms if arm.kind != "dense" or arm.backend in ("native", "_native_math", "sage")]
    lines = {line["arm"]: line for line in run_bench(made, wanted, rounds=2)}
    assert "reason" in lines["dense, sage"]
    assert "step_seconds" not in lines["dense, sage"]
    for name in ("dense, native", "dense, _native_math"):
        assert lines[name]["work"] == pytest.approx(1)
    assert lines["radial"]["attended"] < 1
    assert lines["radial"]["work"] < 1
    assert lines["staticcache"]["work"] < 0.9
    assert lines["radial + staticcache"]["work"] < min(lines["radial"]["work"], lines["staticcache"]["work"])
    assert lines["staticcache"]["predicted"] > 1.2
    assert lines["FirstBlockCacheConfig"]["predicted"] is None
    dense = [lines["dense, native"], lines["dense, _native_math"]]
    quickest = min(dense, key=lambda one: one["step_seconds"]["median"])
    assert {line["against"] for line in lines.values() if "against" in line} == {quickest["arm"]}
    for line in lines.values():
        json.dumps(line, allow_nan=False)


def test_the_dense_arm_that_the_others_are_held_against_is_the_one_of_the_least_seconds_told(monkeypatch):
    """One slow step makes a backend's mean the worse one, however quick most of its steps are."""
    took = {"native": [0.1, 0.1, 0.1, 1.0], "_native_math": [0.2] * 4}
    made, ran = narrow(steps=4), BenchArm(name="dense", kind="dense")
    bench_module._run(made, ran, 4)

    def run(bench, arm, steps):
        arm.steps += took[arm.backend][:steps]
        arm.counts = ran.counts

    monkeypatch.setattr(bench_module, "_run", run)
    arms = [BenchArm(name=name, kind="dense", backend=name) for name in took]
    lines = run_bench(made, arms, rounds=2)
    assert [line["step_seconds"]["median"] for line in lines] == pytest.approx([0.325, 0.2])
    assert {line["against"] for line in lines} == {"_native_math"}


def test_a_dense_backend_is_the_process_wide_choice_no_longer_than_its_arm():
    before = _AttentionBackendRegistry.get_active_backend()
    arm = BenchArm(name="math", kind="dense", backend="_native_math")
    (line,) = run_bench(narrow(), [arm], rounds=1)
    assert "step_seconds" in line
    assert _AttentionBackendRegistry.get_active_backend() == before


def test_an_arm_that_fails_is_told_and_the_others_run():
    made = narrow()
    bad = BenchArm(name="bad", kind="native", methods=(DiffusersCache(config=FirstBlockCacheConfig(threshold=-1.0)),))
    told: list[str] = []
    lines = run_bench(made, [BenchArm(name="dense", kind="dense"), bad], rounds=1, say=told.append)
    assert "threshold must be >= 0" in lines[1]["reason"]
    assert told[0].startswith("bad can't run here: ")
    assert math.isfinite(lines[0]["step_seconds"]["median"])
    with pytest.raises(ConfigError, match=r"attention backend.*diffusers"):
        run_bench(made, [BenchArm(name="dense", kind="dense", backend="sage")], rounds=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--family", "wan2.1-1.3"], "did you mean"),
        (["--family", "z-image-turbo"], "bench can't make the inputs of z-image-turbo yet; "),
        (["--family", "wan2.1-1.3b", "--layers", "31"], "wan2.1-1.3b has 30 layers, got --layers 31; ask for 1 to 30"),
        (["--family", "wan2.1-1.3b", "--height", "100"], "height must be a multiple of 16 for wan2.1-1.3b, got 100"),
        (["--family", "flux.1-dev", "--layers", "1", "--height", "64", "--width", "64"], "has two kinds of blocks"),
        (["--family", "wan2.1-1.3b", "--device", "cuda:7"], "can't be used here"),
        (["--family", "wan2.1-1.3b", "-o", "/no/folder/x.jsonl"], "is not a folder; create it first"),
    ],
)
def test_what_can_not_be_timed_is_told(arguments, message):
    found = CliRunner().invoke(app, ["bench", *arguments])
    assert found.exit_code == 2
    assert message in found.stderr


def test_the_command_prints_a_table_and_appends_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_module, "make_bench", lambda *_, **__: narrow(steps=2))
    quick = lambda *given, **options: [arm for arm in arms_of(*given, **options) if arm.backend != "flex"]  # noqa: E731
    monkeypatch.setattr(bench_module, "arms_of", quick)
    out = tmp_path / "b.jsonl"
    arguments = ["bench", "--family", "wan2.1-1.3b", "--radial", "--rounds", "1", "-o", str(out)]
    found = CliRunner().invoke(app, [*arguments, "--no-native-caches"])
    assert found.exit_code == 0, found.output
    assert "times dense" in found.stdout
    assert "radial" in found.stdout
    assert "backends that do not run here: " in found.stderr
    count = len(read_lines(out))
    assert CliRunner().invoke(app, [*arguments, "--no-native-caches", "--quiet", "--json"]).exit_code == 0
    assert len(read_lines(out)) == 2 * count
