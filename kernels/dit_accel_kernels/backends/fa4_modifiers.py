"""FlashAttention-4's functions of single logits: compiled by CuTe, and plain Python as well.

`mask_mod` tells which logits of a partial block count, `score_mod` applies scales of heads and frame decay.
It is imported by the first call that needs it, since it needs flash-attn-4.
"""

# CuTe's compiler reads this file; its packages are there only where the extra is installed:
# pyright: reportMissingImports=false

import cutlass
import cutlass.cute as cute
from flash_attn.cute import utils

from .fa4 import TILE

WORD = 32 * TILE  # keys of a word of bits


def _mask(block_q):
    """The mask of tiles of so many queries, of `seen`, bits int32 [B, H, NQ, W], and `valid`, uint8 [B, S_k]."""

    @cute.jit
    def seen_and_valid(batch, head, query, key, sizes, aux_tensors):
        seen, valid = aux_tensors[0], aux_tensors[1]
        b, h, i, j = batch[0], head[0], query[0], key[0]
        word = seen[b, h, i // block_q, j // WORD]
        keep = ((word >> (j % WORD // TILE)) & 1) * valid[b, j]
        return utils.scalar_to_ssa(keep != 0, cutlass.Boolean)

    return seen_and_valid


MASKS = {TILE: _mask(TILE), 2 * TILE: _mask(2 * TILE)}  # by queries of a tile; kernels are remembered by the function


@cute.jit
def scaled(score, batch_idx, head_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
    """The logit, already scaled, times its head's factor, which the last tensor holds: float32 [B, H]."""
    factor = aux_tensors[-1][batch_idx[0], head_idx[0]]
    return utils.scalar_to_ssa(score[0] * factor, cutlass.Float32)


@cute.jit
def decayed(score, batch_idx, head_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
    """The logit x, already scaled, as min(x, t x).

    It reads the last two tensors: t by frame of the queries, float32 [F + 2, S_k], and each query's row, int32 [S_q].
    """
    t, rows = aux_tensors[-2], aux_tensors[-1]
    x = score[0]
    return utils.scalar_to_ssa(cute.arch.fmin(x, x * t[rows[q_idx[0]], kv_idx[0]]), cutlass.Float32)


@cute.jit
def scaled_and_decayed(score, batch_idx, head_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
    """Both, the factor first; it reads the last three tensors: the factors, then those of `decayed`."""
    t, rows = aux_tensors[-2], aux_tensors[-1]
    x = score[0] * aux_tensors[-3][batch_idx[0], head_idx[0]]
    return utils.scalar_to_ssa(cute.arch.fmin(x, x * t[rows[q_idx[0]], kv_idx[0]]), cutlass.Float32)
