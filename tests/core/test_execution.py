"""Running plans: where queries stand, the user's own attention, plans for backwards, a running forward's state."""

import gc
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import call_path
import pytest
import torch
import torch.nn.functional as F
from dit_accel_kernels import EXACT, SKIPPED, TileLists
from one_layer import Fixed, OneLayer
from torch import nn
from wan_tiny import tiny_transformer

import dit_accel
from dit_accel import LVSA, AttachError, ConfigError, LiteAttention, RadialAttention, UltraViCo
from dit_accel.attachment import kernel_call
from dit_accel.attachment.forward_state import ForwardState
from dit_accel.attachment.layers import AttentionLayer
from dit_accel.attachment.shards import Ring
from dit_accel.plan.call import call_of
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan

LAYOUT = TokenLayout(frames=3, height=4, width=5, text_before=7, text_after=4)
TOKENS = LAYOUT.tokens
CLIP = TokenLayout(frames=8, height=4, width=4)
RADIAL = RadialAttention(block_size=16, decay_factor=0.2, dense_steps=0, dense_layers=0)


def tensors(tokens=TOKENS):
    noise = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, tokens, 8, dtype=torch.float64, generator=noise) for _ in range(3)]


def own_tile(tokens=TOKENS):
    """A plan in which each token sees its own tile of 16 and no other: where a query stands decides what it gets."""
    states = torch.where(torch.eye(-(-tokens // 16), dtype=torch.bool), EXACT, SKIPPED).to(torch.uint8)
    return AttentionPlan(tiles=TileLists.from_states(states, block_q=16, block_k=16, num_q=tokens, num_k=tokens))


def called(layer, q, k, v, **options):
    """The output of a call, [B, H, S, D], however the layer's tensors lie."""
    held = (lambda x: x.transpose(1, 2)) if layer.tokens_first else (lambda x: x)
    return held(layer.call(held(q), held(k), held(v), LAYOUT, **options))


def require_gradients_of(out, expected, inputs):
    grads = (torch.autograd.grad(x.square().sum(), inputs) for x in (out, expected))
    for grad, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize(("first", "last"), [(7, 67), (40, TOKENS)], ids=["image", "behind cached keys"])
def test_queries_of_a_part_of_the_tokens_stand_where_they_belong(first, last, tokens_first):
    q, k, v = tensors()
    layer = OneLayer(Fixed(own_tile()), tokens_first=tokens_first)
    tile = torch.arange(TOKENS) // 16
    whole = F.scaled_dot_product_attention(q, k, v, tile[:, None] == tile)
    torch.testing.assert_close(called(layer, q, k, v), whole)
    q, k, v = (x.requires_grad_() for x in (q[:, :, first:last].clone(), k, v))
    out, seen = called(layer, q, k, v), F.scaled_dot_product_attention(q, k, v, tile[first:last, None] == tile)
    torch.testing.assert_close(out, whole[:, :, first:last])
    require_gradients_of(out, seen, (q, k, v))


@pytest.mark.parametrize("tokens_first", [False, True])
def test_a_plan_without_tiles_is_the_users_own_attention_scaled_and_mixed_as_in_our_kernels(tokens_first):
    q, k, v = (x.requires_grad_() for x in tensors())
    scale, mix = torch.tensor([0.5, 2.0]), torch.tensor([[0.25, 1.0], [0.0, 0.5]], dtype=torch.float64)
    rows = torch.arange(TOKENS) % 3 == 0
    plan = AttentionPlan().scale(scale).mix(mix, rows)
    layer = OneLayer(Fixed(plan), tokens_first=tokens_first)
    out, weight = called(layer, q, k, v), mix[:, :, None, None] * rows[:, None]
    expected = (1 - weight) * F.scaled_dot_product_attention(q * scale[:, None, None], k, v) + weight * v
    torch.testing.assert_close(out, expected)
    assert layer.attended == 1
    assert not layer.engine.recorder.backends
    require_gradients_of(out, expected, (q, k, v))
    tiled = OneLayer(Fixed(plan.with_tiles(TileLists.full(TOKENS, TOKENS, block_q=16, block_k=16))))
    torch.testing.assert_close(called(tiled, q, k, v), expected)
    assert (tiled.attended, tiled.engine.recorder.backends) == (0, {"reference"})


def test_rows_that_are_attended_one_by_one_are_one_forward_s_until_they_come_again():
    layer, seen, (q, k, v) = OneLayer(Fixed(own_tile())), [], tensors()
    layer.observe(lambda call: seen.append((call.context.row, call.context.repeated)))
    layer.engine.begin_forward(layer.denoising.context(layer.state), None, 2)
    assert (layer.engine.acts(layer.layer, LAYOUT.grid, 1), layer.state.layouts) == (True, {"call 0": (LAYOUT, 2)})
    for row in (slice(0, 1), slice(1, 2), slice(0, 1)):
        layer.engine.attend(layer.layer, call_of(q[row], k[row], v[row], None, None, "reference", False), LAYOUT.grid)
    layer.engine.end_forward(ran=False)
    assert (seen, layer.engine.recorder.forwards_run) == ([(0, False), (1, False), (0, True)], 0)


def test_any_mask_goes_with_a_plan_that_needs_no_kernel():
    q, k, v = tensors()
    mask = (torch.rand(TOKENS, TOKENS) < 0.5) | torch.eye(TOKENS, dtype=torch.bool)
    out = called(OneLayer(Fixed(AttentionPlan().scale(torch.tensor([2.0, 2.0])))), q, k, v, mask=mask[None, None])
    torch.testing.assert_close(out, F.scaled_dot_product_attention(2 * q, k, v, mask))


def test_plans_live_as_long_as_a_backward_may_come():
    layer = OneLayer(Fixed(own_tile()))
    store, call = layer.engine.backward, partial(called, layer)
    q, k, v = (x.requires_grad_() for x in tensors())
    one, two = call(q, k, v), call(q, k, v, step=1)
    assert len(store) == 2
    del one
    gc.collect()
    assert len(store) == 1
    two.sum().backward()
    del two
    with torch.no_grad():
        call(q, k, v)
    assert len(store) == 0
    alive = [call(q, k, v) for _ in range(20)]  # no capacity: none is dropped while its output lives
    assert len(store) == 20
    alive[0].sum().backward()
    with pytest.raises(AttachError, match=r"plan 9999.*backward"):
        store.get(torch.tensor(9999))


@pytest.mark.parametrize("tokens_first", [False, True])
def test_observers_see_a_processs_own_rows_of_a_call_under_ring_attention(tokens_first):
    q, k, v = tensors()
    layer, seen = OneLayer(Fixed(own_tile()), tokens_first=tokens_first), []
    layer.observe(seen.append)
    whole, own = called(layer, q, k, v), torch.arange(1, TOKENS, 2)
    layer.engine.forward.shards = Ring(group=None, rank=1, counts=(36, 35), gathered=None, positions=None, rows=own)
    out = called(layer, q[:, :, own], k, v)
    torch.testing.assert_close(out, whole[:, :, own])
    assert seen[0].rows is None
    assert seen[1].rows is own
    for found, expected in ((seen[1].out, out), (seen[1].call.q, q[:, :, own]), (seen[1].call.k, k)):
        assert torch.equal(found, expected)
    assert seen[1].plan.tiles is not None
    assert seen[1].planned is None  # no method corrects what was planned
    assert seen[1].context.key == seen[0].context.key
    with pytest.raises(ConfigError, match=r"ring attention.*ulysses_degree"):
        called(layer, q[:, :, own].requires_grad_(), k, v)


def test_a_backend_without_a_gradient_for_operators_is_named():
    class Old(torch.autograd.Function):
        forward = staticmethod(lambda ctx, q, k, v: q + k + v)
        backward = staticmethod(lambda ctx, grad: (grad, grad, grad))

    layer = OneLayer(Fixed(AttentionPlan().scale(torch.ones(2))))
    layer.layer.dense = lambda q, k, v, mask, scale: Old.apply(q, k, v)
    out = called(layer, *(x.requires_grad_() for x in tensors()))
    with pytest.raises(ConfigError, match=r"backend.*transformer.*no gradient"):
        out.sum().backward()


@pytest.fixture
def slow(monkeypatch):
    """A processor on which sparse attention is slower than dense at every density from .3 on."""
    monkeypatch.setattr(kernel_call, "speed_over_dense", lambda q, k, v, tiles, **_: 0.3 / tiles.density)


def in_clip(*methods, backend="auto", gradient=False):
    """One call in a clip, run by methods: the module, the call's tensors and its output."""
    q, k, v = (x.float().requires_grad_(gradient) for x in tensors(CLIP.tokens))
    layer = OneLayer(*methods, backend=backend)
    return layer, (q, k, v), layer.call(q, k, v, CLIP)


def test_lists_that_save_no_time_are_left_to_the_users_own_attention(slow):
    for radial in (RADIAL, replace(RADIAL, rest="pooled")):
        layer, (q, k, v), out = in_clip(radial)
        assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))
        recorder, density = layer.engine.recorder, radial.filled().tiles(CLIP).density
        assert (layer.attended, recorder.reduced, recorder.spell_backend("auto")) == (1, 0, "auto (dense)")
        assert f"{density:.1%}" in recorder.notes[-1]
        assert f"{density / 0.3:.2f}" in recorder.notes[-1]
        assert (layer.reports()[0].density, layer.reports()[0].stayed) == (1, {"backend": 1})


def test_lists_run_where_a_backend_is_named_or_they_mean_more_or_a_backward_may_follow_or_time_is_saved(
    slow, monkeypatch
):
    lite = LiteAttention(block_size=16, dense_steps=0, dense_layers=0)
    lvsa = LVSA(block_size=16, trained_frames=3, window=1, dense_steps=0, dense_layers=0)
    more = ((lvsa,), (RADIAL, UltraViCo(trained_frames=2)), (RADIAL, lite), (Fixed(own_tile(CLIP.tokens)),))
    layers = [in_clip(*methods)[0] for methods in more]
    layers += [in_clip(RADIAL, backend="torch")[0], in_clip(RADIAL, gradient=True)[0]]
    for speed in (1.1, None):
        monkeypatch.setattr(kernel_call, "speed_over_dense", lambda *_, speed=speed, **__: speed)
        layers.append(in_clip(RADIAL)[0])
    assert all((layer.attended, layer.engine.recorder.backends) == (0, {"torch"}) for layer in layers)


# What a forward inside another leaves whole, and how short the way to the kernels is.


def test_a_forward_inside_another_leaves_all_of_its_state_as_it_was():
    state, layers = ForwardState(), [AttentionLayer(OneLayer().state, nn.Module(), index, index) for index in range(2)]
    for layer in layers:
        layer.processor = SimpleNamespace(_dit_accel_sparse=False)
    shards = Ring(group=None, rank=0, counts=(4, 4), gathered=None, positions=None, rows=torch.arange(4))
    state.lay((2, 2, 2, 0, 0))
    state.begin(3)
    state.min_keys, state.shards, state.noted, state.step = 8, shards, state.sizes, object()
    state.acting = {layers[0]: ("a method",), layers[1]: ()}
    state.calls[layers[0]] += 1
    state.reached.add(0)
    state.switch()
    before = {**vars(state), "calls": dict(state.calls), "reached": set(state.reached), "acting": dict(state.acting)}
    with state.nested():
        assert state.step is None
        assert not state.acting
        state.calls[layers[0]] += 1
        state.reached.add(1)
        state.lay((1, 3, 3, 2, 0))
        state.begin(1)
        state.shards, state.not_a_step, state.min_keys, state.processor = None, True, 11, layers[1].processor
        state.acting = {layers[0]: (), layers[1]: ("a method",)}
        state.switch()
        assert [layer.processor._dit_accel_sparse for layer in layers] == [False, True]
    assert vars(state) == before
    assert [layer.processor._dit_accel_sparse for layer in layers] == [True, False]
    assert [int(size) for size in state.grid] == [2, 2, 2, 0, 0]
    assert state.layout.tokens == 8


def test_who_acts_is_asked_once_a_layer_and_forward(monkeypatch):
    transformer, asked = tiny_transformer(), []
    with dit_accel.attach(transformer, call_path.RADIAL, backend="torch") as attachment:
        (handler,) = attachment.engine.handlers
        is_active = handler.is_active
        monkeypatch.setattr(handler, "is_active", lambda step, depth: asked.append(depth) or is_active(step, depth))
        call_path.forward_of(transformer)  # of a shape that is not known when its context begins
        asked.clear()
        call_path.forward_of(transformer)
    assert asked == [0, 1, 2]


def test_the_way_from_the_processor_to_the_kernels_stays_short():
    _, whole = call_path.traced_call()
    assert whole.total() <= 30, whole
    assert len({where.split(":")[0] for where in whole}) <= 7, whole


@pytest.mark.slow
def test_a_transformer_that_is_compiled_whole_follows_a_clip_whose_length_changes_within_a_run():
    """As a pipeline of stages has it; UltraViCo acts on the clips alone that are longer than the trained ones.

    Nobody sees its forwards begin: the first attention call that is planned notices another shape.
    """
    outputs = []
    for compiled in (False, True):
        transformer = tiny_transformer(num_layers=1)
        called = torch.compile(transformer, backend="eager", dynamic=False) if compiled else transformer
        method = UltraViCo(trained_frames=3, alpha=0.5)
        with dit_accel.attach(transformer, method, backend="torch") as attachment, torch.no_grad():
            for step, length in enumerate((3, 8, 3)):
                draw = torch.Generator().manual_seed(step)
                latents, text = (torch.randn(size, generator=draw) for size in ((1, 12, length, 8, 8), (1, 6, 64)))
                with transformer.cache_context("cond", step_index=step, num_inference_steps=3, sigma=1 - step / 3):
                    outputs.append(called(latents, torch.tensor([500 - step]), text)[0])
            steps = attachment.report().steps
        assert compiled or sum(step.sparse_layers for step in steps) == 1
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(outputs[:3], outputs[3:], strict=True))
