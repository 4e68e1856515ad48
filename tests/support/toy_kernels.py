"""A small attention-like loop with and without masks: what the compile table must tell apart."""

import triton
import triton.language as tl
from dit_accel_kernels.backends.triton.variants import Variant


@triton.jit
def toy_fwd_kernel(a_ptr, b_ptr, c_ptr, n, BLOCK: tl.constexpr, MASK: tl.constexpr):
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


def variants() -> list[Variant]:
    """Plain, masked, and one that needs more shared memory than the small cards have."""
    signature = {"a_ptr": "*bf16:16", "b_ptr": "*bf16:16", "c_ptr": "*fp32:16", "n": "i32"}
    return [
        Variant(name, toy_fwd_kernel, signature, {"BLOCK": block, "MASK": mask}, warps, stages)
        for name, block, mask, warps, stages in (
            ("toy-plain", 64, False, 4, 2),
            ("toy-masked", 64, True, 4, 2),
            ("toy-large", 128, False, 8, 5),
        )
    ]
