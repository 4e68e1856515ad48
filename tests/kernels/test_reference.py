"""The specification and the torch backend against formulas written out, and the identities of pooled tiles."""

import math

import pytest
import torch
from dit_accel_kernels import EXACT, POOLED, FrameDecay, TileLists, block_sparse_attention
from kernel_cases import qkv, random_lists
from torch.nn.functional import scaled_dot_product_attention

BOTH = pytest.mark.parametrize("backend", ["reference", "torch"])
WIDE = torch.float64


def _uniform(value: int, num_q: int, num_k: int, block: int) -> TileLists:
    states = torch.full((-(-num_q // block), -(-num_k // block)), value, dtype=torch.uint8)
    return TileLists.from_states(states, block_q=block, block_k=block, num_q=num_q, num_k=num_k)


@BOTH
def test_all_exact_is_dense(backend):
    q, k, v = qkv(2, 4, 2, 100, 63, 16, WIDE)
    out, lse = block_sparse_attention(
        q, k, v, TileLists.full(100, 63, block_q=32, block_k=16), layout="bhsd", return_lse=True, backend=backend
    )
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, enable_gqa=True))
    torch.testing.assert_close(lse, torch.logsumexp(q @ k.repeat_interleave(2, 1).mT / 4, -1))


@BOTH
@pytest.mark.parametrize("num_k", [64, 63, 70])
def test_pooled_everywhere_is_dense_where_tiles_are_constant(backend, num_k):
    """Also that a ragged tail weighs its true length: a wrong length would shift both output and LSE."""
    q, k, v = qkv(1, 2, 2, 50, -(-num_k // 16), 8, WIDE)
    k, v = (x.repeat_interleave(16, 2)[:, :, :num_k] for x in (k, v))
    out, lse = block_sparse_attention(
        q, k, v, _uniform(POOLED, 50, num_k, 16), layout="bhsd", return_lse=True, backend=backend
    )
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(lse, torch.logsumexp(q @ k.mT / math.sqrt(8), -1))


@BOTH
def test_pooled_tile_follows_the_formula(backend):
    """numerator += e^S sum(V), denominator += e^S len, written out for an exact and a ragged pooled tile."""
    q, k, v = qkv(1, 1, 1, 4, 7, 8, WIDE)
    states = torch.tensor([[EXACT, POOLED]], dtype=torch.uint8)
    tiles = TileLists.from_states(states, block_q=4, block_k=4, num_q=4, num_k=7)
    out, lse = block_sparse_attention(q, k, v, tiles, layout="bhsd", scale=0.5, return_lse=True, backend=backend)
    e_exact = (0.5 * q @ k[:, :, :4].mT).exp()
    e_pooled = (0.5 * q @ k[:, :, 4:].mean(2, keepdim=True).mT).exp()
    denominator = e_exact.sum(-1, keepdim=True) + 3 * e_pooled
    expected = (e_exact @ v[:, :, :4] + e_pooled * v[:, :, 4:].sum(2, keepdim=True)) / denominator
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, denominator.log()[..., 0])


@BOTH
def test_invalid_keys_leave_pools_and_hold_anything(backend):
    q, k, v = qkv(2, 2, 2, 20, 30, 8, WIDE)
    tiles = random_lists(1, 20, 30, 8, 8)
    mask = torch.rand(2, 30) > 0.4
    mask[:, 8:16] = False
    arguments = dict(layout="bhsd", key_mask=mask, return_lse=True, backend=backend)
    expected = block_sparse_attention(q, k, v, tiles, **arguments)
    for junk in (1e6, torch.nan, torch.inf):
        dirty = [x.masked_fill(~mask[:, None, :, None], junk) for x in (k, v)]
        for a, b in zip(block_sparse_attention(q, *dirty, tiles, **arguments), expected, strict=True):
            assert torch.equal(a, b)
    pooled = _uniform(POOLED, 20, 30, 8)
    out = block_sparse_attention(q, k, v, pooled, layout="bhsd", key_mask=mask, backend=backend)
    weight = mask.to(WIDE)[:, None, :, None]
    counts = torch.stack([weight[:, :, i : i + 8].sum(2) for i in range(0, 30, 8)], 2)
    means, sums = (torch.stack([(x * weight)[:, :, i : i + 8].sum(2) for i in range(0, 30, 8)], 2) for x in (k, v))
    e = (q @ (means / counts.clamp(min=1)).mT / math.sqrt(8)).exp() * (counts.mT > 0)
    torch.testing.assert_close(out, (e @ sums) / (e @ counts))


@BOTH
def test_rows_without_keys_give_zero_and_minus_infinity(backend):
    q, k, v = qkv(2, 2, 2, 20, 30, 8, torch.float32)
    tiles = random_lists(1, 20, 30, 8, 8)
    out, lse = block_sparse_attention(q, k, v, tiles, layout="bhsd", return_lse=True, backend=backend)
    assert out[:, :, :8].abs().max() == 0
    assert (lse[:, :, :8] == -torch.inf).all()
    assert lse[:, :, 8:].isfinite().all()
    out, lse = block_sparse_attention(
        q, k, v, tiles, layout="bhsd", key_length=torch.tensor([30, 0]), return_lse=True, backend=backend
    )
    assert out[1].abs().max() == 0
    assert (lse[1] == -torch.inf).all()
    assert out.isfinite().all()


@BOTH
def test_disjoint_lists_merge_by_lse(backend):
    """Splitting a list in two and merging by LSE gives the whole; it holds only if the LSE counts pooled mass."""
    q, k, v = qkv(1, 2, 2, 40, 40, 8, WIDE)
    states = torch.randint(1, 3, (1, 5, 5), dtype=torch.uint8)
    first = torch.rand(1, 5, 5) < 0.5
    first[..., 0], first[..., 1] = True, False
    sizes = dict(block_q=8, block_k=8, num_q=40, num_k=40)
    whole, lse = block_sparse_attention(
        q, k, v, TileLists.from_states(states, **sizes), layout="bhsd", return_lse=True, backend=backend
    )
    parts = [
        block_sparse_attention(
            q, k, v, TileLists.from_states(states * keep, **sizes), layout="bhsd", return_lse=True, backend=backend
        )
        for keep in (first, ~first)
    ]
    total = torch.logaddexp(parts[0][1], parts[1][1])
    torch.testing.assert_close(total, lse)
    merged = sum(out * (part - total).exp()[..., None] for out, part in parts)
    torch.testing.assert_close(merged, whole)


@BOTH
def test_decay_is_the_minimum_rule(backend):
    q, k, v = qkv(1, 2, 2, 24, 24, 8, WIDE)
    frames = torch.tensor([-1] * 4 + [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5, dtype=torch.int32)
    decay = FrameDecay(table=torch.tensor([1.0, 0.5, 0.25]), q_frames=frames, k_frames=frames)
    out = block_sparse_attention(
        q, k, v, TileLists.full(24, 24, block_q=8, block_k=8), layout="bhsd", frame_decay=decay, backend=backend
    )
    x = q @ k.mT / math.sqrt(8)
    for i in range(24):
        for j in range(24):
            if frames[i] >= 0 and frames[j] >= 0:
                t = (1.0, 0.5, 0.25, 0.25)[abs(int(frames[i] - frames[j]))]
                x[..., i, j] = torch.where(x[..., i, j] > 0, t * x[..., i, j], x[..., i, j])
    torch.testing.assert_close(out, torch.softmax(x, -1) @ v)


@BOTH
def test_decay_of_a_pooled_tile_is_the_mean_over_its_tokens(backend):
    q, k, v = qkv(1, 1, 1, 4, 8, 8, WIDE)
    q, k = q.abs(), k.abs()
    decay = FrameDecay(
        table=torch.tensor([1.0, 0.5]),
        q_frames=torch.zeros(4, dtype=torch.int32),
        k_frames=torch.tensor([0, 1, 1, 1, 1, 1, 1, 1], dtype=torch.int32),
    )
    _, lse = block_sparse_attention(
        q, k, v, _uniform(POOLED, 4, 8, 4), layout="bhsd", frame_decay=decay, return_lse=True, backend=backend
    )
    x = q @ k.unflatten(2, (2, 4)).mean(3).mT / math.sqrt(8) * torch.tensor([0.625, 0.5], dtype=WIDE)
    torch.testing.assert_close(lse, torch.logsumexp(x + math.log(4), -1))


@BOTH
def test_token_order_is_a_permuted_call(backend):
    q, k, v = qkv(2, 2, 2, 30, 30, 8, WIDE)
    tiles, order = random_lists(1, 30, 30, 8, 8), torch.randperm(30)
    frames = torch.arange(30, dtype=torch.int32) // 7 - 1
    mask = torch.rand(2, 30) > 0.3
    table = torch.tensor([1.0, 0.7, 0.4])
    found, lse = block_sparse_attention(
        q, k, v, tiles, layout="bhsd", token_order=order, key_mask=mask, return_lse=True, backend=backend,
        frame_decay=FrameDecay(table=table, q_frames=frames, k_frames=frames),
    )  # fmt: skip
    expected, expected_lse = block_sparse_attention(
        q[:, :, order], k[:, :, order], v[:, :, order], tiles, layout="bhsd", key_mask=mask[:, order], return_lse=True,
        backend=backend, frame_decay=FrameDecay(table=table, q_frames=frames[order], k_frames=frames[order]),
    )  # fmt: skip
    torch.testing.assert_close(found[:, :, order], expected)
    torch.testing.assert_close(lse[:, :, order], expected_lse)


@BOTH
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_identity_mix(backend, layout):
    q, k, v = qkv(2, 4, 2, 30, 30, 8, WIDE, layout)
    tiles, rows = random_lists(1, 30, 30, 8, 8), torch.rand(30) > 0.5
    weight = torch.tensor([0.0, 1.0, 0.25, 0.5])
    plain, lse = block_sparse_attention(q, k, v, tiles, layout=layout, return_lse=True, backend=backend)
    mixed, mixed_lse = block_sparse_attention(
        q, k, v, tiles, layout=layout, identity_mix=weight, identity_rows=rows, return_lse=True, backend=backend
    )
    heads_first = [x if layout == "bhsd" else x.transpose(1, 2) for x in (plain, mixed, v)]
    plain, mixed, v = heads_first
    values = v.repeat_interleave(2, 1)
    w = (weight[:, None] * rows)[..., None]
    torch.testing.assert_close(mixed, (1 - w) * plain + w * values)
    assert torch.equal(mixed[:, 0], plain[:, 0])
    assert torch.equal(mixed[:, 1, rows], values[:, 1, rows])
    assert torch.equal(mixed[:, :, ~rows], plain[:, :, ~rows])
    assert torch.equal(mixed_lse, lse)
