"""The Triton backward: its plan by columns, what the forward chose, and how its rows are normalised."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

import importlib
from dataclasses import replace

import pytest
import torch
from dit_accel_kernels import (
    BackendUnavailableError,
    Routing,
    Selection,
    TileLists,
    Vote,
    block_sparse_attention,
    pack_bits,
)
from dit_accel_kernels.backends.triton import attend as triton_backend
from dit_accel_kernels.backends.triton import backward as triton_backward
from dit_accel_kernels import states as states_module
from dit_accel_kernels import count_bits
from dit_accel_kernels.backends.triton.plan import bits_of, grouped
from dit_accel_kernels.backends.triton.transpose import column_plan
from kernel_cases import WIDE, assert_within_rounding, problem_from, qkv, random_lists

pytestmark = [
    pytest.mark.usefixtures("unwritten_is_nan"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),  # log of a pooled tile without a key
]


@pytest.mark.sample(2)
@pytest.mark.parametrize("mix", [False, True], ids=["plain", "mixed"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_backward_follows_what_the_forward_routed(backend, mix, monkeypatch):
    """Routing runs once; its tiles are those of the specification's gradient."""
    calls = []
    for module, name in ((triton_backend, "route"), (states_module, "routing_scores")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, real=real: calls.append(0) or real(*args))
    leaves = [x.requires_grad_() for x in qkv(1, 2, 1, 70, 70, 16, torch.float32)]
    tiles, grad_out = random_lists(1, 70, 70, 16, 16), torch.randn(1, 2, 70, 16)
    selection = Selection(keep=pack_bits(torch.rand(1, 2, 5, 5) < 0.8), routing=Routing(beta=0.0), vote=Vote())
    arguments: dict = dict(layout="bhsd", token_order=torch.randperm(70))
    if mix:
        arguments |= dict(identity_mix=torch.tensor([0.2, 0.7]))
    found = block_sparse_attention(*leaves, tiles, selection=selection, return_tiles=True, backend=backend, **arguments)
    grads = torch.autograd.grad(found[0], leaves, grad_out)
    assert len(calls) == 1
    arguments |= dict(selection=replace(selection, routing=None, vote=None, routed=found[1]), backend="reference")
    expected = []
    for dtype in (torch.float32, WIDE):
        inputs = [x.detach().to(dtype).requires_grad_() for x in leaves]
        out = block_sparse_attention(*inputs, tiles, **arguments)
        expected.append(torch.autograd.grad(out, inputs, grad_out.to(dtype)))
    assert count_bits(found[1]).sum() < count_bits(selection.keep).sum()
    for x, a, b in zip(grads, *expected, strict=True):
        assert_within_rounding(x, a, b, torch.float32)


@pytest.mark.parametrize("pooled", [False, True])
def test_an_inexact_lse_has_no_part_in_float32(pooled):
    """A tenth more or less in every row: the weights are divided by their own sum."""
    q, k, v = qkv(1, 2, 1, 60, 60, 16, torch.float32)
    problem = problem_from(random_lists(1, 60, 60, 16, 16, pooled=pooled), q, k, v)
    grad_out = torch.randn_like(q)
    out, lse, *_ = triton_backend.attend(problem, need_lse=True)
    exact, moved = (
        triton_backward.attend_backward(problem, out, x, grad_out, None) for x in (lse, lse + torch.rand_like(lse) / 5)
    )
    for one, other in zip(exact, moved, strict=True):
        torch.testing.assert_close(one, other)


def test_lists_are_transposed():
    tiles = random_lists(3, 100, 80, 16, 16)
    q, k, v = qkv(1, 3, 3, 100, 80, 8, torch.float32)
    plan = column_plan(problem_from(tiles, q, k, v), whole_chunks=True)
    states = torch.zeros(3, 7, 5, dtype=torch.uint8)
    for group in range(3):
        for tile in range(5):
            start, middle, end = plan.bounds[group, tile].tolist()
            rows = plan.q_tiles[start:end].tolist()
            assert rows == sorted(rows)
            assert rows[middle - start :] == [row for row in rows if row == 6]  # the ragged last row needs a mask
            states[group, rows, tile] = 2
    assert torch.equal(states, tiles.states() // 2 * 2)
    counts = (plan.bounds[..., 2] - plan.bounds[..., 0]).gather(1, plan.order.long())
    assert bool((counts[:, 1:] <= counts[:, :-1]).all())
    words = bits_of(tiles.pooled_offsets, tiles.pooled_indices, 5)
    assert torch.equal(
        words[..., 0] >> torch.arange(5)[:, None, None] & 1, (tiles.states() == 1).int().permute(2, 0, 1)
    )


def test_plan_is_made_once_for_a_list():
    q, k, v = qkv(1, 1, 1, 64, 64, 8, torch.float32)
    problem = problem_from(random_lists(1, 64, 64, 16, 16), q, k, v)
    assert column_plan(problem, whole_chunks=True) is column_plan(replace(problem, q=q + 1), whole_chunks=True)
    assert column_plan(problem, whole_chunks=True) is not column_plan(problem, whole_chunks=False)


def test_entries_of_an_owner_keep_their_order_within_a_section():
    order, edges = grouped(torch.tensor([2, 0, 2, 2]), torch.tensor([True, False, False, False]), 3, 2)
    assert order.tolist() == [1, 2, 3, 0]
    assert edges.tolist() == [0, 1, 1, 1, 1, 3, 4]


def test_wide_dtypes_are_refused():
    q, k, v = qkv(1, 1, 1, 16, 16, 8, WIDE)
    problem = problem_from(TileLists.full(16, 16, block_q=16, block_k=16), q, k, v)
    with pytest.raises(BackendUnavailableError, match=r"'triton'.*bfloat16, float16.*float32 \(found torch.float64\)"):
        triton_backward.attend_backward(problem, q, q[..., 0].float(), q, None)


def test_kernels_take_a_power_of_two_of_warps_whose_number_is_written_in_their_files():
    files = [
        importlib.import_module(f"dit_accel_kernels.backends.triton.{name}")
        for name in ("expand", "pool", "route", "votes")
    ]
    assert {file.NUM_WARPS for file in files} <= {1, 2, 4, 8}
