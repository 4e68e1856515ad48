"""What is derived from lists lives as long as they do, follows every change, and never leaves a captured graph."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

import gc
import weakref

import pytest
import torch
from dit_accel_kernels import (
    FrameDecay,
    TileLists,
    block_sparse_attention,
    block_sparse_attention_eager,
    cache,
    values,
)
from dit_accel_kernels.cache import StorageCache
from dit_accel_kernels.backends.triton.support import interpreted
from kernel_cases import qkv, random_lists
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

TOKENS = 70
BACKENDS = pytest.mark.parametrize("backend", ["triton", "torch"])


class Value:
    """Something that can be watched."""


def call(backend: str, tiles: TileLists, inputs, **arguments) -> torch.Tensor:
    return block_sparse_attention(*inputs, tiles, layout="bhsd", backend=backend, **arguments)


def decay(tokens: int = TOKENS) -> FrameDecay:
    frames = torch.arange(tokens, dtype=torch.int32) // 16
    return FrameDecay(table=torch.tensor([1.0, 0.7, 0.4]), q_frames=frames, k_frames=frames.clone())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@BACKENDS
def test_a_mask_changed_in_place_counts(backend, mode):
    """Tensors made in inference mode count no writes: nothing may be remembered by their address."""
    inputs = qkv(1, 2, 2, TOKENS, TOKENS, 16, torch.float32)
    tiles, last = random_lists(1, TOKENS, TOKENS, 16, 16), torch.arange(TOKENS)[None] < 40
    with mode():
        mask = torch.ones(1, TOKENS, dtype=torch.bool)
        call(backend, tiles, inputs, key_mask=mask)
        mask.copy_(last)
        found = call(backend, tiles, inputs, key_mask=mask)
    assert torch.equal(found, call(backend, tiles, inputs, key_mask=last))


def operations(tiles: TileLists, inputs, **arguments) -> int:
    """How many of torch's operations a call on triton takes."""

    class Counted(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", lambda *_, **__: None)
        for module in (cache, values):  # as on a GPU, where the values of masks and lists aren't read
            patch.setattr(module, "readable", lambda device: False)
        with Counted() as counted:
            block_sparse_attention_eager(*inputs, tiles, layout="bhsd", backend="triton", **arguments)
    return counted.count


@pytest.mark.parametrize("ordered", [False, True])
def test_a_plan_is_made_once_for_the_same_keys(ordered):
    """A further call takes as many operations as one without a mask; a mask that is written to has it made anew."""
    inputs = qkv(2, 2, 2, TOKENS, TOKENS, 16, torch.float32)
    order = dict(token_order=torch.randperm(TOKENS)) if ordered else {}
    for pooled in (False, True):
        tiles = random_lists(1, TOKENS, TOKENS, 16, 16, pooled=pooled)
        operations(tiles, inputs, **order)
        least = operations(tiles, inputs, **order)
        mask, length = torch.rand(2, TOKENS) > 0.3, torch.tensor([TOKENS, 40])
        for keys in (dict(key_mask=mask), dict(key_length=length), dict(key_mask=mask, key_length=length)):
            assert operations(tiles, inputs, **order, **keys) > least + 20
            assert operations(tiles, inputs, **order, **keys) == least
            for x in keys.values():
                x.copy_(x.roll(1, 0))
            assert operations(tiles, inputs, **order, **keys) > least + 20


@pytest.mark.parametrize("features", ["order", "order decay"])
def test_the_specification_compiles_with_what_is_remembered_elsewhere(features):
    """It is plain eager code, which a compiler traces: what it would find in the cache it makes."""
    q, k, v = qkv(1, 2, 2, TOKENS, TOKENS, 16, torch.float32)
    tiles, order, mask = random_lists(1, TOKENS, TOKENS, 16, 16), torch.randperm(TOKENS), torch.rand(1, TOKENS) > 0.3
    options = dict(frame_decay=decay()) if "decay" in features else {}

    def attend(q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return call("reference", tiles, (q, k, v), key_mask=mask, token_order=order, **options)

    assert torch.equal(torch.compile(attend, backend="eager", fullgraph=True)(q, mask), attend(q, mask))


@BACKENDS
def test_an_order_changed_in_place_counts(backend):
    inputs, tiles = qkv(1, 2, 2, TOKENS, TOKENS, 16, torch.float32), random_lists(1, TOKENS, TOKENS, 16, 16)
    with torch.inference_mode():
        order = torch.arange(TOKENS)
        call(backend, tiles, inputs, token_order=order, frame_decay=decay())
        order.copy_(torch.randperm(TOKENS))
        found = call(backend, tiles, inputs, token_order=order, frame_decay=decay())
    assert torch.equal(found, call(backend, tiles, inputs, token_order=order.clone(), frame_decay=decay()))


def test_lists_made_in_inference_mode_are_remembered_and_count_writes():
    with torch.inference_mode():
        tiles, frames = random_lists(1, TOKENS, TOKENS, 16, 16), decay()
    parts = (tiles.exact_offsets, tiles.exact_indices, tiles.pooled_offsets, tiles.pooled_indices)
    assert not any(x.is_inference() for x in (*parts, frames.table, frames.q_frames, frames.k_frames))
    values: StorageCache[object] = StorageCache()
    assert values.get(parts, (), object) is values.get(parts, (), object)


def test_many_lists_in_turn_are_each_made_once():
    values: StorageCache[object] = StorageCache()
    lists = [torch.arange(3) for _ in range(200)]
    first = [values.get([x], (), object) for x in lists]
    assert [values.get([x], (), object) for x in lists] == first
    assert len(set(map(id, first))) == len(lists)


def test_a_value_goes_with_its_tensors_at_once():
    values: StorageCache[Value] = StorageCache()
    tensor, other = torch.arange(5), torch.arange(6)
    watched = weakref.ref(values.get([tensor], (), Value))
    both = weakref.ref(values.get([tensor, other], (), Value))
    alias = tensor[:]
    del tensor
    assert watched() is not None
    assert values.get([alias], (), Value) is watched()
    del other
    values.get([alias], ("more",), Value)  # what needs more than the first tensor goes when that is asked next
    assert both() is None
    del alias
    assert watched() is None


@pytest.mark.parametrize("absent", [False, True])
def test_a_value_is_of_all_its_tensors(absent):
    values: StorageCache[Value] = StorageCache()
    first, second, other = torch.zeros(3), torch.ones(3), torch.ones(3)
    made = values.get([first, second], (), Value)
    assert values.get([first, second], (), Value) is made
    assert values.get([first, None if absent else other], (), Value) is not made


def test_a_write_replaces_a_value():
    values: StorageCache[Value] = StorageCache()
    tensor = torch.arange(5)
    watched = weakref.ref(values.get([tensor], (), Value))
    tensor.add_(1)
    assert values.get([tensor], (), Value) is not watched()
    assert watched() is None
    assert values.get([tensor], (), Value) is not values.get([tensor[1:]], (), Value)


@pytest.mark.slow
def test_nothing_derived_holds_what_it_is_derived_from():
    """It would keep lists alive for good: those of a card are most of what a plan takes."""
    tiles, frames = random_lists(2, TOKENS, TOKENS, 16, 16), decay()
    mask, length = torch.rand(1, TOKENS) > 0.3, torch.tensor([40])
    inputs = [x.requires_grad_() for x in qkv(1, 2, 2, TOKENS, TOKENS, 16, torch.float32)]
    for backend in ("triton", "torch"):
        for options in ({}, {"frame_decay": frames}, {"key_mask": mask}, {"key_mask": mask, "key_length": length}):
            call(backend, tiles, inputs, **options).sum().backward()
    given = (tiles.exact_offsets, tiles.exact_indices, frames.table, frames.q_frames, frames.k_frames, mask, length)
    storages = [weakref.ref(x.untyped_storage()) for x in given]
    assert tiles.exact_offsets.untyped_storage()._derived_dit_accel_kernels
    del tiles, frames, given, options, mask, length
    gc.collect()
    assert [x() for x in storages] == [None] * 7


def test_a_capture_stores_nothing_and_builds_what_may_change(monkeypatch):
    values: StorageCache[object] = StorageCache()
    lists, order, made = torch.arange(5), torch.arange(6), []

    def build() -> object:
        made.append(0)
        return object()

    known = values.get([lists], (), build, loose=[None])
    loose = values.get([lists], (), build, loose=[order])
    with monkeypatch.context() as patch:
        patch.setattr(cache, "capturing", lambda device: True)
        assert values.get([lists], (), build) is not None
        assert values.get([lists], (), build, loose=[None]) is known
        assert values.get([lists], (), build, loose=[order]) is not loose
        inside = values.get([lists], ("new",), build)
    assert len(made) == 4
    assert values.get([lists], ("new",), build) is not inside
    assert values.get([lists], (), build, loose=[order]) is loose


def test_what_a_captured_graph_reads_stays(monkeypatch):
    values: StorageCache[Value] = StorageCache()
    monkeypatch.setattr(cache, "_CAPTURED", {})
    lists = torch.arange(5)
    watched = weakref.ref(values.get([lists], (), Value))
    with monkeypatch.context() as patch:
        patch.setattr(cache, "capturing", lambda device: True)
        values.get([lists], (), Value)
    del lists
    assert watched() is not None
    cache._CAPTURED.clear()
    assert watched() is None


def test_frames_must_be_counted_before_a_capture(monkeypatch):
    inputs, tiles, frames = qkv(1, 1, 1, TOKENS, TOKENS, 16, torch.float32), TileLists.full(
        TOKENS, TOKENS, block_q=16, block_k=16
    ), decay()  # fmt: skip
    from dit_accel_kernels import features

    with monkeypatch.context() as patch:
        patch.setattr(features, "capturing", lambda device: True)
        with pytest.raises(RuntimeError, match=r"frame decay.*frames.*capture"):
            call("triton", tiles, inputs, frame_decay=frames)
    call("triton", tiles, inputs, frame_decay=frames)


class Stream:
    """What the cache asks of a stream."""

    def __init__(self) -> None:
        self.waited: list[object] = []

    def record_event(self) -> tuple[str, "Stream"]:
        return ("made on", self)

    def wait_event(self, event: object) -> None:
        self.waited.append(event)


def test_another_stream_waits_for_a_value_and_holds_its_memory(monkeypatch):
    values: StorageCache[list] = StorageCache()
    first, second, held = Stream(), Stream(), []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: held.append((self.numel(), stream)))
    lists = torch.arange(5)
    for stream in (first, first, second):
        monkeypatch.setattr(cache, "current_stream", lambda device, stream=stream: stream)
        values.get([lists], (), lambda: [torch.zeros(2), (torch.zeros(3), None)])
    assert first.waited == []
    assert second.waited == [("made on", first)]
    assert held == [(2, second), (3, second)]


def test_compilers_leave_the_op_out_of_their_graphs():
    for name in ("block_sparse_attention", "block_sparse_attention_backward"):
        op = getattr(torch.ops.dit_accel_kernels, name).default
        assert torch.Tag.cudagraph_unsafe in op.tags


def test_copies_for_a_device_are_made_once():
    tiles = random_lists(1, TOKENS, TOKENS, 16, 16)
    there = tiles.to("meta")
    assert tiles.to("meta") is there
    assert there.device.type == "meta"
    assert (there.num_q, there.block_k) == (tiles.num_q, tiles.block_k)
    assert tiles.to("cpu") is tiles
    full = TileLists.full(64, 64, block_q=16, block_k=16, device="meta")
    assert TileLists.full(64, 64, block_q=16, block_k=16, device="meta") is full
    assert TileLists.full(64, 64, block_q=16, block_k=16).to("meta") is full


@pytest.mark.gpu
@pytest.mark.skipif(interpreted(), reason="interprets its kernels: TRITON_INTERPRET=0 runs them on a GPU")
@pytest.mark.parametrize("warm", [False, True])
def test_plans_of_a_capture_are_the_graphs_own(warm):
    """A call outside reads no memory of a graph's pool; a graph follows a mask that is written to between replays."""
    inputs = [x.cuda() for x in qkv(1, 2, 2, TOKENS, TOKENS, 16, torch.float32)]
    tiles, mask = random_lists(1, TOKENS, TOKENS, 16, 16).to("cuda"), torch.ones(1, TOKENS, dtype=torch.bool).cuda()
    other = random_lists(1, TOKENS, TOKENS, 16, 16).to("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call("triton", tiles if warm else other, inputs, key_mask=mask)
        call("triton", tiles if warm else other, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    expected = call("triton", other, inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        masked, plain = call("triton", tiles, inputs, key_mask=mask), call("triton", tiles, inputs)
    for length in (70, 33):
        mask.copy_(torch.arange(TOKENS).cuda()[None] < length)
        graph.replay()
        assert torch.equal(masked, call("triton", tiles, inputs, key_mask=mask.clone()))
        assert torch.equal(plain, call("triton", tiles, inputs))
    assert torch.equal(expected, call("triton", other, inputs))


def test_a_value_counts_while_every_one_of_its_tensors_is_the_same():
    """Where their values are not compared, on a GPU, other tensors of the same versions are others still."""
    owner, second, other = (torch.arange(4).untyped_storage() for _ in range(3))
    versions = ((0, 0, 0), (0, 0, 0))
    entry = cache._Entry("value", (weakref.ref(owner), weakref.ref(second)), versions, None, None)
    assert entry.fits([owner, second], versions)
    assert not entry.fits([owner, other], versions)
    assert not entry.fits([other, second], versions)
    assert not entry.fits([owner, second], ((0, 0, 0), (0, 1, 0)))
