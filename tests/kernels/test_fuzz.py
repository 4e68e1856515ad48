"""Random calls of every kind on every backend, against numpy in float64: a few each time, hundreds in the slow tests.

Each failure names its number: FUZZ_SEED=<number> runs that one and those after it. FUZZ_TIMES=100 makes the slow tests
run 100 times as many as the others, 2,000 of torch in float32.
"""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from dit_accel_kernels import BackendUnavailableError, block_sparse_attention, flex_requirement, unpack_bits
from fuzz_cases import drawn, selects, spelled, tensors
from numpy_attention import EXACT, Attention, Case

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's numpy
FIRST = int(os.environ.get("FUZZ_SEED", "0"))
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 0.04}
BY_DTYPE = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16"}
RUNS = [
    ("reference", torch.float64, 40), ("reference", torch.float32, 10), ("loop", torch.float32, 20),
    ("operations", torch.float32, 20), ("operations", torch.float64, 20), ("operations", torch.bfloat16, 10),
    ("triton", torch.float32, 12), ("triton", torch.bfloat16, 3),
]  # fmt: skip
MANY = int(os.environ.get("FUZZ_TIMES", "8"))  # times as many in the slow tests


def near(found: torch.Tensor, expected: np.ndarray, tolerance: float, what: str) -> None:
    """Within a share of the largest number expected, with infinity where it is expected."""
    found, expected = found.detach().double(), torch.from_numpy(expected)
    endless = expected.isinf()
    assert torch.equal(found.isinf(), endless), f"{what}: infinity in other places"
    found, expected = found.masked_fill(endless, 0), expected.masked_fill(endless, 0)
    assert int(found.isnan().sum()) == 0, f"{what}: {int(found.isnan().sum())} numbers are none"
    error, allowed = float((found - expected).abs().max()), tolerance * (1 + float(expected.abs().max()))
    assert error <= allowed, f"{what}: off by {error:.3g}, allowed {allowed:.3g}"


def same_bits(found: torch.Tensor, one: np.ndarray, two: np.ndarray, what: str) -> None:
    """Equal wherever two thresholds beside the true one agree: rounding may decide the rest."""
    clear = torch.from_numpy(one == two)
    assert clear.float().mean() > 0.9
    assert torch.equal(found[clear], torch.from_numpy(one)[clear]), what


def beside(case: Case, share: float) -> Attention:
    """The case with its thresholds moved a little."""
    changes = {}
    if case.routing is not None:
        changes["routing"] = (case.routing[0] + 10 * share, case.routing[1])
    if case.vote is not None:
        changes["vote"] = (case.vote[0], case.vote[1] * (1 + share))
    return Attention(replace(case, **changes))


def check(backend: str, dtype: torch.dtype, seed: int, **kind) -> None:
    """One call of a backend; what fails says which."""
    case = drawn(seed, **kind)
    if dtype == torch.bfloat16:  # which tile is chosen is a matter of rounding
        case.routing = case.vote = None
    try:
        _check(backend, dtype, seed, case)
    except (AssertionError, BackendUnavailableError) as error:
        raise AssertionError(f"{spelled(case, seed)}, {backend} {BY_DTYPE[dtype]}: {error}") from error


def _check(backend: str, dtype: torch.dtype, seed: int, case: Case) -> None:
    """What it selected, what votes keep, output, LSE and, of every second call, gradients."""
    tolerance, flex, chooses = TOLERANCE[dtype], backend == "flex", selects(case)
    qkv, tiles, arguments = tensors(case, dtype, seed)
    differentiated = seed % 2 == 0 and not flex and dtype != torch.bfloat16 and case.vote is None
    qkv = [x.requires_grad_(differentiated) for x in qkv]
    wanted = dict(return_lse=not flex, return_tiles=chooses, backend=backend)
    found = block_sparse_attention(*qkv, tiles, **arguments, **wanted)
    given = iter(found if isinstance(found, tuple) else (found,))

    def in_order(x: torch.Tensor) -> torch.Tensor:
        return x if arguments["layout"] == "bhsd" else x.transpose(1, 2)

    out, lse, exact = in_order(next(given)), None if flex else next(given), None
    if chooses:
        bits = unpack_bits(next(given), tiles.key_tiles)
        same_bits(bits, *(beside(case, share).heads_states() == EXACT for share in (-1e-4, 1e-4)), "exact tiles")
        exact = bits.numpy()
    if case.vote is not None:
        bits = unpack_bits(next(given), tiles.key_tiles)
        same_bits(bits, *(beside(case, share).kept(exact) for share in (-1e-4, 1e-4)), "kept tiles")
    grads = [None, None]
    if differentiated:
        weights = np.random.default_rng(seed)
        grads = [weights.standard_normal(out.shape), weights.standard_normal(lse.shape)]
    truth = Attention(case).run(exact, *grads)
    near(out, truth.out, tolerance, "output")
    if lse is not None:
        near(lse, truth.lse, tolerance, "LSE")
    if differentiated:
        of_out, of_lse = (torch.from_numpy(x).to(dtype) for x in grads)
        total = (out * of_out).sum() + (lse.masked_fill(lse == -torch.inf, 0) * of_lse).sum()
        for name, x, y in zip("qkv", torch.autograd.grad(total, qkv), truth.grads, strict=True):
            near(in_order(x), y, 10 * tolerance, f"gradient of {name}")


@pytest.mark.parametrize(("first", "times"), [(0, 1), pytest.param(1000, MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("backend", "dtype", "count"), RUNS, indirect=["backend"], ids=str)
def test_random_calls_are_what_numpy_says(backend, dtype, count, first, times):
    for seed in range(FIRST + first, FIRST + first + count * times):
        check(backend, dtype, seed, small=backend == "triton")


@pytest.mark.slow
@pytest.mark.skipif(flex_requirement("cpu") is not None, reason="FlexAttention does not run here")
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.rare), pytest.param(2, marks=pytest.mark.rare)])
def test_a_few_random_calls_of_flex_are_what_numpy_says(seed):
    check("flex", torch.float32, FIRST + 5000 + seed, powers=True, small=True, votes=False)
