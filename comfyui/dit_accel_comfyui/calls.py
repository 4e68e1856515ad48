"""One attention call as ComfyUI's override gets it, and the same call as dit-accel's methods see it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dit_accel.plan.call import Call

KNOWN = frozenset({"transformer_options", "_inside_attn_wrapper", "scale", "enable_gqa", "low_precision_attention"})
"""Keyword arguments of an attention call whose meaning is known; a call with another one that is set stays dense."""


Dense = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]
"""(q, k, v, mask, scale), as they lie -> output, likewise: the model's own attention."""


@dataclass(frozen=True, slots=True)
class AttentionArguments:
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


def call_from(arguments: AttentionArguments, backend: str) -> Call | str:
    """Return a call for dit-accel's methods, views of its tensors; or why they can't take it."""
    unknown = sorted(name for name, value in arguments.kwargs.items() if name not in KNOWN and value)
    if unknown:
        return f"it asks for {', '.join(unknown)}, which is not known here"
    if arguments.attn_precision is torch.float32 and arguments.q.dtype != torch.float32:
        return "its logits are to be computed in float32"
    if len({x.dtype for x in (arguments.q, arguments.k, arguments.v)}) > 1:
        return f"q, k and v are of several types: {arguments.q.dtype}, {arguments.k.dtype}, {arguments.v.dtype}"
    if arguments.skip_reshape:
        q, k, v = arguments.q, arguments.k, arguments.v
    else:
        size = arguments.q.shape[-1] // arguments.heads
        if any(x.shape[-1] % size for x in (arguments.q, arguments.k, arguments.v)):
            return f"q, k and v have heads of several sizes, {arguments.q.shape[-1]} channels in {arguments.heads}"
        q, k, v = (x.unflatten(2, (-1, size)).transpose(1, 2) for x in (arguments.q, arguments.k, arguments.v))
    if k.shape != v.shape or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        return f"q, k and v have shapes that are not understood: {[*q.shape]}, {[*k.shape]}, {[*v.shape]}"
    mask = arguments.mask
    if mask is not None:
        mask = mask[None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
    call = Call(
        q=q,
        k=k,
        v=v,
        mask=mask,
        scale=arguments.kwargs.get("scale"),
        backend=backend,
        tokens_first=not arguments.skip_reshape,
    )
    return call if mask is None or call.hides_keys else f"its mask {[*mask.shape]} hides more than keys"


Attend = Callable[[AttentionArguments, Dense], Tensor | None]


class Override:
    """What stands in ComfyUI's slot for attention while a forward of a run is in it.

    Args:
        attend: gives the output of a call as the model wants it, or None: it is for the model's own attention.
        previous: what held the slot before; None: nothing did.

    Attributes:
        calls: how many attention calls came here.
    """

    def __init__(self, attend: Attend, previous: Callable[..., Tensor] | None) -> None:
        self._attend, self._previous = attend, previous
        self.calls = 0

    @torch.compiler.disable
    def __call__(
        self, func: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None,
        attn_precision: Any = None, skip_reshape: bool = False, skip_output_reshape: bool = False, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """Return the output of an attention call, of ours or of what held the slot before; the arguments are ComfyUI's.

        ``func`` is the attention that ComfyUI chose at its start, such as PyTorch's or SageAttention's.
        """
        self.calls += 1
        arguments = AttentionArguments(q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape, kwargs)

        def own(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, output_reshape: bool, **options: Any) -> Tensor:
            function = func if self._previous is None else partial(self._previous, func)
            return function(
                q, k, v, heads, mask=mask, attn_precision=attn_precision, skip_reshape=skip_reshape,
                skip_output_reshape=not output_reshape, **{**kwargs, **options},
            )  # fmt: skip

        def dense(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None, scale: float | None) -> Tensor:
            scaled = {} if scale is None else {"scale": scale}
            q, k, v = (x if skip_reshape else x.flatten(2) for x in (q, k, v))
            out = own(q, k, v, mask, not skip_reshape, **scaled)
            return out if skip_reshape else out.unflatten(2, (heads, -1))

        out = self._attend(arguments, dense)
        return own(q, k, v, mask, not skip_output_reshape) if out is None else out
