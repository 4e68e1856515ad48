"""The grid of kernel calls against the float64 specification: interpreted here, compiled on a card where there is one.

`make bench-gpu` runs the same grid without pytest. A few cases of every feature are part of `make test`.
"""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from dit_accel_kernels.backends.triton.support import interpreted

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels" / "bench"))

import grid

CASES = grid.cases()


def runs_here(case: grid.Case) -> bool:
    """Whether it runs in the interpreter too: of the usual kinds over sizes, half do, in a checkerboard."""
    at = case.at
    if case.backend == "fa4":
        return False
    if at.dim > 128:
        return (at.dim, at.dtype) in ((192, "bf16"), (256, "fp32"))
    if case.bulk or at.dtype == "fp32" or at == grid.SHAPE:
        return True
    return (at.dim // 32 + at.tile // 64 + (at.dtype == "fp16") + grid.USUAL.index(case.kind)) % 2 == 0


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if i % 20 == 13 else pytest.mark.slow, id=case.name)
        for i, case in enumerate(case for case in CASES if not interpreted() or runs_here(case))
    ],
)
def test_grid(case, device):
    if case.missing(device):
        pytest.skip(f"needs {case.missing(device)}")
    if interpreted():  # fewer tokens, still ragged
        case = replace(case, at=replace(case.at, tokens=case.at.tile * 3 // 2 - 5))
    records = grid.check(case, device)
    assert records
    assert not [record for record in records if not record["ok"]]


def test_the_grid_has_what_it_must():
    for cases in (CASES, list(filter(runs_here, CASES))):
        settings = [case.at for case in cases]
        sizes = {(at.dim, at.dtype, at.tile) for at in settings}
        assert sizes >= set(product((64, 96, 128), ("bf16", "fp16"), (64, 128)))
        assert {at.batch for at in settings} == {3}
        assert {(at.layout, at.groups) for at in settings} == set(product(("bshd", "bhsd"), (1, 2, 6)))
        assert set(grid.kinds()) <= {case.kind for case in cases}
        assert any(case.bulk for case in cases)
        assert len({case.name for case in cases}) == len(cases)


def test_a_check_fails_where_it_must():
    truth = torch.ones(8, dtype=torch.float64)
    good, bad = torch.ones(8) + 1e-4, torch.ones(8) + 1e-2
    for values, yardstick, fails in (
        (bad, good, True), (good, good, False), (bad * torch.nan, good, True), (good + torch.inf, good, True),
    ):  # fmt: skip
        errors = grid.errors(values, yardstick, truth, torch.float32)
        assert {error > allowed for error, allowed in errors.values()} == {fails}
    bits = torch.arange(64) % 3 > 0
    flipped = bits ^ (torch.arange(64) < 2)
    assert grid.disagreement(flipped, bits, bits) == (2 / 64, 1 / 64)
    assert grid.disagreement(flipped, flipped, bits) == (2 / 64, 5 / 64)
