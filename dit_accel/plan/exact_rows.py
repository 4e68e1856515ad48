"""Some query rows of a planned attention call, computed over whole keys and apart from its tiles."""

from functools import lru_cache
from typing import Any

import torch
from dit_accel_kernels import (
    FrameDecay,
    TileLists,
    block_sparse_attention_backward,
    block_sparse_attention_eager,
)
from torch import Tensor

from .plan import AttentionPlan, Call


def dense_rows(plan: AttentionPlan, call: Call, v: Tensor, rows: Tensor, keys: Tensor | None = None) -> Tensor:
    """Return what the plan would compute for some query rows if it left nothing out, in the call's layout.

    Logit transforms, key validity and identity mix stay the plan's; pooling, skipping and routing are gone.

    Args:
        plan: the call's plan.
        call: its queries and keys, centred where the plan says so.
        v: its values.
        rows: int64 [G], token indices.
        keys: bool [S], the keys that these rows see; None: all.
    """
    axis = 2 if call.layout == "bhsd" else 1
    tiles, arguments = _arguments(plan, call, rows, keys)
    out = block_sparse_attention_eager(call.q.index_select(axis, rows), call.k, v, tiles, **arguments)
    assert isinstance(out, Tensor)
    weight = _weight(plan, out, axis)
    if weight is None:
        return out
    own = v.index_select(axis, rows).repeat_interleave(out.shape[3 - axis] // v.shape[3 - axis], 3 - axis)
    return torch.lerp(out, own, weight.expand_as(out))


def gradients_of_rows(
    plan: AttentionPlan, call: Call, v: Tensor, grad: Tensor, rows: Tensor, keys: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, whole, from those of the rows that `dense_rows` returns.

    Args:
        plan: as in `dense_rows`; so are the others.
        call: its queries and keys.
        v: its values.
        grad: the gradient of the whole call's output, of which the rows' is a part.
        rows: int64 [G], token indices.
        keys: bool [S].
    """
    axis = 2 if call.layout == "bhsd" else 1
    grad = grad.index_select(axis, rows)
    weight, mixed = _weight(plan, grad, axis), None
    if weight is not None:
        mixed = grad * weight
        grad = grad - mixed
    tiles, arguments = _arguments(plan, call, rows, keys)
    of_rows, dk, dv = block_sparse_attention_backward(
        grad, call.q.index_select(axis, rows), call.k, v, tiles, **arguments
    )
    if mixed is not None:
        heads = 3 - axis
        dv.index_add_(axis, rows, mixed.unflatten(heads, (v.shape[heads], -1)).sum(heads + 1))
    return torch.zeros_like(call.q).index_copy_(axis, rows, of_rows), dk, dv


def _arguments(plan: AttentionPlan, call: Call, rows: Tensor, keys: Tensor | None) -> tuple[TileLists, dict[str, Any]]:
    decay, mask = plan.frame_decay, call.key_mask()
    if decay is not None:
        decay = FrameDecay(table=decay.table, q_frames=decay.q_frames[rows], k_frames=decay.k_frames)
    if keys is not None:
        mask = keys.expand(len(call.k), -1) if mask is None else mask & keys
    length = call.k.shape[2 if call.layout == "bhsd" else 1]
    return _full_lists(len(rows), length, str(call.k.device)), {
        "layout": call.layout,
        "scale": call.scale,
        "head_scale": plan.head_scale,
        "key_mask": mask,
        "frame_decay": decay,
        "backend": call.backend,
    }


def _weight(plan: AttentionPlan, out: Tensor, axis: int) -> Tensor | None:
    """Return the share of V in each head's output, broadcastable to it; None where it has none."""
    if plan.identity_mix is None:
        return None
    return plan.identity_mix.to(out.dtype).reshape(-1, out.shape[3 - axis]).unsqueeze(axis).unsqueeze(-1)


@lru_cache(maxsize=16)
def _full_lists(queries: int, keys: int, device: str) -> TileLists:
    with torch.inference_mode(False):
        return TileLists.full(queries, keys, block_q=128, block_k=128).to(device)
