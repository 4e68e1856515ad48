"""One attention call as ComfyUI's override gets it, and the same call as dit-accel's methods see it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from dit_accel.plan.call import Call
from torch import Tensor

KNOWN = frozenset(
    {"transformer_options", "_inside_attn_wrapper", "scale", "enable_gqa", "low_precision_attention"}
)
"""Keyword arguments of an attention call whose meaning is known; a call with another one that is set stays dense."""


@dataclass(frozen=True, slots=True)
class Given:
    """The arguments of an attention call, as `comfy.ldm.modules.attention` passes them to an override.

    Attributes:
        q: [B, S, H * D], or [B, H, S, D] with ``skip_reshape``.
        k: likewise; fewer heads with ``enable_gqa``.
        v: likewise.
        heads: H.
        mask: None; or [S, S], [B, S, S] or [B, H, S, S], boolean (True: seen) or added to the logits.
        attn_precision: in which the logits are to be computed; None: any.
        skip_reshape: q, k and v are [B, H, S, D].
        skip_output_reshape: the output is to be [B, H, S, D].
        kwargs: further ones.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    mask: Tensor | None
    attn_precision: Any
    skip_reshape: bool
    skip_output_reshape: bool
    kwargs: Mapping[str, Any]

    @property
    def tokens(self) -> int:
        """Keys of the call, S."""
        return self.k.shape[-2]

    @property
    def is_self_attention(self) -> bool:
        """Whether there are as many queries as keys, and at all a sequence of tokens."""
        axes = 4 if self.skip_reshape else 3
        return all(x.ndim == axes for x in (self.q, self.k, self.v)) and self.q.shape[-2] == self.tokens

    @property
    def block(self) -> tuple[Any, Any]:
        """Type and index of the model's block that makes the call; (None, None) where the model does not tell."""
        options = self.kwargs.get("transformer_options") or {}
        index = options.get("block_index")
        return (options.get("block_type"), index) if isinstance(index, int) else (None, None)

    def returned(self, out: Tensor) -> Tensor:
        """Return an output that lies as q does as the model wants it: [B, S, H, D] or [B, H, S, D] is given."""
        if self.skip_output_reshape:
            return out if self.skip_reshape else out.transpose(1, 2)
        return (out.transpose(1, 2) if self.skip_reshape else out).flatten(2)


def given_call(given: Given, backend: str) -> Call | str:
    """Return a call for dit-accel's methods, views of its tensors; or why they can't take it."""
    unknown = sorted(name for name, value in given.kwargs.items() if name not in KNOWN and value)
    if unknown:
        return f"it asks for {', '.join(unknown)}, which is not known here"
    if given.attn_precision is torch.float32 and given.q.dtype != torch.float32:
        return "its logits are to be computed in float32"
    if len({x.dtype for x in (given.q, given.k, given.v)}) > 1:
        return f"q, k and v are of several types: {given.q.dtype}, {given.k.dtype}, {given.v.dtype}"
    if given.skip_reshape:
        q, k, v = given.q, given.k, given.v
    else:
        size = given.q.shape[-1] // given.heads
        if any(x.shape[-1] % size for x in (given.q, given.k, given.v)):
            return f"q, k and v have heads of several sizes, {given.q.shape[-1]} channels in {given.heads}"
        q, k, v = (x.unflatten(2, (-1, size)).transpose(1, 2) for x in (given.q, given.k, given.v))
    if k.shape != v.shape or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        return f"q, k and v have shapes that are not understood: {[*q.shape]}, {[*k.shape]}, {[*v.shape]}"
    mask = given.mask
    if mask is not None:
        mask = mask[None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
    call = Call(
        q=q, k=k, v=v, mask=mask, scale=given.kwargs.get("scale"), backend=backend, tokens_first=not given.skip_reshape
    )
    return call if call.hides_keys else f"its mask {[*given.mask.shape]} hides more than keys"  # type: ignore[union-attr]
