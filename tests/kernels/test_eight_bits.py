"""Queries and keys in eight bits: what the numbers are, selections beside them, and what is refused.

Calls against the simulation are in test_calls.py.
"""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

from functools import partial

import pytest
import torch
from dit_accel_kernels import Routing, Selection, Vote, block_sparse_attention_backward, block_sparse_attention_eager
from dit_accel_kernels.bits import pack_bits
from dit_accel_kernels.errors import BackendUnavailableError
from dit_accel_kernels.precision import centre_of, rounded
from kernel_cases import attend, frame_decay, full, qkv, random_lists

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")
reference = partial(attend, backend="reference", return_lse=True)


@pytest.mark.parametrize("vote", [Vote(threshold=-2.0), Vote(criterion="mass", threshold=0.05)])
@pytest.mark.parametrize("rest", ["skip", "pooled"])
def test_selections_and_votes(vote, rest):
    """The centre is one constant for a row, so that votes are those of the logits; routing sees q and k as they are."""
    q, k, v = qkv(1, 2, 2, 64, 64, 32, torch.float32)
    keep, routing = pack_bits(torch.rand(1, 2, 4, 4) > 0.3), Routing(beta=-0.5) if rest == "pooled" else None
    selection = Selection(keep=keep, rest=rest, routing=routing, vote=vote)
    options = dict(selection=selection, return_tiles=True, return_lse=True, precision="int8")
    found, expected = (attend(q, k + 2, v, full(64), backend=name, **options) for name in ("triton", "reference"))
    assert all(map(torch.equal, found[2:], expected[2:]))
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("precision", "worst"), [("int8", 0.5 / 127), ("fp8", 2**-4)])
def test_a_number_is_off_by_half_a_step_at_most(precision, worst):
    """int8: half of a step of the block's scale; fp8: a sixteenth of the number, or half of the least, 2^-9."""
    x = torch.randn(2, 3, 50, 16, dtype=torch.float64)
    top = torch.nn.functional.pad(x, (0, 0, 0, 6)).unflatten(2, (7, 8)).abs().amax((-2, -1))
    top = top.repeat_interleave(8, 2)[:, :, :50, None]
    allowed = worst * top if precision == "int8" else (worst * x.abs()).maximum(top / 448 * 2**-10)
    error = (rounded(x, precision, 8) - x).abs()
    assert (error <= allowed * (1 + 1e-9)).all()
    assert error.max() > 0.4 * worst * float(top.min())
    steps = rounded(x, "int8", 8) / top * 127
    torch.testing.assert_close(steps, steps.round())
    assert torch.equal(rounded(torch.zeros_like(x), precision, 8), torch.zeros_like(x))


def test_what_all_keys_share_costs_nothing():
    """Keys far from 0 lose no more than those around it, since their mean is taken off; the LSE has it."""
    q, k, v = qkv(1, 2, 2, 64, 64, 32, torch.float64)
    tiles, offset = random_lists(2, 64, 64, 16, 16), 30 * torch.randn(1, 2, 1, 32, dtype=torch.float64)
    near, far = (reference(q, x, v, tiles, precision="int8") for x in (k, k + offset))
    torch.testing.assert_close(far[0], near[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(far[1], near[1] + (q * offset).sum(-1) * 32**-0.5)
    truth = reference(q, k + offset, v, tiles)
    assert 1e-4 < (far[0] - truth[0]).norm() / truth[0].norm() < 0.02


def test_the_centre_is_the_mean_of_the_valid_keys_but_with_frame_decay():
    """min(x, t x) depends on where 0 is: with the keys' mean taken off it would give another attention."""
    means, length = torch.randn(2, 3, 4, 8), torch.tensor([[4.0, 4, 4, 1], [4, 0, 2, 0]])
    expected = (means * length[:, None, :, None]).sum(2) / torch.tensor([13.0, 6.0])[:, None, None]
    torch.testing.assert_close(centre_of(means, length)[:, :, 0], expected)
    assert centre_of(means, length * 0).abs().max() == 0
    q, k, v = qkv(1, 1, 1, 32, 32, 16, torch.float64)
    decay = frame_decay(32, table=(1.0, 0.2), first=0)
    truth, found = (reference(q, k + 1, v, full(32), frame_decay=decay, precision=x)[0] for x in (None, "int8"))
    assert (found - truth).norm() / truth.norm() < 0.02


def test_auto_is_triton_and_others_and_gradients_are_refused_by_name():
    q, k, v = qkv(1, 1, 1, 32, 32, 16, torch.float32)
    call = partial(attend, tiles=random_lists(1, 32, 32, 16, 16))
    assert torch.equal(*(call(q, k, v, backend=name, precision="int8") for name in ("auto", "triton")))
    for backend in ("torch", "flex", "fa4"):
        with pytest.raises(BackendUnavailableError, match=f"'int8' needs backend 'triton' .*found '{backend}'"):
            call(q, k, v, backend=backend, precision="int8")
    with pytest.raises(ValueError, match=r"precision .*'int8', 'fp8'.*'int4'"):
        call(q, k, v, precision="int4")
    with pytest.raises(BackendUnavailableError, match=r"'fp8'.*'triton'.*\(found torch.float64\)"):
        call(q.double(), k.double(), v.double(), precision="fp8")
    leaf = k.clone().requires_grad_()
    for backend in ("auto", "reference"):
        with pytest.raises(ValueError, match=r"'int8'.*requires_grad=True"):
            call(q, leaf, v, backend=backend, precision="int8")
    options = dict(layout="bhsd", tiles=call.keywords["tiles"])
    with pytest.raises(ValueError, match="precision 'fp8'"):
        block_sparse_attention_backward(q, q, k, v, precision="fp8", **options)
    out = block_sparse_attention_eager(q, leaf, v, precision="int8", backend="reference", **options)
    assert not out.requires_grad  # as that call never has
