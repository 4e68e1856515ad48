"""Scales of heads and frame decay as FlashAttention-4's `score_mod`: compiled by CuTe, and plain Python as well.

It is imported by the first call that needs it, since it needs flash-attn-4.
"""

# CuTe's compiler reads this file; its packages are there only where the extra is installed:
# pyright: reportMissingImports=false

import cutlass
import cutlass.cute as cute
from flash_attn.cute import utils


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


SCORES = {(True, False): scaled, (False, True): decayed, (True, True): scaled_and_decayed}  # by scale and decay
