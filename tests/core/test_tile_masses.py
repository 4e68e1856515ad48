"""Tile masses against dense softmax written out."""

import pytest
import torch
from kernel_cases import assert_within_rounding, qkv

from dit_accel.plan import tile_masses as masses
from dit_accel.plan.tile_masses import tile_masses

WIDE = torch.float64
SIZES = dict(block_q=16, block_k=24)


def written_out(q, k, scale, key_mask=None, order=None):
    """Softmax [B, H, S_q, S_k] and logits, in tiled order, as lists of (block row, tile) slices need them."""
    x = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    if key_mask is not None:
        x = x.masked_fill(~key_mask[:, None, None], -torch.inf)
    x = x if order is None else x[:, :, order][..., order]
    return torch.softmax(x, -1).nan_to_num(0.0), x


def tile_by_tile(values, value_of):
    rows = [
        torch.stack([value_of(values[:, :, i : i + 16], slice(j, j + 24)) for j in range(0, values.shape[3], 24)], -1)
        for i in range(0, values.shape[2], 16)
    ]
    return torch.stack(rows, 2)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("chunk", [1 << 24, 1])
@pytest.mark.parametrize("features", [False, True])
def test_masses_are_those_of_dense_attention(monkeypatch, layout, chunk, features):
    monkeypatch.setattr(masses, "CHUNK", chunk)
    q, k, _ = qkv(2, 4, 2, 70, 70, 8, WIDE)
    arguments = dict(layout=layout, scale=0.7, **SIZES)
    if features:
        mask = torch.rand(2, 70) > 0.3
        order = torch.randperm(70)
        mask[0, order[24:48]] = False  # a whole tile
        arguments |= dict(key_mask=mask, token_order=order)
    p, x = written_out(q, k, 0.7, arguments.get("key_mask"), arguments.get("token_order"))
    given = (q, k) if layout == "bhsd" else (q.transpose(1, 2), k.transpose(1, 2))
    found = tile_masses(*given, **arguments)
    torch.testing.assert_close(found, tile_by_tile(p, lambda rows, j: rows[..., j].sum(-1).mean(-1)))
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 4, 5, dtype=WIDE))
    lse = torch.logsumexp(x, -1)
    if features:
        lse = torch.empty_like(lse).index_copy_(2, order, lse)
    torch.testing.assert_close(tile_masses(*given, row_lse=lse, **arguments), found)


def test_queries_without_a_key_have_no_mass():
    q, k, _ = qkv(1, 2, 2, 20, 20, 8, torch.float32)
    mask = torch.zeros(1, 20, dtype=torch.bool)
    assert torch.equal(tile_masses(q, k, key_mask=mask, layout="bhsd", **SIZES), torch.zeros(1, 2, 2, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_dtypes_stay_within_rounding(dtype):
    q, k, _ = qkv(1, 2, 2, 100, 100, 32, dtype)
    p, _ = written_out(q.to(WIDE), k.to(WIDE), 32**-0.5)
    truth = tile_by_tile(p, lambda rows, j: rows[..., j].sum(-1).mean(-1))
    own, _ = written_out(q, k, 32**-0.5)
    own = tile_by_tile(own, lambda rows, j: rows[..., j].sum(-1).mean(-1))
    found = tile_masses(q, k, layout="bhsd", **SIZES)
    assert found.dtype == torch.float32
    assert_within_rounding(found, own, truth, dtype)


def test_no_gradient_and_linear_memory():
    q, k, _ = qkv(1, 1, 1, 8192, 8192, 8, torch.float32)
    q.requires_grad_()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = tile_masses(q, k, layout="bhsd", block_q=128, block_k=128)
    assert not found.requires_grad
    assert max(event.cpu_memory_usage for event in profile.events()) <= 4 * masses.CHUNK < 8192 * 8192 * 4


ERRORS = [
    (dict(layout="bsd"), r"layout.*'bshd'.*'bhsd', found 'bsd'"),
    (dict(key_mask=torch.ones(1, 20, dtype=torch.bool)), r"key_mask.*\[1, 30\].*found \[1, 20\]"),
    (dict(row_lse=torch.ones(1, 2, 30)), r"row_lse.*\[1, 2, 20\].*found \[1, 2, 30\]"),
    (dict(token_order=torch.arange(20)), r"token_order.*S_q = S_k, found 20 queries and 30 keys"),
]


@pytest.mark.parametrize(("arguments", "text"), ERRORS, ids=[e[1][:12] for e in ERRORS])
def test_errors(arguments, text):
    q, k, _ = qkv(1, 2, 1, 20, 30, 8, torch.float32)
    with pytest.raises(ValueError, match=text):
        tile_masses(q, k, **{"layout": "bhsd", **SIZES, **arguments})


def test_error_of_keys_that_do_not_fit():
    q, k, _ = qkv(1, 2, 2, 20, 30, 8, torch.float32)
    with pytest.raises(ValueError, match=r"q \[1, 2, 20, 8\] and k \[1, 2, 30, 4\]"):
        tile_masses(q, k[..., :4], layout="bhsd", **SIZES)
