"""What is derived from lists lives as long as they do, follows every change, and never leaves a captured graph."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

import weakref

import pytest
import torch
from dit_accel_kernels import TileLists, block_sparse_attention_eager, cache, checks, features
from dit_accel_kernels.cache import StorageCache
from dit_accel_kernels.backends.triton.support import interpreted
from kernel_cases import attend, frame_decay, full, qkv, random_lists
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

TOKENS = 70


class Value:
    """Something that can be watched."""


def inputs(batch: int = 1) -> tuple[torch.Tensor, ...]:
    return qkv(batch, 2, 2, TOKENS, TOKENS, 16, torch.float32)


def random_tiles(groups: int = 1, **options) -> TileLists:
    return random_lists(groups, TOKENS, TOKENS, 16, 16, **options)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_mask_or_an_order_changed_in_place_counts(backend, mode):
    """Tensors made in inference mode count no writes: nothing may be remembered by their address."""
    given, tiles, decay = inputs(), random_tiles(), frame_decay(TOKENS)
    for name, first, other in (
        ("key_mask", torch.ones(1, TOKENS, dtype=torch.bool), torch.arange(TOKENS)[None] < 40),
        ("token_order", torch.arange(TOKENS), torch.randperm(TOKENS)),
    ):
        with mode():
            changed = first.clone()
            attend(*given, tiles, backend=backend, frame_decay=decay, **{name: changed})
            changed.copy_(other)
            found = attend(*given, tiles, backend=backend, frame_decay=decay, **{name: changed})
        expected = attend(*given, tiles, backend=backend, frame_decay=decay, **{name: other.clone()})
        assert torch.equal(found, expected)


def operations(tiles: TileLists, given, **arguments) -> int:
    """How many of torch's operations a call on triton takes."""

    class Counted(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", lambda *_, **__: None)
        for module in (cache, checks):  # as on a GPU, where the values of masks and lists aren't read
            patch.setattr(module, "readable", lambda device: False)
        with Counted() as counted:
            block_sparse_attention_eager(*given, tiles, layout="bhsd", backend="triton", **arguments)
    return counted.count


@pytest.mark.parametrize("ordered", [False, True])
def test_a_plan_is_made_once_for_the_same_keys(ordered):
    """A further call takes as many operations as one without a mask; a mask that is written to has it made anew."""
    given, order = inputs(2), dict(token_order=torch.randperm(TOKENS)) if ordered else {}
    for pooled in (False, True):
        tiles = random_tiles(pooled=pooled)
        operations(tiles, given, **order)
        least = operations(tiles, given, **order)
        mask, length = torch.rand(2, TOKENS) > 0.3, torch.tensor([TOKENS, 40])
        for keys in (dict(key_mask=mask), dict(key_length=length), dict(key_mask=mask, key_length=length)):
            assert operations(tiles, given, **order, **keys) > least + 20
            assert operations(tiles, given, **order, **keys) == least
            for x in keys.values():
                x.copy_(x.roll(1, 0))
            assert operations(tiles, given, **order, **keys) > least + 20


def test_the_specification_compiles_with_what_is_remembered_elsewhere():
    """It is plain eager code, which a compiler traces: what it would find in the cache it makes."""
    (q, k, v), tiles, order = inputs(), random_tiles(), torch.randperm(TOKENS)
    options = dict(backend="reference", token_order=order, frame_decay=frame_decay(TOKENS))

    def call(q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, tiles, key_mask=mask, **options)

    mask = torch.rand(1, TOKENS) > 0.3
    assert torch.equal(torch.compile(call, backend="eager", fullgraph=True)(q, mask), call(q, mask))


def test_lists_are_remembered_many_in_turn_and_those_made_in_inference_mode_too():
    with torch.inference_mode():
        tiles, frames = random_tiles(), frame_decay(TOKENS)
    parts = (tiles.exact_offsets, tiles.exact_indices, tiles.pooled_offsets, tiles.pooled_indices)
    assert not any(x.is_inference() for x in (*parts, frames.table, frames.q_frames, frames.k_frames))
    made: StorageCache[object] = StorageCache()
    assert made.get(parts, (), object) is made.get(parts, (), object)
    lists = [torch.arange(3) for _ in range(200)]
    first = [made.get([x], (), object) for x in lists]
    assert [made.get([x], (), object) for x in lists] == first
    assert len(set(map(id, first))) == len(lists)


def test_a_value_goes_with_its_tensors_at_once():
    made: StorageCache[Value] = StorageCache()
    tensor, other = torch.arange(5), torch.arange(6)
    watched = weakref.ref(made.get([tensor], (), Value))
    both = weakref.ref(made.get([tensor, other], (), Value))
    alias = tensor[:]
    del tensor
    assert watched() is not None
    assert made.get([alias], (), Value) is watched()
    del other
    made.get([alias], ("more",), Value)  # what needs more than the first tensor goes when that is asked next
    assert both() is None
    del alias
    assert watched() is None


def test_a_value_is_of_all_its_tensors_until_one_is_written_to():
    made: StorageCache[Value] = StorageCache()
    first, second, other = torch.zeros(3), torch.ones(3), torch.ones(3)
    for different in (other, None):
        value = made.get([first, second], (), Value)
        assert made.get([first, second], (), Value) is value
        assert made.get([first, different], (), Value) is not value
    watched = weakref.ref(made.get([other], (), Value))
    other.add_(1)
    assert made.get([other], (), Value) is not watched()
    assert watched() is None
    assert made.get([other], (), Value) is not made.get([other[1:]], (), Value)
    owner, second, other = (torch.arange(4).untyped_storage() for _ in range(3))  # on a GPU, whose values are not read
    versions = ((0, 0, 0), (0, 0, 0))
    entry = cache._Entry("value", (weakref.ref(owner), weakref.ref(second)), versions, None, None)
    assert entry.fits([owner, second], versions)
    assert not entry.fits([owner, other], versions)
    assert not entry.fits([other, second], versions)
    assert not entry.fits([owner, second], ((0, 0, 0), (0, 1, 0)))


def test_a_capture_stores_nothing_and_builds_what_may_change(monkeypatch):
    kept: StorageCache[object] = StorageCache()
    lists, order, made = torch.arange(5), torch.arange(6), []

    def build() -> object:
        made.append(0)
        return object()

    known, loose = (kept.get([lists], (), build, loose=[x]) for x in (None, order))
    with monkeypatch.context() as patch:
        patch.setattr(cache, "capturing", lambda device: True)
        assert kept.get([lists], (), build, loose=[None]) is known
        assert kept.get([lists], (), build, loose=[order]) is not loose
        inside = kept.get([lists], ("new",), build)
    assert len(made) == 4
    assert kept.get([lists], ("new",), build) is not inside
    assert kept.get([lists], (), build, loose=[order]) is loose


def test_frames_must_be_counted_before_a_capture(monkeypatch):
    call = dict(frame_decay=frame_decay(TOKENS), backend="triton")
    with monkeypatch.context() as patch:
        patch.setattr(features, "capturing", lambda device: True)
        with pytest.raises(RuntimeError, match=r"frame decay.*frames.*capture"):
            attend(*inputs(), full(TOKENS), **call)
    attend(*inputs(), full(TOKENS), **call)


class Stream:
    """What the cache asks of a stream."""

    def __init__(self) -> None:
        self.waited: list[object] = []

    def record_event(self) -> tuple[str, "Stream"]:
        return ("made on", self)

    def wait_event(self, event: object) -> None:
        self.waited.append(event)


def test_another_stream_waits_for_a_value_and_holds_its_memory(monkeypatch):
    made: StorageCache[list] = StorageCache()
    first, second, held = Stream(), Stream(), []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: held.append((self.numel(), stream)))
    lists = torch.arange(5)
    for stream in (first, first, second):
        monkeypatch.setattr(cache, "current_stream", lambda device, stream=stream: stream)
        made.get([lists], (), lambda: [torch.zeros(2), (frame_decay(5), None)])
    assert first.waited == []
    assert second.waited == [("made on", first)]
    assert held == [(size, second) for size in (2, 3, 5, 5)]


@pytest.mark.gpu
@pytest.mark.skipif(interpreted(), reason="interprets its kernels: TRITON_INTERPRET=0 runs them on a GPU")
@pytest.mark.parametrize("warm", [False, True])
def test_plans_of_a_capture_are_the_graphs_own(warm):
    """A call outside reads no memory of a graph's pool; a graph follows a mask that is written to between replays."""
    given, mask = [x.cuda() for x in inputs()], torch.ones(1, TOKENS, dtype=torch.bool).cuda()
    tiles, other = random_tiles().to("cuda"), random_tiles().to("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def both(lists: TileLists, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return attend(*given, lists, backend="triton", key_mask=mask), attend(*given, lists, backend="triton")

    with torch.cuda.stream(stream):
        both(tiles if warm else other, mask)
    torch.cuda.current_stream().wait_stream(stream)
    _, expected = both(other, mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(tiles, mask)
    for length in (70, 33):
        mask.copy_(torch.arange(TOKENS).cuda()[None] < length)
        graph.replay()
        assert all(map(torch.equal, captured, both(tiles, mask.clone())))
    assert torch.equal(expected, both(other, mask)[1])
