"""Attention masks: key padding, which plans follow, and PyTorch's dense attention for calls under any other mask."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ConfigError


def is_key_padding(mask: Tensor, q: Tensor, k: Tensor, layout: str) -> bool:
    """Tell whether a mask is boolean and the same for every head and query row."""
    batch, keys = q.shape[0], k.shape[1 if layout == "bshd" else 2]
    return mask.dtype == torch.bool and mask.shape[-1] == keys and mask.numel() in (keys, batch * keys)


def key_padding(mask: Tensor, q: Tensor, k: Tensor, layout: str) -> Tensor:
    """Return key validity [B, S] of an attention mask that is key padding.

    Raises:
        ConfigError: for any other mask, which our kernels can't follow.
    """
    batch, keys = q.shape[0], k.shape[1 if layout == "bshd" else 2]
    if is_key_padding(mask, q, k, layout):
        return mask.reshape(-1, keys).expand(batch, keys)
    raise ConfigError(
        f"sparse attention takes a boolean key-padding mask [{batch}, 1, 1, {keys}], the model passes {mask.dtype} "
        f"{list(mask.shape)}; detach the sparse methods from this model"
    )


def attend_dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, layout: str, scale: float | None) -> Tensor:
    """Return scaled dot-product attention in the tensors' own layout, ``bshd`` or ``bhsd``."""
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = k.shape[1] != q.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2) if layout == "bshd" else out


def dense_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, layout: str, scale: float | None
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k and v from that of `attend_dense`'s output."""
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        return torch.autograd.grad(attend_dense(q, k, v, mask, layout, scale), (q, k, v), grad)
