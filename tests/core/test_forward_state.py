"""The state of a running forward: what a forward inside it leaves whole, and how short the way to the kernels is."""

from types import SimpleNamespace

import call_path
import pytest
import torch
from one_layer import OneLayer
from torch import nn
from wan_tiny import tiny_transformer

import dit_accel
from dit_accel import ConfigError, RadialAttention, UltraViCo
from dit_accel.attachment.forward_state import ForwardState
from dit_accel.attachment.layers import AttentionLayer
from dit_accel.attachment.shards import Ring


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
    until, whole = call_path.traced_call()
    ours = sum(count for where, count in until.items() if not where.startswith("methods/"))
    assert ours <= 21, until  # besides what the method itself calls to make its plan
    assert whole.total() <= 30, whole
    assert len({where.split(":")[0] for where in whole}) <= 7, whole


def test_a_transformer_that_is_compiled_whole_is_noticed_to_have_another_shape():
    """Nobody sees its forwards begin: the first attention call that is planned does."""
    transformer = tiny_transformer(num_layers=1)
    compiled = torch.compile(transformer, backend="eager", dynamic=False)

    def run(frames, step):
        with transformer.cache_context("cond", step_index=step, num_inference_steps=9, sigma=1 - step / 9):
            compiled(torch.randn(1, 12, frames, 8, 8), torch.tensor([500]), torch.zeros(1, 6, 64))

    with dit_accel.attach(transformer, RadialAttention(block_size=16, dense_steps=0, dense_layers=0)), torch.no_grad():
        run(5, 0)
        with pytest.raises(ConfigError, match=r"radial.*2 latent frames, got 1"):
            run(1, 1)


@pytest.mark.parametrize("frames", [(3, 8, 8, 3), (8, 3, 3, 8)], ids=["grows", "shrinks"])
def test_a_transformer_that_is_compiled_whole_follows_a_clip_whose_length_changes_within_a_run(frames):
    """As a pipeline of stages has it; UltraViCo acts on the clips alone that are longer than the trained ones."""
    found = []
    for compiled in (False, True):
        transformer = tiny_transformer(num_layers=1)
        called = torch.compile(transformer, backend="eager", dynamic=False) if compiled else transformer
        method = UltraViCo(trained_frames=3, alpha=0.5)
        with dit_accel.attach(transformer, method, backend="torch") as attachment, torch.no_grad():
            for step, length in enumerate(frames):
                draw = torch.Generator().manual_seed(step)
                latents, text = (torch.randn(size, generator=draw) for size in ((1, 12, length, 8, 8), (1, 6, 64)))
                with transformer.cache_context("cond", step_index=step, num_inference_steps=4, sigma=1 - step / 4):
                    found.append(called(latents, torch.tensor([500 - step]), text)[0])
        if not compiled:
            assert sum(step.sparse_layers for step in attachment.report().steps) == 2
    assert all(torch.equal(one, two) for one, two in zip(found[:4], found[4:], strict=True))
