"""The Triton backward against autograd through the float64 specification, in Triton's interpreter on the CPU."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

import importlib
import random
from dataclasses import replace

import pytest
import torch
from dit_accel_kernels import (
    BackendUnavailableError,
    FrameDecay,
    Routing,
    Selection,
    TileLists,
    Vote,
    block_sparse_attention,
    pack_bits,
)
from dit_accel_kernels.backends import reference
from dit_accel_kernels.backends.triton import attend as triton_backend
from dit_accel_kernels.backends.triton import backward as triton_backward
from dit_accel_kernels.backends.triton.launch import row_of, table
from dit_accel_kernels import states as states_module
from dit_accel_kernels.problem import Problem
from dit_accel_kernels.features import tile_means
from dit_accel_kernels import count_bits
from dit_accel_kernels.states import selected_states
from dit_accel_kernels import EXACT, POOLED
from dit_accel_kernels.backends.triton.plan import bits_of, grouped
from dit_accel_kernels.backends.triton.transpose import column_plan
from kernel_cases import WIDE, assert_within_rounding, qkv, random_lists
from torch import Tensor

pytestmark = [
    pytest.mark.usefixtures("unwritten_is_nan"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),  # log of a pooled tile without a key
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(q: Tensor, k: Tensor, v: Tensor, tiles: TileLists, **features) -> Problem:
    """A call in [B, H, S, D]."""
    names = ("exact_offsets", "exact_indices", "pooled_offsets", "pooled_indices")
    lists = {name: getattr(tiles, name) for name in names}
    defaults = dict(scale=q.shape[-1] ** -0.5, head_scale=None, key_valid=None, decay=None)
    return Problem(q=q, k=k, v=v, block_q=tiles.block_q, block_k=tiles.block_k, **lists, **{**defaults, **features})


def specified(problem: Problem, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """Output and LSE, and gradients of q, k and v, of the reference in the problem's dtype and token order."""
    leaves = [x.detach().clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    out, lse, *_ = reference.attend(replace(problem, q=leaves[0], k=leaves[1], v=leaves[2]).tiled())
    order = problem.token_order
    if order is not None:
        out, lse = (back_in_order(x, order) for x in (out, lse))
    loss = (out * grad_out).sum()
    if grad_lse is not None:
        loss = loss + (lse.masked_fill(lse.isinf(), 0.0) * grad_lse).sum()
    return [out.detach(), lse.detach()], list(torch.autograd.grad(loss, leaves))


def columns(problem: Problem) -> tuple[Tensor, Tensor]:
    """Logits of all exact and pooled columns, -inf where absent, and the columns' values, as in the specification."""
    q, k, v = problem.q, problem.k, problem.v
    wide = WIDE if q.dtype == WIDE else torch.float32
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    weight = None if problem.key_valid is None else problem.key_valid[:, None]
    k_mean, length = tile_means(k, problem.block_k, weight)
    v_mean, _ = tile_means(v, problem.block_k, weight)
    states = selected_states(problem).repeat_interleave(problem.block_q, 2)[:, :, : q.shape[2]]
    exact = (states == EXACT).repeat_interleave(problem.block_k, -1)[..., : k.shape[2]]
    if weight is not None:
        exact, v = exact & weight[..., None, :], v.masked_fill(~weight[..., None], 0)
    scale = problem.scale if problem.head_scale is None else problem.scale * problem.head_scale[..., None, None]
    x, x_pooled = (q @ k.mT).to(wide) * scale, (q @ k_mean.mT).to(wide) * scale
    if problem.decay is not None:
        t, t_pooled = reference._decay(problem, wide)
        x, x_pooled = torch.minimum(x, t * x), torch.minimum(x_pooled, t_pooled * x_pooled)
    x_pooled = x_pooled + length.to(wide).clamp(min=1).log().unsqueeze(-2)
    x_pooled = x_pooled.masked_fill(~((states == POOLED) & (length > 0).unsqueeze(-2)), -torch.inf)
    return torch.cat([x.masked_fill(~exact, -torch.inf), x_pooled], -1), torch.cat([v, v_mean], 2)


def recomputed(
    problem: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, *, normalised: bool
) -> list[Tensor]:
    """The backward as a function of output and LSE as given, dense, in the problem's dtype and tiled token order.

    `normalised`: weights are divided by their sum, so that the rounding of the LSE has no part in them.
    """
    leaves = [x.detach().clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    x, values = columns(replace(problem, q=leaves[0], k=leaves[1], v=leaves[2]))
    absent = x == -torch.inf
    x = x.masked_fill(absent, 0.0)
    delta = (out.to(x.dtype) * grad_out.to(x.dtype)).sum(-1, keepdim=True)
    delta = delta if grad_lse is None else delta - grad_lse[..., None].to(x.dtype)
    p = (x.detach() - lse[..., None].masked_fill(lse[..., None].isinf(), 0.0)).exp().masked_fill(absent, 0.0)
    if normalised:
        total = p.sum(-1, keepdim=True)
        p = p / total.masked_fill(total == 0, 1.0)
    grad_x = p * ((grad_out @ values.detach().mT).to(x.dtype) - delta)
    loss = (grad_x.masked_fill(absent, 0.0) * x).sum() + ((p.to(values.dtype) @ values) * grad_out).sum()
    return list(torch.autograd.grad(loss, leaves))


def check(problem: Problem, *, with_lse: bool = True, logits: float = 1.0) -> list[Tensor]:
    """Found gradients against float64 truth on the same inputs, by the house's rule of rounding.

    Output and LSE are inputs of the backward, as the specification made them in the problem's dtype. What their
    rounding does to the gradients (the row sum of p * grad_p is taken from the rounded output) is in truth and
    yardstick alike; in float32 the LSE's does nothing, there the weights are divided by their sum.
    """
    grad_out = torch.randn(problem.q.shape).to(problem.q.dtype)
    grad_lse = torch.randn(problem.q.shape[:3]) if with_lse else None
    (out, lse), _ = specified(problem, grad_out, grad_lse)
    given = [None if x is None else in_order(x, problem.token_order) for x in (out, lse, grad_out, grad_lse)]
    normalised = problem.q.dtype == torch.float32
    yardstick = recomputed(problem.tiled(), *given, normalised=normalised)
    wide = [None if x is None else x.to(WIDE) for x in given]
    truth = recomputed(widened(problem).tiled(), *wide, normalised=normalised)
    found = triton_backward.attend_backward(problem, out, lse, grad_out, grad_lse)
    for x, like, a, b in zip(found, (problem.q, problem.k, problem.v), yardstick, truth, strict=True):
        assert x.dtype == like.dtype
        assert_within_rounding(in_order(x, problem.token_order), a, b, problem.q.dtype, logits)
    return list(found)


def widened(problem: Problem) -> Problem:
    """The same call on the same numbers in float64."""
    return replace(problem, **{name: getattr(problem, name).to(WIDE) for name in ("q", "k", "v")})


def in_order(x: Tensor, order: Tensor | None) -> Tensor:
    """Tokens of [B, H, S, ...] from the caller's to the tiled order."""
    return x if order is None else x.index_select(2, order)


def back_in_order(x: Tensor, order: Tensor | None) -> Tensor:
    """Tokens of [B, H, S, ...] from the tiled to the caller's order."""
    return x if order is None else torch.zeros_like(x).index_copy(2, order, x)


@pytest.mark.parametrize("normalised", [False, True])
def test_recomputed_is_the_gradient_of_the_specification(normalised):
    """The dense backward of these tests is autograd's, where rounding does not hide a difference."""
    q, k, v = qkv(2, 4, 2, 80, 80, 16, WIDE)
    decay = (torch.tensor([1.0, 0.9, 0.6]), frames(80, 20, 5), frames(80, 20, 5))
    features = dict(decay=decay, head_scale=torch.rand(2, 4) + 0.5, key_valid=torch.rand(2, 80) > 0.2)
    problem = make(q, k, v, random_lists(4, 80, 80, 16, 32), **features)
    grad_out, grad_lse = torch.randn_like(q), torch.randn(q.shape[:3], dtype=WIDE)
    given, truth = specified(problem, grad_out, grad_lse)
    found = recomputed(problem, *given, grad_out, grad_lse, normalised=normalised)
    for a, b in zip(found, truth, strict=True):
        assert float((a - b).norm() / b.norm()) < torch.finfo(torch.float32).eps ** 1.5


def frames(tokens: int, each: int, before: int = 0) -> Tensor:
    """Frame of every token; the first `before` lie outside the video."""
    return torch.cat([torch.full((before,), -1), torch.arange(tokens - before) // each]).int()


@pytest.mark.sample(4)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [63, 100])
@pytest.mark.parametrize("pooled", [False, True])
def test_odd_sizes(dtype, tokens, pooled):
    q, k, v = qkv(1, 2, 2, tokens, tokens, 16, dtype)
    check(make(q, k, v, random_lists(1, tokens, tokens, 32, 16, pooled=pooled)))


@pytest.mark.parametrize("sizes", [(150, 70, 16, 24), (70, 150, 24, 48), (40, 200, 8, 64)])
def test_tiles_of_any_size(sizes):
    num_q, num_k, block_q, block_k = sizes
    q, k, v = qkv(1, 2, 2, num_q, num_k, 16, torch.float32)
    check(make(q, k, v, random_lists(1, num_q, num_k, block_q, block_k)))


@pytest.mark.sample(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [8, 32, 40, 96, 128, 256])
def test_head_dims(dtype, dim):
    q, k, v = qkv(1, 1, 1, 64, 64, dim, dtype)
    check(make(q, k, v, random_lists(1, 64, 64, 32, 16)))


def test_chunks_of_the_launch_are_smaller_than_tiles():
    """Tiles of 256 x 192 are cut into chunks of queries and keys."""
    q, k, v = qkv(1, 1, 1, 300, 400, 16, torch.bfloat16)
    check(make(q, k, v, random_lists(1, 300, 400, 256, 192)))


def test_programs_of_pooled_tiles_that_take_half_a_word_of_them(monkeypatch):
    """As in wide float32 heads: 16 tiles each, of 41, so that the last word has a full half and a ragged one."""
    key = row_of("cpu", torch.float32, 16, kernel="pooled")
    monkeypatch.setitem(table(), key, replace(table()[key], block_k=16))
    q, k, v = qkv(2, 4, 2, 40, 326, 16, torch.float32)
    frames_of = (frames(40, 10), frames(326, 50))
    lists = random_lists(4, 40, 326, 16, 8)
    check(make(q, k, v, lists, decay=(torch.tensor([1.0, 0.9, 0.6]), *frames_of)))


@pytest.mark.sample(2)
@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_lists_heads_and_layouts(groups, key_heads, layout):
    tensors = qkv(2, 4, key_heads, 40, 24, 16, torch.float32, layout)
    q, k, v = tensors if layout == "bhsd" else (x.transpose(1, 2) for x in tensors)
    found = check(make(q, k, v, random_lists(groups, 40, 24, 16, 16)))
    assert [x.stride() for x in found] == [x.stride() for x in (q, k, v)]


@pytest.mark.sample(3)
@pytest.mark.parametrize(("dtype", "groups"), [(torch.float32, 2), (torch.bfloat16, 1)])
@pytest.mark.parametrize("features", range(16))
def test_features_together(dtype, groups, features):
    """Every subset of key validity, decay, head scale and token order, over pooled, exact and skipped tiles."""
    q, k, v = qkv(2, 2, 1, 80, 80, 16, dtype)
    arguments: dict = dict(scale=0.3)
    if features & 1:
        arguments |= dict(key_length=torch.tensor([80, 41]), key_mask=torch.rand(2, 80) > 0.2)
        k, v = k.clone(), v.clone()
        k[1, :, 50:], v[1, :, 50:] = 1e4, -1e4  # what an invalid key holds must not matter
    if features & 2:
        arguments |= dict(decay=(torch.tensor([1.0, 0.9, 0.6]), frames(80, 20, 5), frames(80, 20, 5)))
    if features & 4:
        arguments |= dict(head_scale=torch.rand(2, 2) + 0.5)
    if features & 8:
        arguments |= dict(token_order=torch.randperm(80))
    check(make(q, k, v, random_lists(groups, 80, 80, 16, 32), **arguments))


AXES: dict[str, list] = {
    "dtype": DTYPES,
    "dim": [8, 32, 64, 72, 96, 128],
    "tokens": [(63, 63), (100, 100), (1, 40), (70, 33), (17, 130)],
    "blocks": [(16, 16), (32, 16), (64, 64), (24, 48), (128, 32)],
    "heads": [(2, 4, 4), (1, 4, 2), (2, 2, 1), (1, 1, 1)],
    "lists": ["shared", "per head", "per batch and head"],
    "pooled": [False, True],
    "scale": [None, 0.4, -0.3],
    "head_scale": [False, True],
    "decay": [None, 16, 7],
    "keys": [None, "length", "mask", "none in a batch", "both"],
    "order": [False, True],
    "lse": [True, False],
}


def grid(count: int) -> list[dict]:
    """Calls of the grid: along every axis its values in turn, each axis in a random order of its own."""
    draw = random.Random(0)
    columns = {}
    for name, values in AXES.items():
        turns = values * -(-count // len(values))
        draw.shuffle(turns)
        columns[name] = turns[:count]
    return [{name: columns[name][i] for name in AXES} for i in range(count)]


def of_grid(case: dict) -> tuple[tuple[Tensor, Tensor, Tensor], TileLists, dict]:
    """Tensors, lists and features of a call of the grid."""
    (batch, heads, key_heads), (num_q, num_k) = case["heads"], case["tokens"]
    if case["order"]:
        num_k = num_q = max(num_q, num_k)  # an order is that of self-attention
    q, k, v = qkv(batch, heads, key_heads, num_q, num_k, case["dim"], case["dtype"])
    groups = {"shared": 1, "per head": heads, "per batch and head": batch * heads}[case["lists"]]
    features: dict = {} if case["scale"] is None else dict(scale=case["scale"])
    if case["head_scale"]:
        features |= dict(head_scale=torch.rand(batch, heads) + 0.5)
    if case["decay"]:
        table = torch.tensor([1.0, 0.9, 0.6])
        features |= dict(decay=(table, *(frames(n, case["decay"], min(3, n - 1)) for n in (num_q, num_k))))
    if case["keys"] in ("length", "both"):
        features |= dict(key_length=torch.randint(1, num_k + 1, (batch,)))
    if case["keys"] in ("mask", "none in a batch", "both"):
        valid = torch.rand(batch, num_k) > 0.3
        valid[0] &= case["keys"] != "none in a batch"
        features |= dict(key_mask=valid)
    if case["order"]:
        features |= dict(token_order=torch.randperm(num_q))
    return (q, k, v), random_lists(groups, num_q, num_k, *case["blocks"], pooled=case["pooled"]), features


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "case", grid(20), ids=lambda case: "-".join(str(x).removeprefix("torch.") for x in case.values())
)
def test_everything_together(case):
    """Every value of every axis: dtype, D, ragged lengths, tiles, grouped heads, lists, scales, decay, masks, order."""
    tensors, tiles, features = of_grid(case)
    found = check(make(*tensors, tiles, **features), with_lse=case["lse"])
    assert all(x.isfinite().all() for x in found)
    if case["keys"] == "none in a batch":
        assert not any(x[0].any() for x in found)


@pytest.mark.sample(4)
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("case", grid(20)[:10], ids=range(10))
def test_forward_and_backward_are_the_gradient_of_the_specification(case, bits):
    """Both kernels through autograd against autograd through the float64 specification."""
    dtype = torch.bfloat16 if case["dtype"] == torch.float32 else case["dtype"]
    dtype = torch.float32 if bits == 32 else dtype
    tensors, tiles, features = of_grid({**case, "dtype": dtype})
    problem = make(*tensors, tiles, **features)
    grad_out = torch.randn(problem.q.shape).to(dtype)
    grad_lse = torch.randn(problem.q.shape[:3]) if case["lse"] else None
    _, truth = specified(widened(problem), grad_out.to(WIDE), None if grad_lse is None else grad_lse.to(WIDE))
    _, yardstick = specified(problem, grad_out, grad_lse)
    arguments: dict = dict(layout="bhsd", return_lse=True, backend="triton", scale=problem.scale)
    arguments |= {name: features.get(name) for name in ("head_scale", "key_length", "key_mask", "token_order")}
    if problem.decay is not None:
        table, q_frames, k_frames = problem.decay
        arguments |= dict(frame_decay=FrameDecay(table=table, q_frames=q_frames, k_frames=k_frames))
    leaves = [x.clone().requires_grad_() for x in tensors]
    out, lse = block_sparse_attention(*leaves, tiles, **arguments)
    loss = (out * grad_out).sum()
    if grad_lse is not None:
        loss = loss + (lse.masked_fill(lse.isinf(), 0.0) * grad_lse).sum()
    q, k, _ = tensors
    logits = float(q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max()) * problem.scale  # at most
    for found, a, b in zip(torch.autograd.grad(loss, leaves), yardstick, truth, strict=True):
        assert_within_rounding(found, a, b, dtype, max(1.0, logits) if bits == 32 else 1.0)


def chosen_bits(*shape: int, share: float = 0.6) -> Tensor:
    """Random tiles as bits."""
    return pack_bits(torch.rand(*shape) < share)


SELECTIONS = {
    "skipped rest": lambda bits: dict(keep=bits),
    "pooled rest": lambda bits: dict(keep=bits, rest="pooled"),
    "routed": lambda bits: dict(routed=bits),
    "routed, skipped rest": lambda bits: dict(routed=bits, keep=bits | chosen_bits(2, 4, 6, 5)),
    "routed, pooled rest": lambda bits: dict(routed=bits, keep=bits | chosen_bits(2, 4, 6, 5), rest="pooled"),
    "reverse": lambda bits: dict(reverse=True),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", SELECTIONS)
@pytest.mark.parametrize(("dtype", "features"), [(torch.float32, 0), (torch.bfloat16, 7), (torch.float32, 11)])
def test_selections(kind, dtype, features):
    """Tiles that keep bits and routing left exact, made pooled and dropped, with lists of every sharing."""
    groups = {0: 1, 7: 4, 11: 8}[features]
    q, k, v = qkv(2, 4, 2, 93, 77, 24, dtype)
    selection = Selection(**SELECTIONS[kind](chosen_bits(2, 4, 6, 5)), pinned=chosen_bits(6, 5, share=0.1))
    arguments: dict = dict(selection=selection)
    if features & 1:
        arguments |= dict(key_length=torch.tensor([77, 41]), key_mask=torch.rand(2, 77) > 0.2)
    if features & 2:
        arguments |= dict(decay=(torch.tensor([1.0, 0.9, 0.6]), frames(93, 20, 5), frames(77, 16)))
    if features & 4:
        arguments |= dict(head_scale=torch.rand(2, 4) + 0.5)
    check(make(q, k, v, random_lists(groups, 93, 77, 16, 16, pooled=features != 7), **arguments))


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
    selection = Selection(keep=chosen_bits(1, 2, 5, 5, share=0.8), routing=Routing(beta=0.0), vote=Vote())
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


@pytest.mark.parametrize("each", [16, 32, 20])
def test_decay_of_whole_and_of_mixed_tiles(each):
    """Tiles inside one frame have one decay; at 20 tokens a frame some are mixed."""
    q, k, v = qkv(1, 2, 1, 96, 96, 16, torch.float32)
    decay = (torch.tensor([1.0, 1.0, 0.7, 0.4]), frames(96, each), frames(96, each))
    problem = make(q, k, v, random_lists(1, 96, 96, 16, 16), decay=decay, head_scale=torch.tensor([[1.5, 0.7]]))
    check(problem)
    plan = column_plan(problem, whole_chunks=True)
    assert plan.entry_t is not None
    assert bool((plan.bounds[..., 1] < plan.bounds[..., 2]).any()) == (each == 20)


def test_negative_scales_decay_as_the_specification_says():
    q, k, v = qkv(1, 2, 2, 64, 64, 16, torch.float32)
    decay = (torch.tensor([1.0, 0.5]), frames(64, 16), frames(64, 16))
    check(make(q, k, v, random_lists(1, 64, 64, 16, 16), decay=decay, scale=-0.4))


@pytest.mark.parametrize("value", [0, 1, 2])
@pytest.mark.parametrize("num_k", [1, 20, 32])
def test_one_tile(value, num_k):
    q, k, v = qkv(1, 2, 2, 30, num_k, 32, torch.bfloat16)
    states = torch.tensor([[value]], dtype=torch.uint8)
    tiles = TileLists.from_states(states, block_q=32, block_k=32, num_q=30, num_k=num_k)
    found = check(make(q, k, v, tiles))
    assert value or not any(x.any() for x in found)


@pytest.mark.slow
def test_more_than_a_word_of_pooled_tiles():
    q, k, v = qkv(1, 2, 1, 64, 16 * 40 - 3, 8, torch.float32)
    check(make(q, k, v, random_lists(2, 64, 16 * 40 - 3, 32, 16)))


def test_without_gradient_of_the_lse():
    q, k, v = qkv(1, 2, 2, 64, 64, 16, torch.bfloat16)
    check(make(q, k, v, random_lists(1, 64, 64, 16, 16)), with_lse=False)


def test_large_logits_give_no_nan():
    """Logits of thousands: garbage in masked keys would overflow the exponential."""
    q, k, v = qkv(1, 1, 1, 40, 40, 16, torch.float32)
    q, k = q * 300, k - 2 * q
    problem = make(q, k, v, random_lists(1, 40, 40, 16, 16), key_mask=torch.rand(1, 40) > 0.3)
    check(problem, logits=float((q @ k.mT).abs().max()) / 4)


@pytest.mark.parametrize("pooled", [False, True])
def test_an_inexact_lse_has_no_part_in_float32(pooled):
    """A tenth more or less in every row: the weights are divided by their own sum."""
    q, k, v = qkv(1, 2, 1, 60, 60, 16, torch.float32)
    problem = make(q, k, v, random_lists(1, 60, 60, 16, 16, pooled=pooled))
    grad_out = torch.randn_like(q)
    (out, lse), yardstick = specified(problem, grad_out, None)
    _, truth = specified(widened(problem), grad_out.to(WIDE), None)
    moved = lse + torch.rand_like(lse) / 5 - 0.1
    for x, a, b in zip(
        triton_backward.attend_backward(problem, out, moved, grad_out, None), yardstick, truth, strict=True
    ):
        assert_within_rounding(x, a, b, torch.float32)


@pytest.mark.slow
def test_same_bits_every_time():
    q, k, v = qkv(1, 4, 2, 80, 80, 16, torch.bfloat16)
    problem = make(q, k, v, random_lists(1, 80, 80, 16, 16))
    (out, lse), _ = specified(problem, torch.ones_like(q), None)
    first, second = (triton_backward.attend_backward(problem, out, lse, torch.ones_like(q), None) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("tensor", ["q", "k", "v"])
def test_finite_differences(tensor):
    """Central differences of the float64 specification along random directions."""
    q, k, v = qkv(1, 2, 1, 40, 40, 8, torch.float32)
    decay = (torch.tensor([1.0, 0.5]), frames(40, 16), frames(40, 16))
    problem = make(q, k, v, random_lists(1, 40, 40, 16, 16), decay=decay)
    grad_out = torch.randn(q.shape)
    (out, lse), _ = specified(problem, grad_out, None)
    found = dict(zip("qkv", triton_backward.attend_backward(problem, out, lse, grad_out, None), strict=True))[tensor]
    wide = widened(problem)
    point = getattr(wide, tensor)
    direction = torch.randn(point.shape, dtype=WIDE)
    step = 1e-5

    def loss(shift: float) -> Tensor:
        moved = replace(wide, **{tensor: point + shift * direction})
        return (reference.attend(moved)[0] * grad_out.to(WIDE)).sum()

    slope = (loss(step) - loss(-step)) / (2 * step)
    size = (found.to(WIDE).abs() * direction.abs()).sum()
    assert (found.to(WIDE) * direction).sum() - slope <= size * torch.finfo(torch.float32).eps * 8


def test_lists_are_transposed():
    tiles = random_lists(3, 100, 80, 16, 16)
    q, k, v = qkv(1, 3, 3, 100, 80, 8, torch.float32)
    plan = column_plan(make(q, k, v, tiles), whole_chunks=True)
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
    problem = make(q, k, v, random_lists(1, 64, 64, 16, 16))
    assert column_plan(problem, whole_chunks=True) is column_plan(replace(problem, q=q + 1), whole_chunks=True)
    assert column_plan(problem, whole_chunks=True) is not column_plan(problem, whole_chunks=False)


def test_entries_of_an_owner_keep_their_order_within_a_section():
    order, edges = grouped(torch.tensor([2, 0, 2, 2]), torch.tensor([True, False, False, False]), 3, 2)
    assert order.tolist() == [1, 2, 3, 0]
    assert edges.tolist() == [0, 1, 1, 1, 1, 3, 4]


def test_wide_dtypes_are_refused():
    q, k, v = qkv(1, 1, 1, 16, 16, 8, WIDE)
    problem = make(q, k, v, TileLists.full(16, 16, block_q=16, block_k=16))
    with pytest.raises(BackendUnavailableError, match=r"'triton'.*bfloat16, float16.*float32 \(found torch.float64\)"):
        triton_backward.attend_backward(problem, q, q[..., 0].float(), q, None)


def test_one_row_of_head_scales_serves_the_whole_batch():
    q, k, v = (torch.randn(3, 2, 32, 16) for _ in range(3))
    check(make(q, k, v, random_lists(1, 32, 32, 16, 16), head_scale=torch.tensor([[0.5, 1.5]])))


def test_kernels_take_a_power_of_two_of_warps_whose_number_is_written_in_their_files():
    files = [
        importlib.import_module(f"dit_accel_kernels.backends.triton.{name}")
        for name in ("expand", "pool", "route", "votes")
    ]
    assert {file.NUM_WARPS for file in files} <= {1, 2, 4, 8}
