"""Masks as models pass them: what is read as key validity, what is refused."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dit_accel import ConfigError
from dit_accel.plan.call import Call
from dit_accel.plan.masks import HIDDEN, key_validity, visible_row

KEYS = torch.tensor([[True, False, True, True, False, True], [True, True, True, False, True, False]])
QUERIES = torch.tensor([[True, True, False, True], [True, False, True, True]])
PAIRS = QUERIES[:, None, :, None] & KEYS[:, None, None]


def additive(mask, hidden=HIDDEN):
    return torch.zeros(mask.shape).masked_fill(~mask, hidden)


def test_key_validity_is_read_off_every_form():
    for mask in (
        KEYS,
        KEYS[:, None, None],
        KEYS[:, None, None].expand(2, 3, 4, 6),
        PAIRS,
        PAIRS.expand(2, 3, 4, 6),
        additive(KEYS[:, None, None]),
        additive(KEYS[:, None, None].expand(2, 3, 1, 6), -torch.inf),
        additive(KEYS[:, None, None].expand(2, 3, 1, 6), torch.finfo(torch.float16).min).half(),
        additive(PAIRS),
    ):
        assert torch.equal(key_validity(mask, 2, 4, 6), KEYS)


@pytest.mark.parametrize("mask", [KEYS[:, None, None].clone(), PAIRS.clone(), additive(KEYS[:, None, None])])
def test_the_same_mask_gives_the_same_memory_until_it_is_written_to(mask):
    """So that the kernels find the plan that they made of it for another layer."""
    first, second = (key_validity(mask, 2, 4, 6).untyped_storage() for _ in range(2))
    assert first is second
    changed = torch.ones_like(mask) if mask.dtype == torch.bool else torch.zeros_like(mask)
    mask.copy_(changed)
    assert key_validity(mask, 2, 4, 6).all()


def test_one_row_serves_the_whole_batch_and_valid_queries_see_what_dense_attention_lets_them_see():
    for mask in (KEYS[:1, None, None], PAIRS[:1]):
        assert torch.equal(key_validity(mask, 3, 4, 6), KEYS[:1].expand(3, 6))
    q, k, v = torch.randn(2, 1, 4, 8), *torch.randn(2, 2, 1, 6, 8)
    dense = F.scaled_dot_product_attention(q, k, v, PAIRS)
    ours = F.scaled_dot_product_attention(q, k, v, key_validity(PAIRS, 2, 4, 6)[:, None, None])
    assert torch.equal(dense[:, 0][QUERIES], ours[:, 0][QUERIES])


def test_a_visible_query_tells_the_keys_of_an_outer_product():
    for query in (0, 3):
        row = visible_row(PAIRS, query)
        assert row.shape == (2, 1, 1, 6)
        assert torch.equal(key_validity(row, 2, 4, 6), KEYS)
    assert visible_row(None, 0) is None
    for mask in (KEYS, KEYS[:, None, None], additive(PAIRS)):
        assert visible_row(mask, 0) is mask


def test_other_masks_are_refused():
    for mask, message in (
        (torch.ones(4, 6, dtype=torch.bool).tril()[None, None], r"bool \[1, 1, 4, 6\].*pairs"),
        (torch.stack([PAIRS, ~PAIRS], 1)[:, :, 0], r"bool \[2, 2, 4, 6\].*pairs"),
        (PAIRS.float(), r"torch.float32 \[2, 1, 4, 6\].*biases.*0 and -10000"),
        (KEYS.long(), r"torch.int64 \[2, 6\]"),
        (PAIRS[:, 0], r"torch.bool \[2, 4, 6\];"),
        (PAIRS[..., :5], r"torch.bool \[2, 1, 4, 5\];"),
    ):
        with pytest.raises(ConfigError, match=message):
            key_validity(mask, 2, 4, 6)


def test_sizes_are_read_off_tensors_with_heads_first():
    q, k = torch.zeros(2, 3, 4, 8), torch.zeros(2, 1, 6, 8)
    call = Call(q=q, k=k, v=k, mask=PAIRS)
    assert torch.equal(call.key_mask(), KEYS)
    assert call.hides_keys
    assert replace(call, mask=None).hides_keys
    assert not replace(call, mask=PAIRS.float()).hides_keys
    assert not replace(call, q=q.transpose(1, 2), k=k.transpose(1, 2)).hides_keys
