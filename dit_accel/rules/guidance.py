"""Guidance: what a perturbed prediction adds to the conditional one, and NAG's mix in attention."""

from collections.abc import Callable

import torch
from torch import Tensor


def added(cond: Tensor, perturbed: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Compute guidance's addend to the conditional prediction, float32 or wider: w (cond - perturbed).

    With ``rescale`` the sum of both is scaled towards the conditional prediction's standard deviation per row first,
    by phi std(cond) / std(sum) + 1 - phi; the conditional part keeps its weight in the rest of the guidance.

    Source: PAG (arXiv 2403.17377); guidance rescale (arXiv 2305.08891), here on the perturbation's term alone.

    ``rescale``: phi in [0, 1].
    """
    wide = cond if cond.element_size() > 4 else cond.float()
    difference = scale * (wide - perturbed.to(wide.dtype))
    if not rescale:
        return difference
    whole = wide + difference
    dims = tuple(range(1, whole.ndim))
    ratio = wide.std(dim=dims, keepdim=True) / whole.std(dim=dims, keepdim=True).clamp(min=1e-12)
    return whole * (rescale * ratio + 1 - rescale) - wide


def normalized(
    positive: Tensor,
    negative: Tensor,
    scale: float,
    tau: float,
    alpha: float,
    summed: Callable[[Tensor], Tensor] = lambda lengths: lengths,
) -> Tensor:
    """Return attention's output guided away from what a negative text gives, in float32 or wider.

    G = s Z+ - (s - 1) Z-, cut down to tau times Z+'s length in L1 per token, then alpha G + (1 - alpha) Z+. A token
    whose Z+ is zero stays zero.

    Source: NAG (arXiv 2505.21179).

    Args:
        positive: Z+, [..., C].
        scale: s >= 1; at 1 nothing changes.
        tau: longest G in lengths of Z+, >= 1.
        alpha: weight of G in [0, 1].
        summed: adds up lengths over the processes that hold a part of C each.
    """
    wide = positive if positive.element_size() > 4 else positive.float()
    guided = scale * wide - (scale - 1) * negative.to(wide.dtype)
    norm, length = summed(torch.stack([x.abs().sum(dim=-1, keepdim=True) for x in (wide, guided)]))
    cut = (tau * norm / length.clamp(min=torch.finfo(wide.dtype).tiny)).clamp(max=1)
    return wide + alpha * (guided * cut - wide)
