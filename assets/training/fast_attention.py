"""Training-time attention processors for `WanTransformer3DModel` that compute the same in half of the CPU time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class HeadwiseAttention(torch.autograd.Function):
    """Plain attention, one head at a time, so that a head's S x S matrix stays in the cache; kept for the backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with q (already scaled), k, v of shape [N, S, D]."""
        out, shares = torch.empty_like(v), []
        for index in range(q.shape[0]):
            share = torch.softmax(q[index] @ k[index].mT, -1)
            torch.mm(share, v[index], out=out[index])
            shares.append(share)
        ctx.save_for_backward(q, k, v, out, *shares)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v."""
        q, k, v, out, *shares = ctx.saved_tensors
        grad = grad.contiguous()
        dots = (grad.float() * out.float()).sum(-1, keepdim=True).to(grad.dtype)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for index, share in enumerate(shares):
            torch.mm(share.mT, grad[index], out=dv[index])
            inner = (grad[index] @ v[index].mT).sub_(dots[index]).mul_(share)
            torch.mm(inner, k[index], out=dq[index])
            torch.mm(inner.mT, q[index], out=dk[index])
        return dq, dk, dv


class TrainingSelfAttention:
    """Self-attention as the pipeline's, by `HeadwiseAttention`, with the rotation as one complex product."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, _text: None, _mask: None, rotary_emb: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Attend over all tokens of hidden_states [B, S, heads * D]."""
        batch, tokens, _ = hidden_states.shape
        cos, sin = rotary_emb
        low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        turn = torch.complex(cos[..., 0::2].float(), sin[..., 1::2].float())  # [1, S, 1, D / 2]

        def prepare(x: Tensor, scale: float) -> Tensor:
            pairs = torch.view_as_complex(x.float().view(batch, tokens, attn.heads, -1, 2))
            turned = torch.view_as_real(pairs * (turn * scale)).flatten(-2)
            return turned.to(low).transpose(1, 2).reshape(batch * attn.heads, tokens, -1)

        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        value = attn.to_v(hidden_states).to(low).view(batch, tokens, attn.heads, -1)
        value = value.transpose(1, 2).reshape(batch * attn.heads, tokens, -1)
        out = HeadwiseAttention.apply(prepare(query, value.shape[-1] ** -0.5), prepare(key, 1.0), value)
        out = out.view(batch, attn.heads, tokens, -1).transpose(1, 2).reshape(batch, tokens, -1)
        return attn.to_out[0](out)


class TrainingCrossAttention:
    """Cross-attention as the pipeline's, with all zero pads folded into one key of weight n (its logit plus ln n).

    Written out, since with so few keys a product of matrices is several times faster than the fused attention.
    """

    bias: Tensor | None = None

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, _mask: None = None, _rotary: None = None
    ) -> Tensor:
        """Attend to the text [B, L, D]; the bias [B, 1, 1, L] must be set before each training step."""
        assert self.bias is not None
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(encoder_hidden_states))
        value = attn.to_v(encoder_hidden_states)
        query, key, value = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
        logits = (query * query.shape[-1] ** -0.5) @ key.mT + self.bias.to(query.dtype)
        out = torch.softmax(logits, -1).to(value.dtype) @ value
        return attn.to_out[0](out.transpose(1, 2).flatten(2))
