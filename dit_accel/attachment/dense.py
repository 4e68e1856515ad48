"""Dense attention on a CPU by the kernels' compiled loop, where that is faster than the attention set by the user.

The loop is this project's own, for sparse calls, and takes dense ones too. In bfloat16 it is about twice as fast as
torch's attention on processors that multiply bfloat16 in pairs; outputs are within rounding of the user's own.
"""

from collections.abc import Callable
from typing import Any

import torch
from dit_accel_kernels import TileLists, block_sparse_attention_eager, dense_speed
from torch import Tensor

from .execution import Execution

LEAST_GAIN = 1.25  # a smaller one may be the measurement's error: processes would differ in rounding
LEAST_FLOPS = 1e8  # of a call: what the loop takes beside its products is more than it saves in shorter ones
TILE = 128


def with_loop(dense: Callable[..., Tensor], tokens_first: bool, execution: Execution) -> Callable[..., Tensor]:
    """Return the model's own attention, which computes by the loop what an attachment lets it and is faster so.

    Args:
        dense: diffusers' ``dispatch_attention_fn`` or ``F.scaled_dot_product_attention``.
        tokens_first: whether tensors lie as [B, S, H, D], else [B, H, S, D].
        execution: the attachment's.
    """

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
        **others: Any,
    ) -> Tensor:
        if not torch.compiler.is_compiling() and execution.dense == "auto":
            plain = attn_mask is None and not dropout_p and not is_causal and _is_torchs(others)
            speed = _speed(query, key, value, tokens_first) if plain else None
            if speed is not None:
                execution.recorder.dense_by_loop(query, speed)
                return _by_loop(query, key, value, scale, tokens_first)
        return dense(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa, **others)

    return attend


def _is_torchs(others: dict[str, Any]) -> bool:
    """Whether diffusers would compute a call by torch's attention and nothing special, by what else it was given."""
    backend = others.get("backend")
    if any(value for name, value in others.items() if name != "backend"):
        return False
    if backend is None and "backend" in others:  # of `dispatch_attention_fn`: what is set for all models
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        backend, _ = _AttentionBackendRegistry.get_active_backend()
    return backend is None or getattr(backend, "value", backend) == "native"


def _speed(query: Tensor, key: Tensor, value: Tensor, tokens_first: bool) -> float | None:
    """Return how many times as fast the loop is in a call; None where it is not taken."""
    tensors = (query, key, value)
    if any(type(x) is not Tensor or x.ndim != 4 or x.device.type != "cpu" for x in tensors):
        return None
    if torch.is_autocast_enabled("cpu") or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return None
    if 4.0 * query.numel() * key.shape[1 if tokens_first else 2] < LEAST_FLOPS:
        return None
    speed = dense_speed(query.dtype, query.shape[3])
    return speed if speed is not None and speed >= LEAST_GAIN else None


def _by_loop(query: Tensor, key: Tensor, value: Tensor, scale: float | None, tokens_first: bool) -> Tensor:
    axis, layout = (1, "bshd") if tokens_first else (2, "bhsd")
    tiles = TileLists.full(query.shape[axis], key.shape[axis], block_q=TILE, block_k=TILE)
    out = block_sparse_attention_eager(query, key, value, tiles, layout=layout, scale=scale, backend="torch")
    assert isinstance(out, Tensor)
    return out
