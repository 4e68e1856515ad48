"""What the specification says of whole lists and of lists in parts; of drawn calls test_fuzz.py asks numpy."""

import pytest
import torch
from dit_accel_kernels import TileLists, block_sparse_attention
from kernel_cases import qkv
from torch.nn.functional import scaled_dot_product_attention

BOTH = pytest.mark.parametrize("backend", ["reference", "torch"])
WIDE = torch.float64


@BOTH
def test_all_exact_is_dense(backend):
    q, k, v = qkv(2, 4, 2, 100, 63, 16, WIDE)
    out, lse = block_sparse_attention(
        q, k, v, TileLists.full(100, 63, block_q=32, block_k=16), layout="bhsd", return_lse=True, backend=backend
    )
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, enable_gqa=True))
    torch.testing.assert_close(lse, torch.logsumexp(q @ k.repeat_interleave(2, 1).mT / 4, -1))


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
