"""The custom op: gradients against the specification, opcheck, full-graph compile, and a light import."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

import subprocess
import sys
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from dit_accel_kernels import (
    FrameDecay,
    Routing,
    Selection,
    Vote,
    block_sparse_attention,
    block_sparse_attention_backward,
    pack_bits,
)
from dit_accel_kernels.checks import problem_of
from dit_accel_kernels.packing import flatten, restore
from kernel_cases import assert_within_rounding, qkv, random_lists, with_masks

FRAMES = torch.arange(30, dtype=torch.int32) // 8 - 1
DECAY = FrameDecay(table=torch.tensor([1.0, 0.8, 0.5]), q_frames=FRAMES, k_frames=FRAMES)
EVERYTHING = dict(
    layout="bhsd",
    scale=0.4,
    head_scale=torch.tensor([0.5, 1.0, 1.5, 2.0]),
    key_length=torch.tensor([30, 17]),
    frame_decay=DECAY,
    token_order=torch.randperm(30, generator=torch.Generator().manual_seed(0)),
    identity_mix=torch.tensor([0.0, 0.5, 1.0, 0.3]),
    identity_rows=torch.arange(30) % 3 > 0,
)


@pytest.mark.parametrize("arguments", [dict(layout="bhsd"), EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("partial", [False, True])
def test_gradients_equal_those_of_the_specification(arguments, groups, key_heads, partial):
    q, k, v = qkv(2, 4, key_heads, 30, 30, 8, torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v[..., :5] if partial else v)]
    tiles = random_lists(groups, 30, 30, 8, 7)
    tiles = with_masks(tiles) if partial else tiles
    found, expected = [], []
    seeds = [torch.randn(2, 4, 30, leaves[2].shape[3], dtype=torch.float64), torch.randn(2, 4, 30, dtype=torch.float64)]
    for result, backend in ((found, "torch"), (expected, "reference")):
        out, lse = block_sparse_attention(*leaves, tiles, return_lse=True, backend=backend, **arguments)
        lse = lse.masked_fill(lse.isinf(), 0.0)
        result += torch.autograd.grad([out, lse], leaves, seeds)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # a pooled tile's mean decay is a float32 sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_dtype_gradients_within_rounding(dtype):
    leaves = qkv(1, 2, 2, 100, 100, 32, dtype)
    tiles, seed = random_lists(1, 100, 100, 16, 16), torch.randn(1, 2, 100, 32).to(dtype)
    grads = []
    for backend, wide in (("torch", False), ("reference", False), ("reference", True)):
        inputs = [(x.double() if wide else x).detach().requires_grad_() for x in leaves]
        out = block_sparse_attention(*inputs, tiles, layout="bhsd", backend=backend)
        grads.append(torch.autograd.grad(out, inputs, seed.to(out.dtype)))
    for a, b, c in zip(*grads, strict=True):
        assert_within_rounding(a, b, c, dtype)


def test_gradcheck():
    leaves = [x.requires_grad_() for x in qkv(1, 2, 1, 9, 9, 4, torch.float64)]
    tiles = random_lists(1, 9, 9, 3, 4)
    assert torch.autograd.gradcheck(
        lambda q, k, v: block_sparse_attention(q, k, v, tiles, layout="bhsd", backend="torch"), leaves
    )


def test_backward_entry_equals_autograd():
    leaves = [x.requires_grad_() for x in qkv(2, 4, 2, 30, 30, 8, torch.float32)]
    tiles, seed = random_lists(1, 30, 30, 8, 8), torch.randn(2, 4, 30, 8)
    out = block_sparse_attention(*leaves, tiles, **EVERYTHING)
    expected = torch.autograd.grad(out, leaves, seed)
    for a, b in zip(block_sparse_attention_backward(seed, *leaves, tiles, **EVERYTHING), expected, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(TypeError, match="densty"):
        block_sparse_attention_backward(seed, *leaves, tiles, layout="bhsd", densty=1)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_opcheck(everything, layout, return_lse):
    """Everything means masks inside tiles and values of their own head dim too."""
    q, k, v = qkv(2, 4, 2, 30, 30, 8, torch.float32, layout)
    leaves = [x.requires_grad_() for x in (q, k, v[..., :5] if everything else v)]
    arguments = {**(EVERYTHING if everything else {}), "layout": layout, "return_lse": return_lse}
    tiles = random_lists(1, 30, 30, 8, 8, pooled=everything)
    problem = problem_of(*leaves, with_masks(tiles) if everything else tiles, **arguments)
    torch.library.opcheck(torch.ops.dit_accel_kernels.block_sparse_attention.default, flatten(problem))


@pytest.mark.sample(1)
@pytest.mark.parametrize("return_tiles", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck_with_a_selection(backend, return_tiles):
    """Keep bits, routing and votes, gradients included."""
    leaves = [x.requires_grad_() for x in qkv(2, 4, 2, 30, 30, 8, torch.float32)]
    selection = Selection(keep=pack_bits(torch.rand(2, 4, 4, 4) > 0.2), routing=Routing(beta=0.0), vote=Vote())
    given = dict(layout="bhsd", selection=selection, return_tiles=return_tiles, return_lse=True, backend=backend)
    problem = problem_of(*leaves, random_lists(1, 30, 30, 8, 8), **given)
    torch.library.opcheck(torch.ops.dit_accel_kernels.block_sparse_attention.default, flatten(problem))


@pytest.mark.parametrize("partial", [False, True])
def test_compiles_to_one_full_graph_and_serves_other_lists(partial):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=counter)
    def call(q, k, v, tiles):
        out, lse = block_sparse_attention(q * 2, k, v, tiles, return_lse=True, **EVERYTHING)
        return out + 1, lse

    torch.manual_seed(1)
    for step in range(4):
        leaves = [x.requires_grad_() for x in qkv(2, 4, 4, 30, 30, 8, torch.float32)]
        tiles = random_lists(1, 30, 30, 3, 3)  # lists of other lengths every time
        tiles = with_masks(tiles) if partial else tiles
        out, lse = call(*leaves, tiles)
        expected, expected_lse = block_sparse_attention(
            leaves[0] * 2, *leaves[1:], tiles, return_lse=True, **EVERYTHING
        )
        assert torch.equal(out, expected + 1), step
        assert torch.equal(lse, expected_lse)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        for a, b in zip(grads, torch.autograd.grad((expected + 1).square().sum(), leaves), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2  # the second list makes its length dynamic, no more after that


@pytest.mark.parametrize("leaf", [None, "q", "v"])
def test_what_only_a_gradient_wants_is_made_for_one_only(monkeypatch, leaf):
    """The LSE, the tiles that routing chose and the backward: none without an input that requires a gradient."""
    asked, ops = [], torch.ops.dit_accel_kernels

    def counted(op, kind, *args):
        problem = restore(args[4:] if kind else args)
        asked.append((kind, problem.return_lse, problem.return_tiles))
        return op(*args)

    for kind in ("", "_backward"):
        name = f"block_sparse_attention{kind}"
        monkeypatch.setattr(ops, name, partial(counted, getattr(ops, name), kind))
    tensors = dict(zip("qkv", qkv(1, 2, 2, 30, 30, 8, torch.float32), strict=True))
    if leaf:
        tensors[leaf].requires_grad_()
    selection = Selection(routing=Routing(beta=0.0))
    out = block_sparse_attention(
        *tensors.values(), random_lists(1, 30, 30, 8, 8), layout="bhsd", selection=selection, backend="triton"
    )
    assert asked == [("", leaf is not None, leaf is not None)]  # LSE, chosen tiles
    with torch.no_grad():
        block_sparse_attention(*tensors.values(), random_lists(1, 30, 30, 8, 8), layout="bhsd", backend="triton")
    assert asked[1] == ("", False, False)
    if leaf:
        out.sum().backward()
        assert [kind for kind, *_ in asked] == ["", "", "_backward"]
        assert [name for name, x in tensors.items() if x.grad is not None] == [leaf]


def test_import_loads_neither_triton_nor_a_compiler():
    code = (
        "import sys; import dit_accel_kernels; "
        "print([m for m in ('triton', 'torch._inductor', 'diffusers', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
