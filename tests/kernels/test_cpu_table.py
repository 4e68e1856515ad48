"""What "auto" means on a CPU: the committed table is the bench's, and decides by processor, dtype, size, features."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from dit_accel_kernels import Selection, TileLists, Vote, dense_speed, predicted_speedup, resolve_backend
from dit_accel_kernels.backends import cpu
from dit_accel_kernels.backends import flex as flex_backend
from dit_accel_kernels.backends.torch import attend as torch_attend
from dit_accel_kernels.backends.torch import compiled, fused
from dit_accel_kernels.errors import BackendUnavailableError
from kernel_cases import attend, frame_decay, full, lists_of, qkv

BENCH = Path(__file__).parents[2] / "kernels" / "bench"
sys.path.insert(0, str(BENCH))

import cpu_table  # noqa: E402

CPU = torch.device("cpu")
ROWS = json.loads(cpu.TABLE.read_text())
DTYPES = {name: dtype for dtype, name in cpu.DTYPES.items()}


def lists(density: float, tokens: int = 16384, tile: int = 128) -> TileLists:
    """So many tiles of every row."""
    count = -(-tokens // tile)
    states = (torch.arange(count) < round(density * count)).expand(count, -1) * 2
    return lists_of(states.contiguous(), tile, tile, tokens, tokens)


def auto(density: float, dtype: torch.dtype = torch.bfloat16, **sizes: int) -> str:
    return resolve_backend("auto", CPU, dtype, 128, lists(density, **sizes))


def speed(density: float, dtype: torch.dtype = torch.bfloat16, **sizes: int) -> float | None:
    return predicted_speedup(CPU, dtype, lists(density, **sizes))


@pytest.fixture
def amx(monkeypatch):
    """A Xeon with AMX and a C++ compiler."""
    monkeypatch.setattr(cpu, "processor_kind", lambda: "amx")
    monkeypatch.setattr(flex_backend, "missing_requirement", lambda device_type: None)


def test_the_table_is_what_the_bench_makes_of_the_records_of_which_a_measured_row_replaces_a_reported_one():
    assert cpu_table.rows(cpu_table.read()) == ROWS
    record = {"processor": "amx", "device": "X", "dtype": "bf16", "shape": [1, 4, 16384, 128], "block": 128}
    records = [{**record, "candidate": "flex", "density": d, "of_ideal": s} for d, s in ((0.5, 2), (0.1, 1))]
    made = cpu_table.rows(records)
    row = next(row for row in made if row["tile"] == 128 and row["backend"] == "flex")
    assert (row["shares"], row["source"]) == ([[0.1, 1], [0.5, 2]], "measured: X")
    assert [row["source"] for row in made].count(cpu_table.REPORT) == 3


def test_the_processor_is_told_by_what_it_has(monkeypatch):
    names = ("amx_tile", "avx512_bf16", "avx512")
    for name in names:
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda: True, raising=False)
    for name, kind in zip(names, ("amx", "avx512_bf16", "avx512"), strict=True):
        assert cpu.processor_kind.__wrapped__() == kind
        monkeypatch.delattr(torch.cpu, f"_is_{name}_supported")
    assert cpu.processor_kind.__wrapped__() == "other"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(str(row[name]) for name in cpu_table.KEY))
def test_the_backend_ahead_at_a_density_is_taken_and_its_speed_is_told(monkeypatch, row):
    rivals = [other for other in ROWS if all(other[name] == row[name] for name in cpu_table.KEY[:-1])]
    monkeypatch.setattr(cpu, "processor_kind", lambda: row["processor"])
    monkeypatch.setattr(flex_backend, "missing_requirement", lambda device_type: None)
    dtype, sizes = DTYPES[row["dtype"]], {"tokens": row["tokens"], "tile": row["tile"]}
    for density in (density for density, _ in row["shares"]):
        ahead = max(rivals, key=lambda one: cpu._at(tuple(map(tuple, one["shares"])), density))
        assert auto(density, dtype, **sizes) == ahead["backend"]
        share = next(share for measured, share in ahead["shares"] if abs(measured - density) < 0.01)
        assert speed(density, dtype, **sizes) == pytest.approx(share / lists(density, **sizes).density, rel=0.01)
        if row["source"].startswith("measured"):
            assert ahead["backend"] == "torch"


def test_amx_takes_the_loop_in_bf16_and_between_two_densities_its_share_is_on_their_line(amx):
    assert (auto(0.5), speed(0.5)) == ("torch", pytest.approx(0.89 / 0.5))
    assert speed(0.375) == pytest.approx((0.96 + 0.89) / 2 / 0.375)
    assert speed(0.05) == pytest.approx(0.8 / lists(0.05).density)
    assert speed(0.8) == pytest.approx(0.89 / lists(0.8).density)
    assert auto(0.5, torch.float32) == "torch"
    for tokens, share in ((8192, 0.81), (16384, 0.9)):  # of another tile where there are fewer tokens
        assert speed(0.25, tokens=tokens, tile=64) == pytest.approx(share / 0.25)


@pytest.mark.parametrize(("kind", "dtype", "even"), [
    ("avx512", "fp32", 0.885), ("avx512", "bf16", 0.942), ("avx512_bf16", "fp32", 2), ("avx512_bf16", "bf16", 2),
])  # fmt: skip
def test_the_measured_makes_gain_up_to_these_densities(monkeypatch, kind, dtype, even):
    monkeypatch.setattr(cpu, "processor_kind", lambda: kind)
    for density in (0.1, 0.25, 0.5, 0.79, 0.87, 0.9, 0.93, 0.95, 1.0):
        assert auto(density, DTYPES[dtype]) == "torch"
        if density != 0.1 or dtype == "bf16":
            assert (speed(density, DTYPES[dtype]) > 1) == (lists(density).density < even)


def test_what_no_row_serves_is_torchs_and_nothing_is_known_of_it(amx, monkeypatch):
    for dtype, tokens in ((torch.bfloat16, 4095), (torch.float16, 16384), (torch.float64, 16384)):
        assert (auto(0.5, dtype, tokens=tokens), speed(0.5, dtype, tokens=tokens)) == ("torch", None)
    monkeypatch.setattr(cpu, "processor_kind", lambda: "other")
    assert (auto(0.5), speed(0.5)) == ("torch", None)
    assert predicted_speedup(torch.device("meta"), torch.bfloat16, lists(0.5)) is None
    monkeypatch.setattr(cpu, "_serving", lambda *key: {"flex": ((0.1, 0.9),), "torch": ((0.1, 0.8),)})
    assert auto(0.5) == "flex"
    assert resolve_backend("auto", CPU, torch.bfloat16, 128, full(16384, 16384, 96, 128)) == "torch"
    assert resolve_backend("auto", CPU, torch.bfloat16, 128) == "torch"
    monkeypatch.setattr(flex_backend, "missing_requirement", lambda device_type: "a C++ compiler")
    assert (auto(0.5), speed(0.5)) == ("torch", pytest.approx(0.8 / 0.5))


@pytest.fixture
def flex_calls(monkeypatch):
    """Calls of flex, which is ahead in every call here and gives what torch does."""
    monkeypatch.setattr(cpu, "_serving", lambda *key: {"flex": ((0.1, 0.9),), "torch": ((0.1, 0.8),)})
    monkeypatch.setattr(flex_backend, "missing_requirement", lambda device_type: None)
    seen = []

    def by_torch(problem, *, need_lse):
        seen.append(problem)
        return torch_attend.attend(problem, need_lse=need_lse)

    monkeypatch.setattr(flex_backend, "attend", by_torch)
    return seen


def test_calls_go_to_flex_but_for_votes_lse_decay_masks_and_gradients(flex_calls):
    given, tiles = qkv(1, 2, 2, 64, 64, 8, torch.float32), lists(0.5, 64, 16)
    attend(*given, tiles)
    attend(*given, tiles, selection=Selection(), return_tiles=True)
    assert len(flex_calls) == 2
    votes = Selection(vote=Vote())
    for more in (
        dict(selection=votes),
        dict(return_lse=True),
        dict(frame_decay=frame_decay(64)),
        dict(backend="torch"),
    ):
        attend(*given, tiles, **more)
    masked = replace(tiles, mask_ids=torch.zeros_like(tiles.exact_indices), mask_bits=-torch.ones(1, 16, 1).int())
    attend(*given, masked)
    assert resolve_backend("auto", CPU, torch.float32, 8, masked) == "torch"
    attend(*(x.requires_grad_() for x in given), tiles).sum().backward()
    assert len(flex_calls) == 2


def test_auto_runs_where_torch_compile_is_switched_off(flex_calls, monkeypatch):
    def refuse(problem, *, need_lse):
        raise BackendUnavailableError("switched off")

    monkeypatch.setattr(flex_backend, "attend", refuse)
    call = partial(attend, *qkv(1, 2, 2, 64, 64, 8, torch.float32), lists(0.5, 64, 16))
    assert torch.equal(call(), call(backend="torch"))
    with pytest.raises(BackendUnavailableError, match="switched off"):
        call(backend="flex")


needs_compiler = pytest.mark.skipif(compiled.library() is None, reason="no C++ compiler is here to build the loop")


@pytest.fixture
def small(monkeypatch):
    """Dense calls that are measured on few tokens, and forgotten again."""
    monkeypatch.delenv(cpu.DENSE, raising=False)
    monkeypatch.setattr(cpu, "DENSE_TOKENS", 128)
    cpu._dense_speed.cache_clear()
    yield
    cpu._dense_speed.cache_clear()


@needs_compiler
def test_dense_calls_are_measured_once_and_draw_nothing_from_the_callers_generator(small, monkeypatch):
    before, taken, real = torch.get_rng_state(), [], cpu.fused.attend_by_loop

    def by_loop(problem, *args, **more):
        taken.append(problem.q.shape)
        return real(problem, *args, **more)

    monkeypatch.setattr(cpu.fused, "attend_by_loop", by_loop)
    speeds = [dense_speed(torch.float32, 32) for _ in range(2)]
    assert speeds[0] == speeds[1] > 0
    assert taken == [(1, 1, 128, 32)] * 6
    assert torch.equal(torch.get_rng_state(), before)
    dense_speed(torch.float32, 16)
    assert len(taken) == 12


@needs_compiler
@pytest.mark.parametrize(("module", "name"), [(fused, "attend_by_loop"), (cpu, "scaled_dot_product_attention")])
def test_the_slower_way_is_told_as_such(small, monkeypatch, module, name):
    monkeypatch.setattr(module, name, lambda *_, **more: [sum(range(1000)) for _ in range(1000)])
    assert (dense_speed(torch.float32, 16) < 1) == (module is fused)


@needs_compiler
def test_a_measurement_is_replaced_by_the_environments_and_other_calls_have_none(monkeypatch):
    monkeypatch.setenv(cpu.DENSE, "1.75")
    assert (dense_speed(torch.float32, 64), dense_speed(torch.float64, 64)) == (1.75, None)
    monkeypatch.setenv(cpu.DENSE, "fast")
    with pytest.raises(ValueError, match=r"^DIT_ACCEL_CPU_DENSE .*number.*'fast'"):
        dense_speed(torch.float32, 64)
    monkeypatch.setattr(fused, "library", lambda: None)
    assert dense_speed(torch.float32, 64) is None
