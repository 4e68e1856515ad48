"""Running plans: queries of a part of the tokens, the user's own attention and its gradients, plans for backwards."""

import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from dit_accel_kernels import EXACT, SKIPPED, TileLists, torch_way
from dit_accel_kernels.backends import cpu
from one_layer import Fixed, OneLayer

from dit_accel import LVSA, AttachError, ConfigError, LiteAttention, RadialAttention, UltraViCo
from dit_accel.attachment.backward import BackwardStore, Differentiated
from dit_accel.attachment.shards import Ring
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan

LAYOUT = TokenLayout(frames=3, height=4, width=5, text_before=7, text_after=4)
TOKENS = LAYOUT.tokens


def tensors(tokens=TOKENS, heads=2, seed=0):
    noise = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, tokens, 8, dtype=torch.float64, generator=noise) for _ in range(3)]


def own_tile():
    """A plan in which each token sees its own tile of 16 and no other: where a query stands decides what it gets."""
    count = -(-TOKENS // 16)
    states = torch.where(torch.eye(count, dtype=torch.bool), EXACT, SKIPPED).to(torch.uint8)
    return AttentionPlan(
        tiles=TileLists.from_states(states, block_q=16, block_k=16, num_q=TOKENS, num_k=TOKENS), token_order=None
    )


@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize(("first", "last"), [(7, 67), (40, TOKENS)], ids=["image", "behind cached keys"])
def test_queries_of_a_part_of_the_tokens_stand_where_they_belong(first, last, tokens_first):
    q, k, v = tensors()
    layer = OneLayer(Fixed(own_tile()), tokens_first=tokens_first)
    held = (lambda x: x.transpose(1, 2)) if tokens_first else (lambda x: x)
    whole = held(layer.call(*map(held, (q, k, v)), LAYOUT))
    row, column = (torch.arange(TOKENS) // 16 for _ in range(2))
    seen = F.scaled_dot_product_attention(q, k, v, row[:, None] == column)
    torch.testing.assert_close(whole, seen)
    part = held(layer.call(held(q[:, :, first:last]), held(k), held(v), LAYOUT))
    torch.testing.assert_close(part, whole[:, :, first:last])
    q, k, v = (x.requires_grad_() for x in (q[:, :, first:last].clone(), k, v))
    out = held(layer.call(held(q), held(k), held(v), LAYOUT))
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    seen = F.scaled_dot_product_attention(q, k, v, row[first:last, None] == column)
    for grad, expected in zip(grads, torch.autograd.grad(seen.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("tokens_first", [False, True])
def test_a_plan_without_tiles_is_the_users_own_attention_scaled_and_mixed(tokens_first):
    q, k, v = (x.requires_grad_() for x in tensors())
    scale, mix = torch.tensor([0.5, 2.0]), torch.tensor([[0.25, 1.0], [0.0, 0.5]], dtype=torch.float64)
    rows = torch.arange(TOKENS) % 3 == 0
    plan = AttentionPlan().scale(scale).mix(mix, rows)
    assert not plan.needs_kernel
    layer = OneLayer(Fixed(plan), tokens_first=tokens_first)
    held = (lambda x: x.transpose(1, 2)) if tokens_first else (lambda x: x)
    out = held(layer.call(*map(held, (q, k, v)), LAYOUT))
    attended = F.scaled_dot_product_attention(q * scale[:, None, None], k, v)
    weight = mix[:, :, None, None] * rows[:, None]
    expected = (1 - weight) * attended + weight * v
    torch.testing.assert_close(out, expected)
    assert layer.attended == 1
    assert not layer.execution.recorder.backends
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    for grad, wanted in zip(grads, torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(grad, wanted)


def test_any_mask_goes_with_a_plan_that_needs_no_kernel():
    q, k, v = tensors()
    mask = torch.rand(TOKENS, TOKENS) < 0.5
    mask |= torch.eye(TOKENS, dtype=torch.bool)
    layer = OneLayer(Fixed(AttentionPlan().scale(torch.tensor([2.0, 2.0]))))
    out = layer.call(q, k, v, LAYOUT, mask=mask[None, None])
    torch.testing.assert_close(out, F.scaled_dot_product_attention(2 * q, k, v, mask))


def test_scale_and_mix_are_the_same_inside_our_kernels():
    q, k, v = tensors()
    plan = AttentionPlan().scale(torch.tensor([0.5, 2.0])).mix(torch.tensor([0.25, 1.0]), torch.arange(TOKENS) < 30)
    full = TileLists.full(TOKENS, TOKENS, block_q=16, block_k=16)
    dense = OneLayer(Fixed(plan)).call(q, k, v, LAYOUT)
    torch.testing.assert_close(OneLayer(Fixed(plan.with_tiles(full))).call(q, k, v, LAYOUT), dense)


def test_plans_live_as_long_as_a_backward_may_come():
    layer = OneLayer(Fixed(own_tile()))
    store = layer.execution.backward
    call = partial(layer.call, layout=LAYOUT)
    q, k, v = (x.requires_grad_() for x in tensors())
    one, two = call(q, k, v), call(q, k, v, step=1)
    assert len(store) == 2
    del one
    gc.collect()
    assert len(store) == 1
    two.sum().backward()
    del two
    assert len(store) == 0
    with torch.no_grad():
        call(q, k, v)
    assert len(store) == 0
    kept = [call(q, k, v) for _ in range(200)]  # no capacity: none is dropped while its output lives
    assert len(store) == 200
    kept[0].sum().backward()


@pytest.mark.parametrize("tokens_first", [False, True])
def test_observers_see_a_processs_own_rows_of_a_call_under_ring_attention(tokens_first):
    q, k, v = tensors()
    held = (lambda x: x.transpose(1, 2)) if tokens_first else (lambda x: x)
    layer, seen = OneLayer(Fixed(own_tile()), tokens_first=tokens_first), []
    layer.observe(seen.append)
    whole = layer.call(*map(held, (q, k, v)), LAYOUT)
    own = torch.arange(1, TOKENS, 2)
    layer.execution.forward.shards = Ring(group=None, rank=1, counts=(36, 35), gathered=None, positions=None, rows=own)
    out = layer.call(held(q[:, :, own]), held(k), held(v), LAYOUT)
    torch.testing.assert_close(held(out), held(whole)[:, :, own])
    assert seen[0].rows is None
    assert seen[1].rows is own
    assert torch.equal(seen[1].out, held(out))
    assert torch.equal(seen[1].call.q, q[:, :, own])
    assert torch.equal(seen[1].call.k, k)
    assert seen[1].plan.tiles is not None
    assert seen[1].context.key == seen[0].context.key


def test_a_plan_that_is_gone_is_an_error():
    store = BackwardStore()
    kept = Differentiated(AttentionPlan(), 0, (1, 1, 1, 0, 0), True, None)
    ticket = store.put(kept)
    assert store.get(ticket) is kept
    with pytest.raises(AttachError, match=r"plan 7.*backward"):
        store.get(torch.tensor(7))


def test_a_backend_without_a_gradient_for_operators_is_named():
    class Old(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            return q + k + v

        @staticmethod
        def backward(ctx, grad):
            return grad, grad, grad

    layer = OneLayer(Fixed(AttentionPlan().scale(torch.ones(2))))
    layer.state.layers[0].dense = lambda q, k, v, mask, scale: Old.apply(q, k, v)
    q, k, v = (x.requires_grad_() for x in tensors())
    out = layer.call(q, k, v, LAYOUT)
    with pytest.raises(ConfigError, match=r"backend.*transformer.*no gradient"):
        out.sum().backward()


CLIP = TokenLayout(frames=8, height=4, width=4)
RADIAL = RadialAttention(block_size=16, decay_factor=0.2, dense_steps=0, dense_layers=0)


@pytest.fixture
def slow(monkeypatch):
    """A processor on which sparse attention is slower than dense at every density from .3 on."""
    monkeypatch.setattr(cpu, "_serving", lambda *key: {"torch": ((0.1, 0.3),)})


def called(*methods, backend="auto", dtype=torch.float32, gradient=False):
    """One call in a clip, run by methods: the module, the call's tensors and its output."""
    q, k, v = (x.to(dtype).requires_grad_(gradient) for x in tensors(CLIP.tokens))
    layer = OneLayer(*methods, backend=backend)
    return layer, (q, k, v), layer.call(q, k, v, CLIP)


@pytest.mark.parametrize("rest", ["skip", "pooled"])
def test_lists_that_only_save_time_are_left_to_the_users_own_attention_where_they_save_none(slow, rest):
    radial = RadialAttention(block_size=16, decay_factor=0.2, dense_steps=0, dense_layers=0, rest=rest)
    layer, (q, k, v), out = called(radial)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))
    assert layer.attended == 1
    recorder = layer.execution.recorder
    assert recorder.spell_backend("auto") == "auto (dense)"
    density = radial.filled().tiles(CLIP).density
    assert 0.3 < density < 1
    assert recorder.notes[-1] == (
        f"transformer: {density:.1%} of the tiles take {density / 0.3:.2f} times as long as all of them by the model's "
        "own attention on this processor, so calls of so many went there; a named backend would run them"
    )
    assert layer.reports()[0].density == 1
    assert layer.reports()[0].stayed == {"backend": 1}
    assert recorder.reduced == 0


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_named_backend_runs_lists_that_save_no_time(slow, backend):
    layer, qkv, out = called(RADIAL, backend=backend)
    assert layer.attended == 0
    ways = {"torch": f"torch; torch: {torch_way(torch.device('cpu'), torch.float32)}", "reference": "reference"}
    assert layer.execution.recorder.spell_backend(backend) == ways[backend]
    assert not torch.equal(out, F.scaled_dot_product_attention(*qkv))


def test_lists_that_mean_more_than_time_always_run(slow):
    ultravico = UltraViCo(trained_frames=2)
    lite = LiteAttention(block_size=16, dense_steps=0, dense_layers=0)
    lvsa = LVSA(block_size=16, trained_frames=3, window=1, dense_steps=0, dense_layers=0)
    for methods in ((lvsa,), (RADIAL, ultravico), (RADIAL, lite), (RADIAL, lvsa), (Fixed(own_tile_of_clip()),)):
        layer, _, _ = called(*methods)
        assert layer.attended == 0
        assert layer.execution.recorder.backends == {"torch"}


def test_lists_always_run_where_a_backward_may_follow_or_time_is_saved_or_nothing_is_known(slow, monkeypatch):
    layer, qkv, out = called(RADIAL, gradient=True)
    assert (layer.attended, layer.execution.recorder.backends) == (0, {"torch"})
    _, same, expected = called(RADIAL, backend="torch", gradient=True)
    assert torch.equal(out, expected)
    for one, other in zip(*(torch.autograd.grad(x.sum(), y) for x, y in ((out, qkv), (expected, same))), strict=True):
        assert torch.equal(one, other)
    for rows in ({"torch": ((0.1, 1.1),)}, {}):
        monkeypatch.setattr(cpu, "_serving", lambda *key, rows=rows: rows)
        layer, _, _ = called(RADIAL)
        assert (layer.attended, layer.execution.recorder.backends) == (0, {"torch"})


def own_tile_of_clip():
    count = CLIP.tokens // 16
    states = torch.where(torch.eye(count, dtype=torch.bool), EXACT, SKIPPED).to(torch.uint8)
    return AttentionPlan(
        tiles=TileLists.from_states(states, block_q=16, block_k=16, num_q=CLIP.tokens, num_k=CLIP.tokens)
    )
