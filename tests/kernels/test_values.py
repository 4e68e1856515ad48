"""Values that a call must not believe: indices out of range, orders that are none, lists that changed unseen."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from dit_accel_kernels import (
    EXACT,
    POOLED,
    FrameDecay,
    TileLists,
    block_sparse_attention,
    block_sparse_attention_backward,
    cache,
    release_captured,
    values,
)
from dit_accel_kernels.problem import Problem
from kernel_cases import qkv, random_lists
from torch import Tensor

TOKENS, BLOCK = 60, 16  # four tiles a side
SIZES = dict(block_q=BLOCK, block_k=BLOCK, num_q=TOKENS, num_k=TOKENS)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return qkv(1, 2, 2, TOKENS, TOKENS, 16, dtype)


def lists_with(place: int, value: int, name: str = "exact_indices") -> TileLists:
    """Lists in which one entry was replaced."""
    states = torch.tensor([EXACT, POOLED, EXACT, POOLED], dtype=torch.uint8).repeat(4, 1)
    tiles = TileLists.from_states(states, **SIZES)
    changed = getattr(tiles, name).clone()
    changed.view(-1)[place] = value
    return replace(tiles, **{name: changed})


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
@pytest.mark.parametrize("value", [4, 50_000_000, -1])
def test_an_index_out_of_range_is_refused_on_a_cpu(backend, value, cpu_path):
    text = rf"0..3 \(NK = 4 key tiles\), found {value} at position 3.*query tile 1.*set 0"
    tiles = lists_with(3, value)
    for _ in range(2):  # a refusal is not remembered as a pass
        with pytest.raises(ValueError, match=text):
            block_sparse_attention(*inputs(), tiles, layout="bhsd", backend=backend)


@pytest.mark.parametrize(
    ("tiles", "text"),
    [
        (
            lists_with(1, 9, "pooled_indices"),
            r"pooled_indices.*0..3.*found 9 at position 1",
        ),
        (
            lists_with(3, 0),
            r"ascend.*found 0 after 0 at position 3",
        ),
        (lists_with(3, 3), r"exact .*pooled.*tile 3 twice.*query tile 1.*set 0"),
        (lists_with(2, 99, "exact_offsets"), r"exact_offsets.*0 to 8, found \[0, 2, 99, 6, 8\]"),
    ],
    ids=["pooled", "repeated", "both", "offsets"],
)
def test_lists_that_are_none_are_refused_on_a_cpu(tiles, text, cpu_path):
    with pytest.raises(ValueError, match=text):
        block_sparse_attention(*inputs(), tiles, layout="bhsd", backend="torch")


def test_a_gradient_alone_checks_too():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="found 5 at position 3"):
        block_sparse_attention_backward(torch.ones_like(q), q, k, v, lists_with(3, 5), layout="bhsd", backend="torch")


@pytest.mark.parametrize(
    ("order", "text"),
    [
        (torch.zeros(TOKENS, dtype=torch.int64), r"token_order.*found token 0 60 times"),
        (torch.arange(TOKENS) + 1, r"token_order.*0..59 \(60 tokens\), found 60 at position 59"),
    ],
)
def test_an_order_that_is_none_is_refused_on_a_cpu(order, text):
    """The output of a token that no position names would be whatever memory held."""
    with pytest.raises(ValueError, match=text):
        block_sparse_attention(
            *inputs(), random_lists(1, TOKENS, TOKENS, BLOCK, BLOCK), layout="bhsd", token_order=order
        )


def test_lists_are_checked_once_until_they_change(monkeypatch):
    seen = []
    real = TileLists.validate
    monkeypatch.setattr(TileLists, "validate", lambda self: seen.append(1) or real(self))
    tiles = random_lists(1, TOKENS, TOKENS, BLOCK, BLOCK)
    seen.clear()
    for _ in range(3):
        block_sparse_attention(*inputs(), tiles, layout="bhsd", backend="torch")
    assert len(seen) == 1
    tiles.exact_indices.numpy()[0] += 0  # written, and as it was
    block_sparse_attention(*inputs(), tiles, layout="bhsd", backend="torch")
    assert len(seen) == 1
    tiles.exact_indices.numpy()[-1] = 77
    with pytest.raises(ValueError, match="found 77"):
        block_sparse_attention(*inputs(), tiles, layout="bhsd", backend="torch")


def test_elsewhere_values_are_read_on_demand_alone(monkeypatch):
    tiles, order = lists_with(3, 5), torch.zeros(TOKENS, dtype=torch.int64)
    q, k, v = inputs()
    problem = Problem(q=q, k=k, v=v, **tiles.parts, block_q=BLOCK, block_k=BLOCK, scale=1.0, token_order=order)
    monkeypatch.setattr(values, "readable", lambda device: False)
    monkeypatch.delenv(values.SWITCH, raising=False)
    values.check_values(problem)
    monkeypatch.setenv(values.SWITCH, "1")
    with pytest.raises(ValueError, match="found 5 at position 3"):
        values.check_values(problem)
    problem = replace(problem, exact_indices=lists_with(3, 2).exact_indices)
    with pytest.raises(ValueError, match="token 0 60 times"):
        values.check_values(problem)
    monkeypatch.setattr(values, "capturing", lambda device: True)
    values.check_values(problem)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_lists_written_behind_torchs_back_are_followed(backend, by_operations):
    """By numpy, as by a kernel of the user's own."""
    given, tiles = inputs(), random_lists(1, TOKENS, TOKENS, BLOCK, BLOCK, pooled=False)
    tiles = TileLists.from_states(torch.eye(4, dtype=torch.uint8) * EXACT, **SIZES)
    call = dict(layout="bhsd", backend=backend)
    before = block_sparse_attention(*given, tiles, **call)
    tiles.exact_indices.numpy()[:] = [3, 2, 1, 0]
    other = TileLists.from_states(torch.eye(4, dtype=torch.uint8).flip(1) * EXACT, **SIZES)
    found = block_sparse_attention(*given, tiles, **call)
    assert not torch.equal(found, before)
    assert torch.equal(found, block_sparse_attention(*given, other, **call))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_frames_and_copies_are_followed_too(backend, by_operations):
    given, tiles = inputs(), random_lists(1, TOKENS, TOKENS, BLOCK, BLOCK)
    frames = torch.arange(TOKENS, dtype=torch.int32) // 16

    def call(decay: FrameDecay) -> Tensor:
        return block_sparse_attention(*given, tiles, layout="bhsd", backend=backend, frame_decay=decay)

    decay = FrameDecay(table=torch.tensor([1.0, 0.5]), q_frames=frames, k_frames=frames.clone())
    call(decay)
    decay.k_frames.numpy()[:] = 0
    assert torch.equal(call(decay), call(replace(decay, k_frames=torch.zeros_like(frames))))
    there = tiles.to("meta")
    tiles.exact_indices.numpy()[:] = tiles.exact_indices.numpy()
    assert tiles.to("meta") is there
    tiles.exact_indices.numpy()[0] += 1
    assert tiles.to("meta") is not there


def test_elsewhere_lists_say_that_they_changed(monkeypatch):
    monkeypatch.setattr(cache, "readable", lambda device: False)
    tiles, made = random_lists(1, TOKENS, TOKENS, BLOCK, BLOCK), cache.StorageCache()
    parts = (tiles.exact_offsets, tiles.exact_indices, tiles.pooled_offsets, tiles.pooled_indices)
    first = made.get(parts, (), object)
    tiles.exact_indices.numpy()[0] += 1
    assert made.get(parts, (), object) is first  # what a GPU's own kernels write is not seen
    tiles.changed()
    second = made.get(parts, (), object)
    assert second is not first
    assert made.get(parts, (), object) is second


def test_lists_that_a_graph_reads_warn_when_they_change(monkeypatch):
    monkeypatch.setattr(cache, "_CAPTURED", {})
    lists, made = torch.arange(5), cache.StorageCache()
    made.get([lists], (), object)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "capturing", lambda device: True)
        captured = made.get([lists], (), object)
    assert made.get([lists], (), object) is captured
    lists.add_(1)
    with pytest.warns(UserWarning, match=r"CUDA graph.*capture"):
        assert made.get([lists], (), object) is not captured
    with pytest.warns(UserWarning, match=r"CUDA graph.*capture"):
        cache.changed([lists])
    release_captured()
    assert cache._CAPTURED == {}
    cache.changed([lists])


@pytest.mark.parametrize("module", [SimpleNamespace(), SimpleNamespace(current_stream=lambda device: "the stream")])
def test_a_device_without_streams_has_none(module, monkeypatch):
    """MPS has no `current_stream`."""
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert cache.current_stream(torch.device("mps")) == ("the stream" if vars(module) else None)


def test_lists_go_to_a_device_whose_module_names_no_current_one(monkeypatch):
    tiles = random_lists(1, TOKENS, TOKENS, BLOCK, BLOCK)
    if not torch.backends.mps.is_available():
        with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)mps"):  # torch's own words
            tiles.to("mps")
    real = torch.empty

    def there(*sizes, device=None, **options):
        return real(*sizes, device="meta" if str(device) == "mps" else device, **options)

    monkeypatch.setattr(torch, "empty", there)
    assert tiles.to("mps").device.type == "meta"


@pytest.mark.parametrize("rows", [None, torch.arange(TOKENS) != 7], ids=["no weight", "rows left out"])
@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_a_mix_of_nothing_takes_nothing_of_a_masked_value(backend, rows, cpu_path):
    q, k, v = inputs()
    tiles, mask = random_lists(1, TOKENS, TOKENS, BLOCK, BLOCK), torch.ones(1, TOKENS, dtype=torch.bool)
    mask[:, 7] = False
    v[:, :, 7] = torch.inf
    mix = torch.zeros(2) if rows is None else torch.tensor([0.0, 0.5])
    call = dict(layout="bhsd", backend=backend, key_mask=mask)
    plain = block_sparse_attention(q, k, v, tiles, **call)
    found = block_sparse_attention(q, k, v, tiles, identity_mix=mix, identity_rows=rows, **call)
    assert found.isfinite().all()
    assert torch.equal(found[:, 0], plain[:, 0])


def test_a_wild_index_does_not_end_the_process():
    """It was a segmentation fault, which no test survives to tell of."""
    code = (
        "import torch, test_values as t\n"
        "try: t.block_sparse_attention(*t.inputs(), t.lists_with(3, 50_000_000), layout='bhsd', backend='torch')\n"
        "except ValueError as error: print('refused')\n"
    )
    here = os.path.dirname(__file__)
    paths = os.pathsep.join([here, os.path.join(here, "..", "support"), *sys.path])
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "refused"), ran.stderr[-500:]
