"""Tile lists: round trips and copies, and values that a call must not believe, such as an index out of range."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from dit_accel_kernels import EXACT, POOLED, SKIPPED, TileLists, block_sparse_attention_backward, cache
from dit_accel_kernels import checks, release_captured
from dit_accel_kernels.csr import padded_rows
from dit_accel_kernels.sections import decay_of_tiles, valid_tiles
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import attend, frame_decay, full, lists_of, problem_from, qkv, random_lists
from torch import Tensor

TOKENS, BLOCK = 60, 16  # four tiles a side


@st.composite
def cases(draw):
    (num_q, num_k), (block_q, block_k) = ([draw(st.integers(1, most)) for _ in range(2)] for most in (40, 9))
    shape = (draw(st.integers(1, 4)), -(-num_q // block_q), -(-num_k // block_k))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    states = torch.randint(0, draw(st.sampled_from([1, 2, 3])), shape, dtype=torch.uint8, generator=generator)
    return states, (block_q, block_k, num_q, num_k)


@settings(deadline=None, max_examples=40)
@given(cases())
def test_states_survive_the_round_trip(case):
    states, sizes = case
    tiles = lists_of(states, *sizes).validate()
    assert torch.equal(tiles.states(), states)
    assert (tiles.groups, tiles.tiles_total) == (states.shape[0], states.numel())
    assert tiles.tiles_exact == int((states == EXACT).sum())
    assert tiles.tiles_pooled == int((states == POOLED).sum())
    assert tiles.density == tiles.tiles_exact / tiles.tiles_total
    assert (tiles.pooled_indices is None) == (tiles.tiles_pooled == 0)


def test_offsets_are_absolute_and_full_lists_dense_and_states_of_two_dimensions_one_shared_list():
    tiles = lists_of([[[2, 2], [0, 2]], [[1, 0], [2, 1]]], 4, 4, 8, 7)
    assert tiles.exact_offsets.tolist() == [[0, 2, 3], [3, 3, 4]]
    assert tiles.exact_indices.tolist() == [0, 1, 1, 0]
    assert tiles.pooled_offsets.tolist() == [[0, 0, 0], [0, 1, 2]]
    assert tiles.pooled_indices.tolist() == [0, 1]
    assert {t.dtype for t in (tiles.exact_offsets, tiles.exact_indices, tiles.pooled_indices)} == {torch.int32}
    tiles = full(100, 63, 32, 16)
    assert (tiles.density, tuple(tiles.states().shape)) == (1.0, (1, 4, 4))
    empty = lists_of(torch.zeros(2, 2), 4, 4, 8, 8)
    assert (empty.groups, empty.density, int(empty.states().max())) == (1, 0.0, SKIPPED)


def test_rows_are_padded_to_the_longest_or_to_all_tiles_and_what_lies_beyond_the_end_is_no_key():
    chosen = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 0]]) > 0
    counts, indices = padded_rows(chosen, read=True)
    assert (counts.tolist(), indices.tolist()) == ([2, 1], [[1, 3], [2, 0]])
    assert padded_rows(chosen)[1].tolist() == [[1, 3, 0, 2], [2, 0, 1, 3]]
    assert padded_rows(torch.zeros(2, 4) > 0, read=True)[1].shape == (2, 1)
    tokens = torch.arange(20)
    whole, some = valid_tiles(torch.stack([tokens < 16, tokens != 3]), 8)
    assert whole.tolist() == [[True, True, False], [False, True, True]]
    assert some.tolist() == [[True, True, False], [True, True, True]]


def test_a_pair_of_tiles_has_one_decay_where_all_of_its_tokens_have_it():
    frames = frame_decay(41, 57, 6, (1.0, 1.0, 0.5, 0.5, 0.25))
    decay = table, q_frames, k_frames = frames.table, frames.q_frames, frames.k_frames
    problem = problem_from(full(41, 57, 4, 9), *qkv(1, 1, 1, 41, 57, 8, torch.float32))
    t = table[(q_frames[:, None] - k_frames).abs().clamp(max=4)]
    t = t.masked_fill((q_frames[:, None] < 0) | (k_frames < 0), 1.0)
    t = t[torch.arange(44).clamp(max=40)][:, torch.arange(63).clamp(max=56)].view(11, 4, 7, 9)
    least, most = t.amin((1, 3)), t.amax((1, 3))
    expected = least.where(least == most, torch.nan)
    torch.testing.assert_close(decay_of_tiles(problem, decay), expected, equal_nan=True, rtol=0, atol=0)


def test_copies_for_a_device_are_made_once():
    tiles = random_lists(1, 70, 70, 16, 16)
    there = tiles.to("meta")
    assert tiles.to("meta") is there
    assert (there.device.type, there.num_q, there.block_k) == ("meta", 70, 16)
    assert (there.tiles_pooled, tiles.to("cpu")) == (tiles.tiles_pooled, tiles)
    dense = TileLists.full(64, 64, block_q=16, block_k=16, device="meta")
    assert TileLists.full(64, 64, block_q=16, block_k=16, device="meta") is dense
    assert full(64).to("meta") is dense
    tiles.exact_indices.numpy()[:] = tiles.exact_indices.numpy()
    assert tiles.to("meta") is there
    tiles.exact_indices.numpy()[0] += 1
    assert tiles.to("meta") is not there


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return qkv(1, 2, 2, TOKENS, TOKENS, 16, torch.float32)


def random_tiles(**options) -> TileLists:
    return random_lists(1, TOKENS, TOKENS, BLOCK, BLOCK, **options)


def lists_with(place: int, value: int) -> TileLists:
    """Lists in which one entry was replaced."""
    tiles = lists_of([[EXACT, POOLED, EXACT, POOLED]] * 4, BLOCK, BLOCK, TOKENS, TOKENS)
    indices = tiles.exact_indices.clone()
    indices[place] = value
    return replace(tiles, exact_indices=indices)


@pytest.mark.parametrize("backend", ["loop", "operations", "reference", "triton"], indirect=True)
def test_an_index_out_of_range_is_refused_on_a_cpu(backend):
    """It would read what is not there, and end the process; a refusal is not remembered as a pass."""
    for value in (4, 4, 50_000_000, -1):
        with pytest.raises(ValueError, match=rf"0..3 \(NK = 4.*found {value} at position 3.*query tile 1.*set 0"):
            attend(*inputs(), lists_with(3, value), backend=backend)
    q, k, v = inputs()
    with pytest.raises(ValueError, match="found 5 at position 3"):
        block_sparse_attention_backward(q, q, k, v, lists_with(3, 5), layout="bhsd", backend=backend)


def test_lists_are_checked_once_until_they_change(monkeypatch):
    tiles, seen, real = random_tiles(), [], TileLists.validate
    monkeypatch.setattr(TileLists, "validate", lambda self: seen.append(1) or real(self))
    for _ in range(3):
        attend(*inputs(), tiles, backend="torch")
    tiles.exact_indices.numpy()[0] += 0  # written, and as it was
    attend(*inputs(), tiles, backend="torch")
    assert len(seen) == 1
    tiles.exact_indices.numpy()[-1] = 77
    with pytest.raises(ValueError, match="found 77"):
        attend(*inputs(), tiles, backend="torch")


def test_elsewhere_values_are_read_on_demand_alone(monkeypatch):
    tiles, order = lists_with(3, 5), torch.zeros(TOKENS, dtype=torch.int64)
    q, k, v = inputs()
    problem = problem_from(tiles, q, k, v, token_order=order)
    monkeypatch.setattr(checks, "readable", lambda device: False)
    monkeypatch.delenv(checks.SWITCH, raising=False)
    checks.check_values(problem)
    monkeypatch.setenv(checks.SWITCH, "1")
    with pytest.raises(ValueError, match="found 5 at position 3"):
        checks.check_values(problem)
    problem = replace(problem, exact_indices=lists_with(3, 2).exact_indices)
    with pytest.raises(ValueError, match="token 0 60 times"):
        checks.check_values(problem)
    monkeypatch.setattr(checks, "capturing", lambda device: True)
    checks.check_values(problem)


@pytest.mark.parametrize("backend", ["operations", "triton"], indirect=True)
def test_lists_and_frames_written_behind_torchs_back_are_followed(backend):
    """By numpy, as by a kernel of the user's own."""
    given, eye = inputs(), torch.eye(4, dtype=torch.uint8) * EXACT
    tiles, other = (lists_of(states, BLOCK, BLOCK, TOKENS, TOKENS) for states in (eye, eye.flip(1)))
    before = attend(*given, tiles, backend=backend)
    tiles.exact_indices.numpy()[:] = [3, 2, 1, 0]
    after = attend(*given, tiles, backend=backend)
    assert not torch.equal(after, before)
    assert torch.equal(after, attend(*given, other, backend=backend))
    decay, tiles = frame_decay(TOKENS, table=(1.0, 0.5)), random_tiles()
    attend(*given, tiles, backend=backend, frame_decay=decay)
    decay.k_frames.numpy()[:] = 0
    fresh = replace(decay, k_frames=torch.zeros_like(decay.k_frames))
    found, expected = (attend(*given, tiles, backend=backend, frame_decay=x) for x in (decay, fresh))
    assert torch.equal(found, expected)


def test_elsewhere_lists_say_that_they_changed(monkeypatch):
    monkeypatch.setattr(cache, "readable", lambda device: False)
    tiles, made = random_tiles(), cache.StorageCache()
    first = made.get(tiles.parts.values(), (), object)
    tiles.exact_indices.numpy()[0] += 1
    assert made.get(tiles.parts.values(), (), object) is first  # what a GPU's own kernels write is not seen
    tiles.changed()
    second = made.get(tiles.parts.values(), (), object)
    assert second is not first
    assert made.get(tiles.parts.values(), (), object) is second


def test_what_a_graph_reads_stays_and_warns_when_its_lists_change(monkeypatch):
    monkeypatch.setattr(cache, "_CAPTURED", {})
    lists, made = torch.arange(5), cache.StorageCache()
    for captures in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(cache, "capturing", lambda device, captures=captures: captures)
            captured = made.get([lists], (), set)
    assert made.get([lists], (), set) is captured
    lists.add_(1)
    with pytest.warns(UserWarning, match=r"CUDA graph.*capture"):
        assert made.get([lists], (), set) is not captured
    with pytest.warns(UserWarning, match=r"CUDA graph.*capture"):
        cache.changed([lists])
    watched = weakref.ref(captured)
    del captured
    assert watched() is not None
    release_captured()
    assert watched() is None
    cache.changed([lists])


def test_a_device_without_streams_has_none(monkeypatch):
    """MPS has no `current_stream`; lists go there all the same."""
    for module, stream in ((SimpleNamespace(), None), (SimpleNamespace(current_stream=lambda device: "one"), "one")):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "get_device_module", lambda device, module=module: module)
            assert cache.current_stream(torch.device("mps")) == stream
    tiles, real = random_tiles(), torch.empty

    def there(*sizes, device=None, **options):
        return real(*sizes, device="meta" if str(device) == "mps" else device, **options)

    if not torch.backends.mps.is_available():
        with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)mps"):  # torch's own words
            tiles.to("mps")
    monkeypatch.setattr(torch, "empty", there)
    assert tiles.to("mps").device.type == "meta"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert [cache.capturing(torch.device(name)) for name in ("cpu", "cuda")] == [False, True]


@pytest.mark.parametrize("backend", ["loop", "operations", "reference", "triton"], indirect=True)
def test_a_mix_of_nothing_takes_nothing_of_a_masked_value(backend):
    q, k, v = inputs()
    tiles, others = random_tiles(), torch.arange(TOKENS) != 7
    v[:, :, 7] = torch.inf
    call = dict(backend=backend, key_mask=others[None])
    plain = attend(q, k, v, tiles, **call)
    for mix, rows in ((torch.zeros(2), None), (torch.tensor([0.0, 0.5]), others)):
        mixed = attend(q, k, v, tiles, identity_mix=mix, identity_rows=rows, **call)
        assert mixed.isfinite().all()
        assert torch.equal(mixed[:, 0], plain[:, 0])
