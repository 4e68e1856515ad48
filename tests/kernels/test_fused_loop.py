"""The compiled loop of the torch backend: sizes that it cuts differently, its threads, and what is no number."""

import multiprocessing
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
from dit_accel_kernels import Selection, TileLists, Vote
from dit_accel_kernels.backends.torch import attend as torch_attend
from dit_accel_kernels.backends.torch import compiled, fused, memory, tiled
from dit_accel_kernels.features import product_dtype
from kernel_cases import Call, attend, check_against_reference, frame_decay, full, lists_of, qkv, random_lists
from torch.nn.functional import scaled_dot_product_attention

pytestmark = pytest.mark.skipif(compiled.compiled_loop().library is None, reason="no C++ compiler is here")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
CRITERIA = [Vote(), Vote(criterion="mass", threshold=0.02), Vote(criterion="budget", threshold=0.1)]


@pytest.mark.sample
@DTYPES
@pytest.mark.parametrize("dim", [5, 40, 96])
@pytest.mark.parametrize("blocks", [(7, 640), (13, 101), (64, 33)])
def test_chunks_panels_and_rows_of_every_length(dim, blocks, dtype, monkeypatch):
    """More columns than are kept at a time in one tile, in several, and of pooled ones; every feature; pairs."""
    taken, real = [], fused.attend_by_loop
    monkeypatch.setattr(fused, "attend_by_loop", lambda *a, **k: taken.append(1) or real(*a, **k))
    call = Call(batch=2, heads=4, key_heads=2, num_q=150, num_k=1400, dim=dim, dtype=dtype, blocks=blocks, groups=4)
    hidden = replace(call, features="pooled inside mask decay heads", value_dim=7)
    for each in (call, hidden, replace(call, layout="bshd", features="pooled mask")):
        check_against_reference(*each.tensors(), each.lists(), **each.arguments())
    assert taken


def test_long_rows_round_no_more_than_a_tile():
    """Equal weights, so that what is left is how 16,384 values are summed up; one running sum errs by 16 steps."""
    tokens, eps = 16384, torch.finfo(torch.float32).eps
    q, k, v = torch.zeros(1, 1, 64, 32), torch.zeros(1, 1, tokens, 32), torch.rand(1, 1, tokens, 32)
    out = attend(q, k, v, full(64, tokens, 64), backend="torch")
    assert float((out - v.double().mean(2, keepdim=True)).abs().max()) <= 3 * eps


@pytest.fixture
def narrow(monkeypatch):
    """A processor without products of bfloat16 and float16."""
    with monkeypatch.context() as patch:
        for name in ("_is_avx512_bf16_supported", "_is_amx_fp16_supported"):
            patch.setattr(torch.cpu, name, lambda: False)
        product_dtype.cache_clear()
        yield
    product_dtype.cache_clear()


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("dim", [5, 40])
def test_narrow_tensors_go_in_and_out_and_nothing_else_is_rounded(dim, layout, dtype):
    """Every feature, ragged tails, padded panels, a value that is not a number."""
    q, k, v = qkv(2, 2, 1, 150, 470, dim, dtype, layout)
    v[0, 0, 0, 0] = torch.nan
    mask = torch.rand(2, 470) > 0.3
    mask[0, 0] = True
    options = dict(head_scale=torch.tensor([0.5, 2.0]), key_mask=mask, frame_decay=frame_decay(150, 470, 90))
    for pooled, chosen in ((False, {}), (True, {}), (True, options), (False, dict(selection=Selection(vote=Vote())))):
        call = dict(tiles=random_lists(2, 150, 470, 13, 40, pooled=pooled), layout=layout, return_lse=True, **chosen)
        found, expected = (attend(*x, backend="torch", **call) for x in ((q, k, v), (q.float(), k.float(), v.float())))
        assert found[0].dtype == dtype
        torch.testing.assert_close(found[0], expected[0].to(dtype), rtol=0, atol=0, equal_nan=True)
        assert found[0].isnan().any()
        assert all(map(torch.equal, found[1:], expected[1:]))


@pytest.mark.usefixtures("narrow")
def test_bfloat16_is_read_where_it_lies(monkeypatch):
    """No tensor of the call is widened whole, and the loop writes the output as it is wanted."""
    casts = []
    monkeypatch.setattr(tiled, "cast", lambda x, dtype: casts.append(dtype) or x.to(dtype))
    monkeypatch.setattr(torch_attend, "cast", lambda x, dtype: casts.append(x.dtype) or x.to(dtype))
    tiles = random_lists(1, 100, 100, 16, 16, pooled=False)
    attend(*qkv(1, 2, 2, 100, 100, 16, torch.bfloat16), tiles, backend="torch")
    assert casts == []


def test_more_pooled_tiles_than_are_kept_at_a_time():
    states = torch.ones(3, 700)
    states[1] = 0
    states[:, ::50] = 2
    tiles = lists_of(states, 16, 2, 40, 1400)
    check_against_reference(*qkv(1, 2, 2, 40, 1400, 16, torch.float32), tiles, layout="bhsd")


@pytest.mark.parametrize("vote", CRITERIA, ids=lambda vote: vote.criterion)
def test_votes_over_several_chunks_are_those_of_the_operations(vote, monkeypatch):
    """Largest logits rise from chunk to chunk, so that sums so far must be brought down; in one run or in many."""
    q, k, v = qkv(1, 2, 2, 300, 1400, 16, torch.float32)
    call = (q, k * torch.linspace(0.2, 3, 1400)[:, None], v, random_lists(1, 300, 1400, 64, 40))
    options = dict(backend="torch", selection=Selection(vote=vote), return_lse=True)
    by_loop = [attend(*call, **options)]
    monkeypatch.setattr(fused, "VOTE_BYTES", 4 * 64 * 20)
    by_loop.append(attend(*call, **options))
    monkeypatch.setattr(fused, "compiled_loop", lambda: compiled.Loop(None, "left out"))
    by_operations = attend(*call, **options)
    for results in by_loop:
        torch.testing.assert_close(results[:2], by_operations[:2], rtol=1e-5, atol=1e-6)
        assert torch.equal(results[2], by_operations[2])


@pytest.fixture
def threads():
    """Sets how many threads there are, and puts the number back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@DTYPES
@pytest.mark.parametrize("own", [True, False])
def test_threads_share_a_call_and_change_no_bit(monkeypatch, threads, dtype, own):
    """Torch's threads, or the loop's own where torch keeps none that it may use."""
    if own:
        monkeypatch.setattr(compiled, "torchs_threads", lambda: None)
    call = (*qkv(1, 3, 3, 500, 500, 32, dtype), random_lists(3, 500, 500, 16, 16))
    alone = attend(*call, backend="torch")
    monkeypatch.setattr(fused, "START_FLOPS", 1e-3)
    monkeypatch.setattr(fused, "SLICE", 0.0)  # comes back to Python after every piece of a thread
    for count in (2, 16, 64):
        threads(count)
        assert torch.equal(alone, attend(*call, backend="torch"))


def test_a_call_gets_the_threads_that_it_is_worth_whatever_the_machine_has(monkeypatch):
    for flops, count in ((1e6, 1), (2e6, 2), (8e6, 4), (1.28e8, 16), (5e9, 100)):
        for there in (1, 2, 64, 200):
            monkeypatch.setattr(torch, "get_num_threads", lambda there=there: there)
            assert fused._threads(flops) == min(there, count)


def test_an_interrupt_ends_a_long_call(threads):
    """As Ctrl-C does it; the threads are gone then, and the next call runs."""
    threads(2)
    call = (*qkv(1, 40, 40, 16384, 16384, 16, torch.bfloat16), full(16384, 16384, 64))  # many seconds
    main, running = threading.get_ident(), threading.active_count()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer, began = threading.Timer(0.1, lambda: signal.pthread_kill(main, signal.SIGINT)), time.monotonic()
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            attend(*call, backend="torch")
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 10 * fused.SLICE
    assert threading.active_count() == running


def _in_child(queue, call):
    torch.set_num_threads(2)
    queue.put(attend(*call, backend="torch").sum().item())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own(monkeypatch, threads):
    monkeypatch.setattr(fused, "START_FLOPS", 1e-3)
    threads(2)
    call = (*qkv(1, 2, 2, 100, 100, 16, torch.float32), random_lists(1, 100, 100, 16, 16, pooled=False))
    expected = attend(*call, backend="torch").sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, call))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join()


def test_without_pairs_bfloat16_is_multiplied_in_float32(monkeypatch):
    """By a compiler that knows no products of pairs, whatever the processor has."""
    cpu, tiles = torch.device("cpu"), random_lists(1, 100, 100, 16, 16)
    for name, has in (("_is_avx512_bf16_supported", True), ("_is_amx_fp16_supported", False)):
        monkeypatch.setattr(torch.cpu, name, lambda has=has: has)
    product_dtype.cache_clear()
    monkeypatch.setattr(compiled.compiled_loop().library, "has_pairs", lambda: 0)
    q, k, v = qkv(1, 2, 2, 100, 100, 16, torch.bfloat16)
    out, wide = attend(q, k, v, tiles, backend="torch"), attend(q.float(), k.float(), v.float(), tiles, backend="torch")
    assert torch.equal(out, wide.bfloat16())
    assert fused.way(cpu, torch.bfloat16) == f"loop {compiled.compiled_loop().why}"
    product_dtype.cache_clear()


@pytest.mark.parametrize("size", [1, 4])
def test_bfloat16_errs_no_more_than_dense_attention(size):
    """Root mean squares, at logits of one size and of sixteen times it, which weights of few tokens come from."""
    q, k, v = qkv(1, 2, 2, 300, 500, 64, torch.float32)
    q, k, v = (x.bfloat16() for x in (q * size, k * size, v))
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
    found = attend(q, k, v, full(300, 500, 64, 96), backend="torch"), scaled_dot_product_attention(q, k, v)
    loop, dense = ((x.double() - exact).square().mean().sqrt() for x in found)
    assert loop <= 1.05 * max(dense, 1.4e-3 * exact.square().mean().sqrt())


def test_large_tensors_ask_for_large_pages_that_are_all_their_own(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "_madvise", lambda: lambda first, size, what: asked.append((first.value, size.value)))
    small, large = memory.fresh((100, 7), torch.float16), memory.fresh((3, 1 << 20), torch.float32)
    assert (small.shape, small.dtype) == ((100, 7), torch.float16)
    assert (large.shape, large.dtype) == ((3, 1 << 20), torch.float32)
    ((first, size),) = asked
    assert first % 4096 == size % 4096 == 0
    assert large.data_ptr() <= first < first + size <= large.data_ptr() + large.nbytes
    assert large.nbytes - size < 2 * 4096
    monkeypatch.setattr(memory, "_madvise", lambda: None)  # a system without it
    x = torch.randn(1, 2, 3000, 512).transpose(1, 2)
    assert torch.equal(memory.cast(x, torch.bfloat16), x.to(torch.bfloat16))
    assert memory.cast(x, torch.float32) is x


@DTYPES
def test_what_is_no_number_reaches_the_rows_that_see_it_alone(dtype):
    """Of either half of a pair; behind a key mask it reaches none."""
    q, k, clean_v = qkv(1, 2, 1, 50, 50, 16, dtype)
    tiles = TileLists.from_mask(torch.ones(50, 50, dtype=torch.bool).tril(), block_q=16, block_k=8)
    clean = attend(q, k, clean_v, tiles, backend="torch")
    for key, value in ((20, torch.nan), (33, torch.nan), (20, -torch.inf), (33, -torch.inf)):
        v = clean_v.clone()
        v[:, :, key, 3] = value
        out = attend(q, k, v, tiles, backend="torch")
        assert torch.equal(out[:, :, :key], clean[:, :, :key])
        assert not out[:, :, key:, 3].isfinite().any()
        assert torch.equal(out[..., 4:], clean[..., 4:])
        others = (torch.arange(50) != key)[None]
        assert attend(q, k, v, tiles, key_mask=others, backend="torch").isfinite().all()
