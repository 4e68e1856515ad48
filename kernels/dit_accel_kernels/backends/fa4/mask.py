"""Which logits of a partial block count, as FlashAttention-4's `mask_mod`: compiled by CuTe, and plain Python as well.

It is imported by the first call that needs it, since it needs flash-attn-4.
"""

# CuTe's compiler reads this file; its packages are there only where the extra is installed:
# pyright: reportMissingImports=false

import cutlass
import cutlass.cute as cute
from flash_attn.cute import utils

from dit_accel_kernels.backends.fa4.support import TILE

WORD = 32 * TILE  # keys of a word of bits


def mask_of(block_q: int):
    """The mask of calls with tiles of so many queries; one function each, since kernels are remembered by it.

    It reads `seen`, int32 [B, H, NQ, W], the tiles of a row as bits, and `valid`, uint8 [B, S_k].
    """
    return _MASKS[block_q]


def _mask(block_q):
    @cute.jit
    def seen_and_valid(batch, head, query, key, sizes, aux_tensors):
        seen, valid = aux_tensors[0], aux_tensors[1]
        b, h, i, j = batch[0], head[0], query[0], key[0]
        word = seen[b, h, i // block_q, j // WORD]
        keep = ((word >> (j % WORD // TILE)) & 1) * valid[b, j]
        return utils.scalar_to_ssa(keep != 0, cutlass.Boolean)

    return seen_and_valid


_MASKS = {TILE: _mask(TILE), 2 * TILE: _mask(2 * TILE)}
