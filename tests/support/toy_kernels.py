"""A small attention-like loop with and without masks: what the compile table must tell apart."""

import torch
import triton
import triton.language as tl
from recorded import Recorded, recording


@triton.jit
def toy_kernel(a_ptr, b_ptr, c_ptr, n, BLOCK: tl.constexpr, MASK: tl.constexpr):
    """C = sum over tiles of exp2(A B) B, with the rows beyond n masked or not."""
    i = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + i[:, None] * BLOCK + i[None, :])
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for tile in range(0, n):
        tile_ptr = b_ptr + tile * BLOCK * BLOCK + i[:, None] * BLOCK + i[None, :]
        if MASK:  # noqa: SIM108
            b = tl.load(tile_ptr, mask=(tile * BLOCK + i < n)[:, None], other=0.0)
        else:
            b = tl.load(tile_ptr)
        s = tl.dot(a, b)
        if MASK:
            s = tl.where((tile * BLOCK + i < n)[None, :], s, float("-inf"))
        acc = tl.dot(tl.exp2(s).to(a.dtype), b, acc)
    tl.store(c_ptr + i[:, None] * BLOCK + i[None, :], acc)


def record_cases(target: str, into: dict[str, Recorded]) -> None:
    """Plain, masked, and one that needs more shared memory than the small cards have."""
    for name, block, mask, warps, stages in (
        ("plain", 64, False, 4, 2),
        ("masked", 64, True, 4, 2),
        ("large", 128, False, 8, 5),
    ):
        a, b, c = torch.empty(3, block, block, dtype=torch.bfloat16)
        with recording(target, into, name):
            toy_kernel[(1,)](a, b, c.float(), 17, BLOCK=block, MASK=mask, num_warps=warps, num_stages=stages)
