"""The attention plan: what one attention call computes, filled in by all active methods together."""

from dataclasses import dataclass

import torch
from dit_accel_kernels import FrameDecay, Selection, TileLists
from torch import Tensor

from .layout import TokenLayout
from .masks import key_padding


@dataclass(frozen=True, slots=True, kw_only=True)
class CallContext:
    """Where the denoising stands when an attention module runs.

    Attributes:
        transformer: component name, ``transformer`` or ``transformer_2``.
        layer: index of the attention module among all that the adapter names, unique in its transformer.
        depth: index of its block, counted from the input; what ``dense_layers`` counts.
        branch: name of the denoising call, such as ``cond``.
        step_index: 0-based step, over all experts.
        num_inference_steps: steps of the run; None where nothing tells.
        sigma: noise level of the step; None where nothing tells.
        layout: the sequence's token layout.
        batch: rows B of the call.
        device: where q, k and v lie.
        row: which of the calls that the module makes in one forward; models that attend row by row make one a row.
        repeated: the forward ran this call before; gradient checkpointing does so, and wants the same again.
        differentiate: a backward may follow, so that what the plan holds must not be written to.
    """

    transformer: str
    layer: int
    depth: int
    branch: str
    step_index: int
    num_inference_steps: int | None
    sigma: float | None
    layout: TokenLayout
    batch: int
    device: torch.device
    row: int = 0
    repeated: bool = False
    differentiate: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Call:
    """What one attention call compares, as the model hands it over; the values are not part of it.

    Attributes:
        q: queries after norm and RoPE, [B, S, H, D] or [B, H, S, D] as ``layout`` says.
        k: keys, the same layout.
        mask: None, or the model's attention mask, which must be key padding.
        layout: ``bshd`` or ``bhsd``.
        scale: factor on the logits; None: 1 / sqrt(D).
        backend: the kernel backend's name.
    """

    q: Tensor
    k: Tensor
    mask: Tensor | None
    layout: str
    scale: float | None
    backend: str

    def heads_first(self, x: Tensor) -> Tensor:
        """Return a tensor of the call as [B, H, S, D], a view."""
        return x if self.layout == "bhsd" else x.transpose(1, 2)

    def key_mask(self) -> Tensor | None:
        """Return key validity [B, S] of the mask, True where a key is valid; None without a mask.

        Raises:
            ConfigError: for any other mask than key padding, which our kernels can't follow.
        """
        return None if self.mask is None else key_padding(self.mask, self.q, self.k, self.layout)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowOverride:
    """Query rows that see some keys, all of them exactly, and no others, whatever the tiles say.

    Attributes:
        rows: int64 [G], token indices.
        keys: bool [S], True for a key that they see.
    """

    rows: Tensor
    keys: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionPlan:
    """What one attention call computes; the default is plain dense attention.

    Attributes:
        key_mean: subtracted from every key before all else, broadcast over the call's tokens in its own layout:
            float32 [B, 1, H, D] or [B, H, 1, D] (float64 for float64). Alone it changes no result.
        tiles: exact, pooled and skipped tiles; None: every tile exact.
        token_order: int64 [S], position in the tiles' order -> token index; None: the sequence's own order.
        head_scale: fp32 [H] or [B, H], factor on each head's logits.
        frame_decay: factor on logits by frame distance.
        identity_mix: fp32 [H] in [0, 1], share of each head's output replaced by V.
        selection: which of the exact tiles stay exact in this call, by bits and routing, and its votes.
        row_override: rows that are computed once more under a rule of their own, which replaces what the tiles gave them.
    """

    key_mean: Tensor | None = None
    tiles: TileLists | None = None
    token_order: Tensor | None = None
    head_scale: Tensor | None = None
    frame_decay: FrameDecay | None = None
    identity_mix: Tensor | None = None
    selection: Selection | None = None
    row_override: RowOverride | None = None

    def centred(self, k: Tensor) -> Tensor:
        """Return the keys less their mean, in their own dtype; the keys themselves where the plan has none."""
        return k if self.key_mean is None else (k - self.key_mean).to(k.dtype)

    def gradient_before_centring(self, grad: Tensor, call: Call) -> Tensor:
        """Return the gradient of the keys as the model gave them, from that of the centred ones; same layout."""
        if self.key_mean is None:
            return grad
        axis = 2 if call.layout == "bhsd" else 1
        wide, mask = grad.to(self.key_mean.dtype), call.key_mask()
        total = wide.sum(axis, keepdim=True)
        if mask is None:
            return (wide - total / grad.shape[axis]).to(grad.dtype)
        share = mask.to(wide.dtype) / mask.sum(1, keepdim=True).clamp(min=1)
        share = share[:, None, :, None] if axis == 2 else share[:, :, None, None]
        return (wide - share * total).to(grad.dtype)
