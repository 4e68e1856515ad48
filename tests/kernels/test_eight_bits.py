"""Queries and keys in eight bits: the kernel against the simulation, what the numbers are, and what is refused."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

import subprocess
import sys
from unittest import mock

import pytest
import torch
from dit_accel_kernels import (
    EXACT,
    BackendUnavailableError,
    FrameDecay,
    Routing,
    Selection,
    TileLists,
    Vote,
    block_sparse_attention,
    block_sparse_attention_backward,
    block_sparse_attention_eager,
    pack_bits,
    triton_requirement,
)
from dit_accel_kernels.backends.triton import launch, support
from dit_accel_kernels.precision import centre_of, rounded
from kernel_cases import qkv, random_lists

BOTH = ["int8", "fp8"]
ORDER = torch.randperm(40, generator=torch.Generator().manual_seed(0))


pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


def full(tokens: int) -> TileLists:
    """Exact tiles of 16 x 16 throughout."""
    states = torch.full((tokens // 16, tokens // 16), EXACT, dtype=torch.uint8)
    return TileLists.from_states(states, block_q=16, block_k=16, num_q=tokens, num_k=tokens)


def attend(q, k, v, tiles, backend="reference", **arguments):
    return block_sparse_attention(q, k, v, tiles, layout="bhsd", return_lse=True, backend=backend, **arguments)


@pytest.mark.parametrize("vote", [Vote(threshold=-2.0), Vote(criterion="mass", threshold=0.05)])
@pytest.mark.parametrize("rest", ["skip", "pooled"])
def test_selections_and_votes(vote, rest):
    """The centre is one constant for a row, so that votes are those of the logits; routing sees q and k as they are."""
    q, k, v = qkv(1, 2, 2, 96, 96, 32, torch.float32)
    tiles = full(96)
    keep = pack_bits(torch.rand(1, 2, 6, 6) > 0.3)
    selection = Selection(keep=keep, rest=rest, routing=Routing(beta=-0.5) if rest == "pooled" else None, vote=vote)
    arguments = dict(selection=selection, return_tiles=True, precision="int8")
    found, expected = (attend(q, k + 2, v, tiles, backend, **arguments) for backend in ("triton", "reference"))
    assert torch.equal(found[2], expected[2])
    assert torch.equal(found[3], expected[3])
    for one, other in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


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
    assert torch.equal(rounded(torch.zeros_like(x), precision, 8), torch.zeros_like(x))


def test_what_all_keys_share_costs_nothing():
    """Keys far from 0 lose no more than those around it, since their mean is taken off; the LSE has it."""
    q, k, v = (x.double() for x in qkv(1, 2, 2, 64, 64, 32, torch.float32))
    tiles = random_lists(2, 64, 64, 16, 16)
    offset = 30 * torch.randn(1, 2, 1, 32, dtype=torch.float64)
    near, far = attend(q, k, v, tiles, precision="int8"), attend(q, k + offset, v, tiles, precision="int8")
    torch.testing.assert_close(far[0], near[0], rtol=1e-9, atol=1e-9)
    shift = (q * offset).sum(-1) * 32**-0.5
    torch.testing.assert_close(far[1], near[1] + shift)
    truth = attend(q, k + offset, v, tiles)
    assert 1e-4 < (far[0] - truth[0]).norm() / truth[0].norm() < 0.02


def test_the_centre_is_the_mean_of_the_valid_keys():
    means, length = torch.randn(2, 3, 4, 8), torch.tensor([[4.0, 4, 4, 1], [4, 0, 2, 0]])
    expected = (means * length[:, None, :, None]).sum(2) / torch.tensor([13.0, 6.0])[:, None, None]
    torch.testing.assert_close(centre_of(means, length)[:, :, 0], expected)
    assert centre_of(means, length * 0).abs().max() == 0


def test_frame_decay_keeps_the_keys_where_they_are():
    """min(x, t x) depends on where 0 is: with the keys' mean taken off it would give another attention."""
    q, k, v = (x.double() for x in qkv(1, 1, 1, 32, 32, 16, torch.float32))
    frames = torch.arange(32, dtype=torch.int32) // 16
    decay = FrameDecay(table=torch.tensor([1.0, 0.2]), q_frames=frames, k_frames=frames)
    tiles = full(32)
    k = k + 1
    truth, found = (attend(q, k, v, tiles, frame_decay=decay, precision=x)[0] for x in (None, "int8"))
    assert (found - truth).norm() / truth.norm() < 0.02


def test_auto_is_triton_and_others_are_refused_by_name():
    q, k, v = qkv(1, 1, 1, 32, 32, 16, torch.float32)
    tiles = random_lists(1, 32, 32, 16, 16)
    found, expected = (attend(q, k, v, tiles, backend, precision="int8") for backend in ("auto", "triton"))
    assert torch.equal(found[0], expected[0])
    for backend in ("torch", "flex", "fa4"):
        with pytest.raises(BackendUnavailableError, match=f"'int8' needs backend 'triton' .*found '{backend}'"):
            attend(q, k, v, tiles, backend, precision="int8")
    with pytest.raises(ValueError, match=r"precision .*'int8', 'fp8'.*'int4'"):
        attend(q, k, v, tiles, precision="int4")
    with pytest.raises(BackendUnavailableError, match=r"'fp8'.*'triton'.*\(found torch.float64\)"):
        attend(q.double(), k.double(), v.double(), tiles, "auto", precision="fp8")


def test_gradients_are_refused():
    q, k, v = qkv(1, 1, 1, 32, 32, 16, torch.float32)
    tiles = random_lists(1, 32, 32, 16, 16)
    for backend in ("auto", "reference"):
        with pytest.raises(ValueError, match=r"'int8'.*requires_grad=True"):
            attend(q, k.clone().requires_grad_(), v, tiles, backend, precision="int8")
    with pytest.raises(ValueError, match="precision 'fp8'"):
        block_sparse_attention_backward(q, q, k, v, tiles, layout="bhsd", precision="fp8")
    leaf = k.clone().requires_grad_()
    out = block_sparse_attention_eager(q, leaf, v, tiles, layout="bhsd", precision="int8", backend="reference")
    assert not out.requires_grad  # as that call never has


@pytest.mark.parametrize(
    ("arch", "fp8"),
    [("sm_80", None), ("sm_86", None), ("sm_89", "fn"), ("sm_90", "fn"), ("sm_100", "fn"), ("sm_120", "fn"),
     ("gfx90a", None), ("gfx942", "fnuz"), ("gfx950", "fn"), ("gfx1100", None), ("gfx1201", "fn"), ("xpu", None)],
)  # fmt: skip
def test_numbers_of_architectures(arch, fp8):
    assert launch.eight_bit_number(arch, "int8") == torch.int8
    assert launch.eight_bit_number(arch, "fp8") == (fp8 and getattr(torch, f"float8_e4m3{fp8}"))


def test_fp8_is_refused_below_compute_capability_8_9():
    device = torch.device("cuda")
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(8, 6)),
        mock.patch.object(support, "architecture", return_value="sm_86"),
    ):
        assert triton_requirement(device, torch.bfloat16, 64, "int8") is None
        assert "8.9, gfx942 or newer for products of fp8 (found sm_86)" in triton_requirement(
            device, torch.bfloat16, 64, "fp8"
        )


def test_the_plain_interpreter_refuses_fp8_that_it_cuts_off():
    code = (
        "import torch; from dit_accel_kernels import triton_requirement as r; "
        "print([r(torch.device('cpu'), torch.float16, 64, x) for x in ('int8', 'fp8')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "[None, \"'int8' in Triton's interpreter (found 'fp8', to which Triton" in found
