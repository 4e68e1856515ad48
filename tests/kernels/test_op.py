"""The custom op: its backward entry, opcheck, full-graph compile, and what is made only where a gradient wants it."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

from functools import partial

import pytest
import torch
import torch._dynamo.testing
from dit_accel_kernels import Routing, Selection, Vote, block_sparse_attention_backward, pack_bits
from dit_accel_kernels.checks import problem_of
from dit_accel_kernels.packing import flatten, restore
from kernel_cases import CALLS, attend, frame_decay, qkv, random_lists, with_masks

EVERYTHING = dict(
    scale=0.4, key_length=torch.tensor([30, 17]), frame_decay=frame_decay(30, frame=8, table=(1.0, 0.8, 0.5)),
    token_order=torch.randperm(30, generator=torch.Generator().manual_seed(0)),
    identity_mix=torch.tensor([0.0, 0.5, 1.0, 0.3]), identity_rows=torch.arange(30) % 3 > 0,
)  # fmt: skip
SCALES = torch.tensor([0.5, 1.0, 1.5, 2.0])


def test_backward_entry_equals_autograd():
    leaves = [x.requires_grad_() for x in qkv(2, 4, 2, 30, 30, 8, torch.float32)]
    tiles, seed, options = random_lists(1, 30, 30, 8, 8), torch.randn(2, 4, 30, 8), dict(EVERYTHING, head_scale=SCALES)
    expected = torch.autograd.grad(attend(*leaves, tiles, **options), leaves, seed)
    found = block_sparse_attention_backward(seed, *leaves, tiles, layout="bhsd", **options)
    assert all(map(torch.equal, found, expected))
    with pytest.raises(TypeError, match="densty"):
        block_sparse_attention_backward(seed, *leaves, tiles, layout="bhsd", densty=1)


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", ["everything", "masks inside and a head dim of v", "bits that pool", "tokens first"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(backend, name):
    call = CALLS[name]
    leaves = [x.requires_grad_() for x in call.tensors()]
    problem = problem_of(*leaves, call.lists(), return_lse=True, backend=backend, **call.arguments())
    torch.library.opcheck(torch.ops.dit_accel_kernels.block_sparse_attention.default, flatten(problem))


@pytest.mark.parametrize("return_tiles", [False, True])
def test_opcheck_with_votes_and_routing(return_tiles):
    leaves = [x.requires_grad_(return_tiles) for x in qkv(2, 4, 2, 30, 30, 8, torch.float32)]
    selection = Selection(keep=pack_bits(torch.rand(2, 4, 4, 4) > 0.2), routing=Routing(beta=0.0), vote=Vote())
    options = dict(layout="bhsd", backend="torch", return_tiles=return_tiles, return_lse=return_tiles)
    problem = problem_of(*leaves, random_lists(1, 30, 30, 8, 8), selection=selection, **options)
    torch.library.opcheck(torch.ops.dit_accel_kernels.block_sparse_attention.default, flatten(problem))


@pytest.mark.parametrize("partial", [False, True])
def test_compiles_to_one_full_graph_and_serves_other_lists(partial):
    """With gradients of the scales of heads too."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def call(q, k, v, scales, tiles):
        out, lse = attend(q * 2, k, v, tiles, return_lse=True, head_scale=scales * 2, **EVERYTHING)
        return out + 1, lse

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    torch.manual_seed(1)  # of the second lists every length differs from the first ones'
    for _ in range(3):
        leaves = [x.requires_grad_() for x in (*qkv(2, 4, 4, 30, 30, 8, torch.float32), SCALES.clone())]
        tiles = random_lists(1, 30, 30, 3, 3)  # lists of other lengths every time
        tiles = with_masks(tiles) if partial else tiles
        (out, lse), (expected, expected_lse) = (function(*leaves, tiles) for function in (compiled, call))
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)
        torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), leaves) for x in (out, expected)))
    assert counter.frame_count <= 2  # the second list makes its length dynamic, no more after that


@pytest.mark.parametrize(("backend", "leaf"), [("triton", None), ("triton", "q"), ("triton", "v"), ("torch", "q")])
def test_what_only_a_gradient_wants_is_made_for_one_only(monkeypatch, backend, leaf):
    """The LSE, the tiles that routing chose and the backward: none without an input that requires a gradient."""
    asked, kept, ops = [], [], torch.ops.dit_accel_kernels
    by_lse = backend == "triton" and leaf is not None

    def counted(op, kind, *args):
        problem = restore(args[4:] if kind else args)
        asked.append((kind, problem.return_lse, problem.return_tiles))
        assert not kind or (args[2] is not None) == by_lse  # the output that the forward kept
        return op(*args)

    for kind in ("", "_backward"):
        name = f"block_sparse_attention{kind}"
        monkeypatch.setattr(ops, name, partial(counted, getattr(ops, name), kind))
    tensors = dict(zip("qkv", qkv(1, 2, 2, 20, 20, 8, torch.float32), strict=True))
    if leaf:
        tensors[leaf].requires_grad_()
    call = partial(attend, *tensors.values(), random_lists(1, 20, 20, 8, 8), backend=backend)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(0) or x, lambda x: x):
        out = call(selection=Selection(routing=Routing(beta=0.0)))
    assert asked == [("", by_lse, leaf is not None)]  # LSE, chosen tiles
    assert len(kept) == (8 + 2 * by_lse if leaf else 0)  # q, k, v, four of the lists, what was chosen; output and LSE
    with torch.no_grad():
        call()
    assert asked[1] == ("", False, False)
    if leaf:
        out.sum().backward()
        assert [kind for kind, *_ in asked] == ["", "", "_backward"]
        assert [name for name, x in tensors.items() if x.grad is not None] == [leaf]
