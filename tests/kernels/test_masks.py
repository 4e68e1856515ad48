"""Masks inside tiles: what makes them, against dense attention with the whole mask, and what lies behind them."""

from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from dit_accel_kernels import EXACT, PARTIAL, TileLists, unpack_bits
from dit_accel_kernels.bits import pack_bits
from kernel_cases import attend, lists_of, qkv, random_lists, with_masks
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import and_masks, create_block_mask, create_mask, or_masks
from torch.nn.functional import scaled_dot_product_attention

TOKENS = 100
DOCUMENTS = torch.tensor([0] * 30 + [1] * 45 + [2] * 25)
SLOPES = torch.tensor([[3, 20, 5], [7, 50, 60]])


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def document(b, h, q_idx, kv_idx):
    return DOCUMENTS[q_idx] == DOCUMENTS[kv_idx]


def by_head(b, h, q_idx, kv_idx):
    return q_idx - kv_idx > SLOPES[b, h]


MASK_MODS = {
    "causal": causal,
    "window": lambda b, h, q_idx, kv_idx: (q_idx - kv_idx).abs() <= 9,
    "causal documents": and_masks(causal, document),
    "prefix": or_masks(causal, lambda b, h, q_idx, kv_idx: kv_idx < 21),
    "one key": lambda b, h, q_idx, kv_idx: kv_idx == 50,
    "nothing": lambda b, h, q_idx, kv_idx: kv_idx < 0,
}
SIZES = dict(block_q=16, block_k=24, num_q=TOKENS, num_k=TOKENS)


def dense(tiles: TileLists) -> Tensor:
    """The whole mask that lists stand for, bool [G, S_q, S_k], tile by tile."""
    states, block_q, block_k = tiles.states(), tiles.block_q, tiles.block_k
    seen = torch.zeros(tiles.groups, tiles.query_tiles * block_q, tiles.key_tiles * block_k, dtype=torch.bool)
    masks = None if tiles.mask_bits is None else unpack_bits(tiles.mask_bits, block_k)
    for entry, (g, i, j) in enumerate((states >= EXACT).nonzero().tolist()):
        number = -1 if tiles.mask_ids is None else int(tiles.mask_ids[entry])
        assert (number >= 0) == (int(states[g, i, j]) == PARTIAL)
        tile = seen[g, i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
        tile[:] = True if number < 0 else masks[number]
    return seen[:, : tiles.num_q, : tiles.num_k]


def check_against_dense(tiles: TileLists, mask: Tensor) -> None:
    """Output and gradients of the torch backend beside those of torch's dense attention with a mask, in float64."""
    leaves = [x.requires_grad_() for x in qkv(2, 2, 2, tiles.num_q, tiles.num_k, 8, torch.float64)]
    out = attend(*leaves, tiles, backend="torch")
    expected = scaled_dot_product_attention(*leaves, attn_mask=mask).nan_to_num(0.0)
    torch.testing.assert_close(out, expected)
    seed = torch.randn_like(out).masked_fill(~mask.any(-1, keepdim=True), 0)
    for one, two in zip(*(torch.autograd.grad(x, leaves, seed) for x in (out, expected)), strict=True):
        torch.testing.assert_close(one, two.nan_to_num(0.0))


@pytest.mark.parametrize("name", MASK_MODS)
def test_a_mask_mod_is_exact(name):
    mask = create_mask(MASK_MODS[name], 1, 1, TOKENS, TOKENS, "cpu")
    tiles = TileLists.from_mask_mod(MASK_MODS[name], **SIZES).validate()
    assert torch.equal(dense(tiles), mask[0])
    of_tiles = torch.nn.functional.pad(mask[0], (0, 20, 0, 12)).unflatten(2, (5, 24)).unflatten(1, (7, 16))
    assert torch.equal(tiles.states() > 0, of_tiles.any(-1).any(2))
    check_against_dense(tiles, mask)


def test_a_mask_mod_is_evaluated_by_rows_of_tiles_and_equal_masks_are_kept_once(monkeypatch):
    rows = []
    monkeypatch.setattr(flex, "create_mask", lambda *call: rows.append(call[3:5]) or create_mask(*call))
    TileLists.from_mask_mod(causal, **SIZES)
    assert rows == [(16, TOKENS)] * 6 + [(4, TOKENS)]
    tiles = TileLists.from_mask_mod(causal, block_q=16, block_k=16, num_q=64, num_k=64)
    expected = torch.full((4, 4), EXACT, dtype=torch.uint8).tril() + torch.eye(4, dtype=torch.uint8)
    assert torch.equal(tiles.states()[0], expected)
    assert torch.equal(unpack_bits(tiles.mask_bits, 16), torch.ones(1, 16, 16, dtype=torch.bool).tril())


def test_a_bool_mask_is_exact_with_ragged_tiles():
    mask = torch.rand(2, 2, 50, 70) < 0.2
    mask[..., 20:40, :] = False
    mask[..., 32:48, 48:] = True
    tiles = TileLists.from_mask(mask, block_q=16, block_k=24).validate()
    assert torch.equal(dense(tiles), mask.flatten(0, 1))
    assert tiles.states()[0, 2, 2] == EXACT
    check_against_dense(tiles, mask)
    assert torch.equal(dense(TileLists.from_mask(mask[0], block_q=128, block_k=128)), mask[0])


@pytest.mark.parametrize("sizes", [{}, dict(block_q=24, block_k=16), dict(block_q=128), dict(block_k=7)])
def test_a_block_mask_is_exact_in_tiles_of_any_size(sizes):
    block_mask = create_block_mask(by_head, 2, 3, TOKENS, TOKENS, device="cpu", BLOCK_SIZE=(32, 16))
    tiles = TileLists.from_block_mask(block_mask, **sizes).validate()
    assert (tiles.block_q, tiles.block_k) == (sizes.get("block_q", 32), sizes.get("block_k", 16))
    mask = create_mask(by_head, 2, 3, TOKENS, TOKENS, "cpu").flatten(0, 1)
    assert torch.equal(dense(tiles), mask)
    assert torch.equal(dense(TileLists.from_mask_mod(by_head, batch=2, heads=3, **SIZES)), mask)


def test_what_a_block_mask_lists_decides_as_in_flexattention():
    """Full blocks whatever its mask_mod says of them, partial ones by it, no others."""
    rows = ([1, 0], [[0, 1], [0, 1]], [1, 1], [[1, 0], [0, 1]])
    lists = [torch.tensor(x, dtype=torch.int32)[None, None] for x in rows]
    block_mask = flex.BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=16, mask_mod=causal, seq_lengths=(32, 32))
    expected = torch.zeros(32, 32, dtype=torch.bool)
    expected[:16, :16] = torch.ones(16, 16).tril()
    expected[:16, 16:] = expected[16:, :16] = True
    assert torch.equal(dense(TileLists.from_block_mask(block_mask))[0], expected)


@pytest.mark.parametrize(("groups", "masks"), [(1, 3), (2, 0), (6, 3)])
def test_lists_survive_the_way_to_a_block_mask_and_back(groups, masks):
    tiles = random_lists(groups, 100, 90, 16, 40, pooled=False)
    tiles = with_masks(tiles) if masks else tiles
    assert tiles.mask_table()[1].shape == (masks + 1, 16, 2)  # a power of 2
    block_mask = tiles.to_block_mask(2 if groups > 2 else None)
    assert tuple(block_mask.shape) == (max(1, groups // 2), min(groups, 2), 100, 90)
    mask = create_mask(block_mask.mask_mod, *block_mask.shape, "cpu")
    assert torch.equal(mask.flatten(0, 1), dense(tiles))
    assert torch.equal(dense(TileLists.from_block_mask(block_mask)), dense(tiles))
    whole = (tiles.states() == EXACT).sum(-1, dtype=torch.int32)
    assert torch.equal(block_mask.full_kv_num_blocks.flatten(0, 1), whole)


CU_Q, CU_K = (0, 7, 7, 40, 60), (0, 20, 25, 30, 75)


@pytest.mark.parametrize("cu_k", [CU_Q, CU_K], ids=["self", "cross"])
@pytest.mark.parametrize("limits", [{}, dict(causal=True), dict(window=(0, 2)), dict(causal=True, window=(9, -1))])
def test_packed_sequences_see_themselves_alone(cu_k, limits):
    """Bottom-right aligned, as in flash-attn; a sequence without queries, ones with fewer keys than queries."""
    offsets = torch.tensor(CU_Q, dtype=torch.int32), None if cu_k is CU_Q else torch.tensor(cu_k)
    tiles = TileLists.from_cu_seqlens(*offsets, block_q=16, block_k=24, **limits)
    mask = torch.zeros(CU_Q[-1], cu_k[-1], dtype=torch.bool)
    left, right = limits.get("window", (-1, -1))
    right = 0 if limits.get("causal") else right
    for (q, q_end), (k, k_end) in zip(pairwise(CU_Q), pairwise(cu_k), strict=True):
        ahead = torch.arange(k_end - k) - torch.arange(q_end - q)[:, None] - (k_end - k - q_end + q)
        near = (right < 0) | (ahead <= right)
        mask[q:q_end, k:k_end] = near & ((left < 0) | (ahead >= -left))
    assert torch.equal(dense(tiles.validate())[0], mask)
    check_against_dense(tiles, mask)


def test_masks_that_change_in_place_are_followed():
    tiles = TileLists.from_mask_mod(causal, block_q=16, block_k=16, num_q=40, num_k=40)
    given, tile = qkv(1, 1, 1, 40, 40, 8, torch.float32), torch.arange(40) // 16
    before = attend(*given, tiles, backend="torch")
    tiles.mask_bits.copy_(pack_bits(torch.ones(1, 16, 16, dtype=torch.bool).tril(-1)))
    narrower = attend(*given, tiles, backend="torch")
    mask = (tile[:, None] > tile) | torch.ones(40, 40, dtype=torch.bool).tril(-1)
    torch.testing.assert_close(narrower, scaled_dot_product_attention(*given, attn_mask=mask).nan_to_num(0.0))
    assert not torch.equal(before, narrower)


@pytest.mark.parametrize("pooled", [False, True])
def test_what_a_mask_hides_may_hold_anything(pooled):
    """A key that no row before it sees, in a tile that they do: output and gradients of those rows stay as they are."""
    tiles = TileLists.from_mask_mod(causal, block_q=16, block_k=16, num_q=40, num_k=40)
    if pooled:  # all that is left of the diagonal
        lists = lists_of(torch.ones(3, 3).tril() + torch.eye(3))
        mask = pack_bits(torch.ones(1, 16, 16, dtype=torch.bool).tril())
        tiles = replace(lists, mask_ids=torch.zeros(3, dtype=torch.int32), mask_bits=mask)
    given = qkv(1, 1, 1, 40, 40, 8, torch.float32)

    def run(value: float | None, holders: str = "") -> tuple[Tensor, ...]:
        leaves = [x.clone() for x in given]
        for name in holders:
            leaves["qkv".index(name)][0, 0, 20] = value
        leaves = [x.requires_grad_() for x in leaves]
        out = attend(*leaves, tiles, backend="torch")
        return out.detach(), *torch.autograd.grad(out[:, :, :20].square().sum(), leaves)

    clean, *grads = run(None)
    for value, holders in product((torch.nan, torch.inf, -torch.inf), ("k", "v", "kv")):
        out, *others = run(value, holders)
        assert torch.equal(out[:, :, :20], clean[:, :, :20])
        if holders != "k":  # a key of -inf may weigh nothing
            assert not out[0, 0, 20:].isfinite().all(-1).any()
        assert torch.equal(others[0][:, :, :20], grads[0][:, :, :20])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_key_that_masks_hide_from_all_rows_is_nothing(value):
    tiles = TileLists.from_mask_mod(lambda b, h, q_idx, kv_idx: kv_idx != 20, **SIZES)
    given, results = qkv(1, 1, 1, TOKENS, TOKENS, 8, torch.float32), []
    for hidden in (0.0, value):
        leaves = [x.clone() for x in given]
        for x in leaves[1:]:
            x[0, 0, 20] = hidden
        leaves = [x.requires_grad_() for x in leaves]
        out = attend(*leaves, tiles, backend="torch")
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    assert all(map(torch.equal, *results))
    assert not results[1][2][0, 0, 20].any()
