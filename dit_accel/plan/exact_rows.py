"""Some query rows of a planned attention call, computed over whole keys and apart from its tiles."""

from typing import Any

import torch
from dit_accel_kernels import FrameDecay, TileLists, block_sparse_attention_backward, block_sparse_attention_eager
from torch import Tensor

from .call import Call
from .plan import AttentionPlan
from .tiling import TILE, full_tiles


def dense_rows(plan: AttentionPlan, call: Call, rows: Tensor, keys: Tensor | None = None) -> Tensor:
    """Return what the plan would compute for some query rows if it left nothing out, [B, H, G, D].

    Logit transforms, key validity and identity mix stay the plan's; pooling, skipping and routing do not apply.

    Args:
        call: the call, its keys centred where the plan says so.
        rows: int64 [G], token indices.
        keys: bool [S], the keys that these rows see; None: all.
    """
    tiles, arguments = _arguments(plan, call, rows, keys)
    q, k, v = call.as_held(call.queries(rows), call.k, call.v)
    out = block_sparse_attention_eager(q, k, v, tiles, **arguments)
    assert isinstance(out, Tensor)
    out, weight = call.heads_first(out), plan.value_share(call.q.shape[1], call.q.dtype, rows)
    if weight is None:
        return out
    values = call.v.index_select(2, rows).repeat_interleave(out.shape[1] // call.v.shape[1], 1)
    return torch.lerp(out, values, weight.expand_as(out))


def gradients_of_rows(
    plan: AttentionPlan, call: Call, grad: Tensor, rows: Tensor, keys: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, whole, from those of the rows that `dense_rows` computes.

    ``grad`` is the gradient of the whole call's output [B, H, S, D]; the other arguments are those of `dense_rows`.
    """
    grad = grad.index_select(2, rows)
    weight, mixed = plan.value_share(call.q.shape[1], call.q.dtype, rows), None
    if weight is not None:
        mixed = grad * weight
        grad = grad - mixed
    tiles, arguments = _arguments(plan, call, rows, keys)
    grad, q, k, v = call.as_held(grad, call.q.index_select(2, rows), call.k, call.v)
    of_rows, dk, dv = map(call.heads_first, block_sparse_attention_backward(grad, q, k, v, tiles, **arguments))
    if mixed is not None:
        dv.index_add_(2, rows, mixed.unflatten(1, (call.v.shape[1], -1)).sum(2))
    return torch.zeros_like(call.q).index_copy_(2, rows, of_rows), dk, dv


def _arguments(plan: AttentionPlan, call: Call, rows: Tensor, keys: Tensor | None) -> tuple[TileLists, dict[str, Any]]:
    decay = plan.frame_decay
    if decay is not None:
        decay = FrameDecay(table=decay.table, q_frames=decay.q_frames[rows], k_frames=decay.k_frames)
    tiles = full_tiles(len(rows), call.tokens, TILE, str(call.k.device))
    bare = AttentionPlan(tiles=tiles, head_scale=plan.head_scale, frame_decay=decay)
    tiles, arguments = bare.kernel_arguments(call)
    if keys is not None:
        mask = arguments["key_mask"]
        arguments["key_mask"] = keys.expand(len(call.k), -1) if mask is None else mask & keys
    return tiles, arguments
