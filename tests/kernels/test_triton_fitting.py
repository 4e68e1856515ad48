"""A launch that a card has too little for ends with its row of the launch table, not the driver's words."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

from functools import partial

import pytest
import torch
from dit_accel_kernels import (
    POOLED,
    BackendUnavailableError,
    TileLists,
    block_sparse_attention,
    block_sparse_attention_backward,
)
from dit_accel_kernels.backends.triton import attend, backward
from kernel_cases import qkv
from triton.runtime.errors import OutOfResources

MASK = torch.ones(1, 40, dtype=torch.bool)


class TooLarge:
    """A kernel of which no launch fits."""

    def __getitem__(self, grid):
        def launch(*given, **options):
            raise OutOfResources(102400, 101376, "shared memory")

        return launch


@pytest.mark.parametrize(
    ("module", "kernel", "row"),
    [
        (attend, "_fwd_kernel", "arch '', kind 'fp32', dim 256, tile 128, kernel 'fwd', feature ''"),
        (backward, "_dq_kernel", "arch '', kind 'fp32', dim 256, tile 128, kernel 'dq', feature ''"),
        (backward, "_pooled_dkdv_kernel", "arch '', kind 'fp32', dim 256, tile 128, kernel 'pooled', feature ''"),
        (backward, "_dkdv_kernel", "arch '', kind 'fp32', dim 256, tile 128, kernel 'dkdv', feature ''"),
    ],
)
def test_a_launch_that_does_not_fit_names_its_row(monkeypatch, module, kernel, row):
    monkeypatch.setattr(module, kernel, TooLarge())
    q, k, v = qkv(1, 1, 1, 40, 40, 192, torch.float32)
    tiles = TileLists.from_states(
        torch.tensor([[2, POOLED, 2], [2, 2, POOLED], [POOLED, 2, 2]], dtype=torch.uint8),
        block_q=16, block_k=16, num_q=40, num_k=40,
    )  # fmt: skip
    needed = rf"'triton' .*102400 of.*launch_table\.json with {row} \(found 101376 on cpu\).*'torch'"
    arguments = dict(layout="bhsd", key_mask=MASK, backend="triton")
    run = block_sparse_attention if module is attend else partial(block_sparse_attention_backward, q)
    with pytest.raises(BackendUnavailableError, match=needed):
        run(q, k, v, tiles, **arguments)
