"""Rests that wait in the host's memory: what is copied ahead of which call, and in what order the streams work."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from wan_tiny import denoise, sharp_transformer

import dit_accel
from dit_accel import SparseD
from dit_accel.plan import rests as module
from dit_accel.plan.rests import Ahead, KeptRest, Rests, Stored, on_host, start_copy, stored

CPU = torch.device("cpu")
OFFLOADED = SparseD(
    density=0.3, block_size=16, dense_steps=0, dense_layers=0, rest="cached", refresh=3, rest_offload="cpu"
)


def rows_of(value: float) -> Stored:
    return stored(torch.full((1, 1, 2, 4), value), None)


def keys_of(layers: int, *branches: str):
    return [("transformer", layer, branch, 0, 1) for branch in branches or ("cond",) for layer in range(layers)]


class Stream:
    """A stream that notes what it does."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self):
        self.log.append(f"{self.name} records")
        return "the copy"

    def __enter__(self):
        self.log.append(f"{self.name} begins")

    def __exit__(self, *_):
        self.log.append(f"{self.name} ends")


@pytest.fixture
def streams(monkeypatch):
    """Give the CPU streams; return what they do."""
    log = []
    main, side = Stream("main", log), Stream("side", log)
    monkeypatch.setattr(module, "WITH_STREAMS", ("cpu",))
    monkeypatch.setattr(module, "side_stream", lambda device: side)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: main)
    return log


class Calls:
    """Calls of keys in turn, of which each reads what is kept for it; copies are at once complete."""

    def __init__(self, keys, serving=True) -> None:
        self.started: list[Stored] = []
        self.kept = {key: rows_of(number) for number, key in enumerate(keys)}
        self.serving, self.ahead = serving, Ahead(self.start)

    def start(self, rows, device):
        self.started.append(rows)
        return SimpleNamespace(of=rows, serves=lambda wanted, device: self.serving and wanted is rows)

    def read(self, key):
        """Return whether a call read a copy, and what was started to be copied for the next."""
        before = len(self.started)
        rows = self.ahead.reading(key, self.kept.get(key), CPU, self.kept.get)
        assert rows is self.kept.get(key) or rows.of is self.kept[key]
        return isinstance(rows, SimpleNamespace), self.started[before:]


def test_what_followed_a_call_in_the_step_before_is_copied_while_it_runs_and_another_order_is_learned():
    keys = keys_of(3, "cond", "uncond")
    calls = Calls(keys)
    for key in keys:
        assert calls.read(key) == (False, [])
    for step in range(2):
        for number, key in enumerate(keys):
            following = calls.kept[keys[(number + 1) % len(keys)]]
            assert calls.read(key) == (step > 0 or number > 0, [following])
    a, b, c = keys_of(3)
    calls = Calls((a, b, c))
    for key in (a, b, c, a):
        calls.read(key)
    assert calls.read(c) == (False, [calls.kept[a]])  # b was copied
    assert calls.read(a) == (True, [calls.kept[c]])


def test_what_changed_or_was_dropped_or_serves_another_stream_or_was_reset_is_not_read_from_its_copy():
    a, b = keys_of(2)

    def begun(serving=True):
        calls = Calls((a, b), serving)
        for key in (a, b, a):
            calls.read(key)
        return calls

    calls = begun()
    calls.kept[b] = rows_of(2)
    assert calls.read(b) == (False, [calls.kept[a]])
    calls.read(a)
    del calls.kept[b]
    assert calls.read(b) == (False, [calls.kept[a]])
    assert calls.read(a) == (True, [])
    calls = begun()
    calls.ahead.reset()
    assert [calls.read(key) for key in (b, a)] == [(False, []), (False, [])]
    assert not begun(serving=False).read(b)[0]


def test_rests_of_calls_that_are_going_to_be_dense_are_not_copied():
    rests, started = Rests(3, cached=True, offload=True), []
    rests._ahead = Ahead(lambda rows, device: started.append(rows))
    keys = keys_of(2)
    for key in keys:
        rests.keep(key, KeptRest(exact=torch.zeros(1, 1, 1, 1, dtype=torch.int32), rest=rows_of(0), gain=0.0))
    copied = {layer: [] for layer in range(2)}
    for step in range(7):
        for layer, key in enumerate(keys):
            rests._calls[key] = step + 1
            rests.reading(key, CPU)
            if started:
                assert started.pop() is rests.kept[keys[1 - layer]].rest
                copied[1 - layer].append(step + layer)  # the call of the other layer that comes next
    # in the first step it was not known what follows
    assert copied == {0: [2, 4, 5, 7], 1: [1, 3, 4, 6]}


def test_a_copy_waits_for_what_came_before_and_is_waited_for(monkeypatch, streams):
    for dtype in (None, "int8", "int4"):
        rows = stored(torch.randn(1, 2, 3, 4), dtype)
        streams.clear()
        copy = start_copy(rows, CPU)
        assert streams == ["side waits for main", "side begins", "side ends", "side records"]
        assert all(to is not of for to, of in zip(copy.there.tensors, rows.tensors, strict=True))
        assert copy.serves(rows, CPU)
        assert not copy.serves(replace(rows), CPU)
        streams.clear()
        assert torch.equal(copy.read(CPU), rows.read(CPU))
        assert streams == ["main waits for the copy"]
        del copy
    copy = start_copy(rows, CPU)
    streams.clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.accelerator, "current_stream", lambda device: Stream("other", []))
        assert not copy.serves(rows, CPU)
    del copy  # unread: its memory is given away after it is complete
    assert streams == ["main waits for the copy"]
    monkeypatch.setattr(module, "WITH_STREAMS", ())
    assert start_copy(rows, CPU) is None


def test_runs_with_copies_ahead_give_the_same_and_count_as_the_hosts(streams):
    transformer, runs, held = sharp_transformer(), [], []
    for offload in (None, "cpu"):
        config = replace(OFFLOADED, rest_offload=offload, rest_dtype="int4")
        with dit_accel.attach(transformer, config, preset="none") as attachment:
            runs.append([denoise(transformer, 6), denoise(transformer, 6, seed=1)])
            held.append(attachment.report().state_bytes["sparsed"])
    assert all(map(torch.equal, *runs))
    assert held[0] - held[1] == 3 * 2 * 2 * 80 * (8 + 4)  # layers, branches, heads, tokens; nibbles and scale
    assert on_host(torch.arange(3)).device == CPU
    copies = streams.count("side records")
    frozen = sum(not Rests(3, cached=True).is_dense(call, layer) for call in range(6) for layer in range(3))
    assert 2 * 2 * (frozen - 3) <= copies <= 2 * 2 * frozen + 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, "int4"])
def test_copies_beside_the_computation_give_the_same(dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, whose streams copy beside the computation")
    device, runs = torch.device("cuda", torch.cuda.current_device()), []
    transformer = sharp_transformer(num_layers=6).to(device)
    start = torch.randn(1, 12, 9, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    text, times = torch.ones(1, 6, 64, device=device), torch.arange(900.0, 300.0, -50.0, device=device)
    for offload in (None, "cpu"):
        config, x = replace(OFFLOADED, rest_offload=offload, rest_dtype=dtype), start
        with torch.no_grad(), dit_accel.attach(transformer, config, preset="none"):
            for step, branch in itertools.product(range(12), ("cond", "uncond")):
                with transformer.cache_context(branch, step_index=step, num_inference_steps=12):
                    x = x - 0.1 * transformer(x, times[step : step + 1], text, return_dict=False)[0]
        runs.append(x)
    assert torch.equal(*runs)
