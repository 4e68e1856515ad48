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
from kernel_cases import CALLS, qkv, random_lists, with_masks

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


@pytest.mark.parametrize("name", ["everything", "masks inside and a head dim of v", "bits that pool", "tokens first"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(backend, name):
    call = CALLS[name]
    leaves = [x.requires_grad_() for x in call.tensors()]
    problem = problem_of(*leaves, call.lists(), return_lse=True, backend=backend, **call.arguments())
    torch.library.opcheck(torch.ops.dit_accel_kernels.block_sparse_attention.default, flatten(problem))


@pytest.mark.parametrize("return_tiles", [False, True])
def test_opcheck_with_votes_and_routing(return_tiles):
    leaves = [x.requires_grad_() for x in qkv(2, 4, 2, 30, 30, 8, torch.float32)]
    selection = Selection(keep=pack_bits(torch.rand(2, 4, 4, 4) > 0.2), routing=Routing(beta=0.0), vote=Vote())
    given = dict(layout="bhsd", selection=selection, return_tiles=return_tiles, return_lse=True, backend="torch")
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
