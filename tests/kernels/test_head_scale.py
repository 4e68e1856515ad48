"""The gradient of `head_scale`, which no kernel computes: it is summed from that of the queries."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

import pytest
import torch
from dit_accel_kernels import FrameDecay, block_sparse_attention
from kernel_cases import assert_within_rounding, qkv, random_lists

TOKENS = 30
FRAMES = torch.arange(TOKENS, dtype=torch.int32) // 8 - 1
FEATURES = dict(
    layout="bhsd",
    key_length=torch.tensor([30, 17]),
    token_order=torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0)),
    identity_mix=torch.tensor([0.0, 0.5, 1.0, 0.3]),
)
DECAY = FrameDecay(table=torch.tensor([1.0, 0.8, 0.5]), q_frames=FRAMES, k_frames=FRAMES)


def gradient(backend, leaves, tiles, head_scale, **arguments):
    """That of the head scales, of a weighted sum of output and LSE."""
    head_scale = head_scale.detach().requires_grad_()
    out, lse = block_sparse_attention(
        *leaves, tiles, head_scale=head_scale, return_lse=True, backend=backend, **FEATURES, **arguments
    )
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    total = (out * weights).sum() + lse.masked_fill(lse.isinf(), 0).square().sum()
    (grad,) = torch.autograd.grad(total, head_scale)
    assert grad.shape == head_scale.shape
    assert grad.dtype == head_scale.dtype
    return grad


@pytest.mark.parametrize("shape", [(4,), (2, 4)])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("arguments", [{}, dict(frame_decay=DECAY)], ids=["plain", "decay"])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's numpy
def test_equals_that_of_autograd_through_the_specification(backend, shape, arguments):
    """Pooled tiles, keys of two heads, invalid keys, an order of tokens and a mix with the values."""
    leaves, tiles, scales = qkv(2, 4, 2, TOKENS, TOKENS, 8, torch.float32), random_lists(4, 30, 30, 16, 16), []
    head_scale = 0.5 + torch.rand(shape)
    for name, wide in ((backend, False), ("reference", False), ("reference", True)):
        inputs = [x.double() if wide else x for x in (*leaves, head_scale)]
        scales.append(gradient(name, inputs[:3], tiles, inputs[3], **arguments))
    assert_within_rounding(*scales, torch.float32)


def test_float64_is_exact_at_0_and_below_too():
    leaves, tiles = qkv(2, 4, 2, TOKENS, TOKENS, 8, torch.float64), random_lists(1, 30, 30, 8, 7)
    head_scale = torch.tensor([[0.0, 1.0, -0.7, 0.3], [2.0, 0.0, 0.0, 1e-30]], dtype=torch.float64)
    found, expected = (gradient(name, leaves, tiles, head_scale) for name in ("torch", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert (expected.abs() > 1e-3).all()


def test_at_0_the_queries_get_no_gradient():
    leaves = [x.requires_grad_() for x in qkv(1, 2, 2, 20, 20, 8, torch.float32)]
    head_scale = torch.tensor([0.0, 1.0], requires_grad=True)
    out = block_sparse_attention(*leaves, random_lists(1, 20, 20, 8, 8), head_scale=head_scale, layout="bhsd")
    grad_q, grad_scale = torch.autograd.grad(out.square().sum(), (leaves[0], head_scale))
    assert torch.equal(grad_q[:, 0], torch.zeros(1, 20, 8))
    assert grad_q[:, 1].any()
    assert grad_scale.all()


def test_gradcheck():
    leaves = [x.requires_grad_() for x in qkv(2, 2, 1, 9, 9, 4, torch.float64)]
    head_scale = torch.tensor([0.0, 0.7], dtype=torch.float64, requires_grad=True)
    tiles = random_lists(1, 9, 9, 3, 4)

    def call(q, k, v, scale):
        return block_sparse_attention(q, k, v, tiles, head_scale=scale, layout="bhsd", backend="torch")

    assert torch.autograd.gradcheck(call, (*leaves, head_scale))


def test_is_part_of_a_compiled_graph():
    q, k, v = qkv(1, 2, 2, 20, 20, 8, torch.float32)
    tiles, head_scale = random_lists(1, 20, 20, 8, 8), torch.tensor([0.5, 1.0], requires_grad=True)

    def loss(scale):
        return block_sparse_attention(q, k, v, tiles, head_scale=scale * 2, layout="bhsd").square().sum()

    (expected,) = torch.autograd.grad(loss(head_scale), head_scale)
    (found,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(head_scale), head_scale)
    torch.testing.assert_close(found, expected)
