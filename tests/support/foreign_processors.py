"""Attention processors for Wan as other libraries bring them, on torch's attention or on one of their own."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def usp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stand in for attention that is sharded over devices, as xDiT's ``USP``: tensors [B, H, S, D]."""
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v


def projected(attn: Any, x: Tensor, text: Tensor | None, angles: Any) -> list[Tensor]:
    """Return queries, keys and values [B, H, S, D], turned by their positions."""
    source = x if text is None else text
    q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(source)), attn.to_v(source)
    q, k, v = (one.unflatten(2, (attn.heads, -1)).transpose(1, 2) for one in (q, k, v))
    return [q, k, v] if angles is None else [_turned(q, *angles), _turned(k, *angles), v]


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of entries by angles [1, S, 1, D]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    turn = torch.complex(cos[..., ::2].float(), sin[..., ::2].float()).transpose(1, 2)
    return torch.view_as_real(pairs * turn).flatten(-2).type_as(x)


class TorchAttention:
    """As Nunchaku's: quantised projections, then torch's own attention."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None,
                 attention_mask: Any = None, rotary_emb: Any = None) -> Tensor:  # fmt: skip
        q, k, v = projected(attn, hidden_states, encoder_hidden_states, rotary_emb)
        out = F.scaled_dot_product_attention(q, k, v)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


class ShardedAttention:
    """As xDiT's: attention by a function of its own."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None,
                 attention_mask: Any = None, rotary_emb: Any = None) -> Tensor:  # fmt: skip
        q, k, v = projected(attn, hidden_states, encoder_hidden_states, rotary_emb)
        out = usp(q, k, v)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


def put(pipe: Any, processor: type) -> None:
    """Set a processor of a class on every attention module of a Wan pipeline's transformer."""
    for block in pipe.transformer.blocks:
        for attn in (block.attn1, block.attn2):
            attn.set_processor(processor())
