"""The attention plan: what one attention call computes, filled in by all active methods together."""

from dataclasses import dataclass

import torch
from dit_accel_kernels import FrameDecay, Selection, TileLists
from torch import Tensor

from .errors import ConfigError
from .layout import TokenLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
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
        mask = self.mask
        if mask is None:
            return None
        batch, keys = self.q.shape[0], self.heads_first(self.k).shape[2]
        if mask.dtype == torch.bool and mask.shape[-1] == keys and mask.numel() in (keys, batch * keys):
            return mask.reshape(-1, keys).expand(batch, keys)
        raise ConfigError(
            f"sparse attention takes a boolean key-padding mask [{batch}, 1, 1, {keys}], the model passes {mask.dtype} "
            f"{list(mask.shape)}; detach the sparse methods from this model"
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionPlan:
    """What one attention call computes; the default is plain dense attention.

    Attributes:
        tiles: exact, pooled and skipped tiles; None: every tile exact.
        token_order: int64 [S], position in the tiles' order -> token index; None: the sequence's own order.
        head_scale: fp32 [H] or [B, H], factor on each head's logits.
        frame_decay: factor on logits by frame distance.
        identity_mix: fp32 [H] in [0, 1], share of each head's output replaced by V.
        selection: which of the exact tiles stay exact in this call, by bits and routing, and its votes.
    """

    tiles: TileLists | None = None
    token_order: Tensor | None = None
    head_scale: Tensor | None = None
    frame_decay: FrameDecay | None = None
    identity_mix: Tensor | None = None
    selection: Selection | None = None
