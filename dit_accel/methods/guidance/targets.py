"""What perturbed heads give in place of their attention, besides V: the mean of V, or attention of blurred queries.

Sources: the targets uniform and mean-query of HeadHunter's code (arXiv 2506.10978); smoothed energy guidance (arXiv
2408.00760), whose blur without bounds is the mean query.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...plan.call import Call
from ...plan.layout import TokenLayout
from ...plan.plan import AttentionPlan

LAST_CHANGE = frozenset({"last change of attention"})
"""What a method is alone in that changes what an attention call gave, last of all."""

ENDLESS = 9999.0
"""Standard deviation above which a blur is the mean, as in SEG's code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherOutput:
    """Puts other values in the place of a share of an attention call's output, last of all."""

    other: Tensor  # [B, H, S, D], or with 1 in place of S
    share: Tensor  # of each head, [H] or [B, H] in [0, 1]
    tokens: Tensor | None = None  # bool [S], the rows that change; None: all

    def applied(self, out: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return a call's output [B, H, S, D] with the share replaced; the given one is not changed.

        ``rows``: int64 [S'], the tokens that it holds, S' in place of S; None: all.
        """
        share = self.share.to(out.dtype).reshape(-1, out.shape[1])[:, :, None, None]
        other, tokens = self.other, self.tokens
        if rows is not None:
            other = other if other.shape[2] == 1 else other.index_select(2, rows)
            tokens = None if tokens is None else tokens[rows]
        share = share if tokens is None else share * tokens[:, None]
        return torch.where(share > 0, torch.lerp(out, other.to(out.dtype).expand_as(out), share.expand_as(out)), out)


def put_in_place(
    plan: AttentionPlan, other: Tensor, share: Tensor, tokens: Tensor | None = None, *, whole: bool = False
) -> AttentionPlan:
    """Return a plan whose heads give something else in the place of a share of their attention.

    ``whole``: nothing is left of the attention, so that none need be computed.
    """
    plan = plan.mix(share, tokens, only_values=True) if whole and tokens is None else plan
    return plan.guide(OtherOutput(other=other, share=share, tokens=tokens))


def mean_values(call: Call) -> Tensor:
    """Return the mean of the values of all valid keys, [B, H, 1, D]."""
    weights = _valid(call).to(torch.float32)
    mean = (call.v.float() * weights).sum(2, keepdim=True) / weights.sum(2, keepdim=True).clamp(min=1)
    return mean.repeat_interleave(call.q.shape[1] // call.v.shape[1], 1).to(call.v.dtype)


def of_mean_query(call: Call, tokens: Tensor | None) -> Tensor:
    """Return the attention of the mean of all valid tokens' queries, [B, H, 1, D]; of some ``tokens``, bool [S]."""
    weights = _valid(call).to(torch.float32)
    weights = weights if tokens is None else weights * tokens[:, None]
    mean = (call.q.float() * weights).sum(2, keepdim=True) / weights.sum(2, keepdim=True).clamp(min=1)
    return attended(call, mean.to(call.q.dtype))


def blurred_queries(call: Call, layout: TokenLayout, sigma: float) -> Tensor:
    """Return a call's queries, blurred over height and width, frame by frame; text's stay, [B, H, S, D].

    ``sigma``: standard deviation in tokens; above `ENDLESS` each frame has its mean.
    """
    q = call.q.clone()
    grid = q[:, :, layout.visual].float().unflatten(2, (layout.frames, layout.height, layout.width))
    if sigma > ENDLESS:
        grid = grid.mean((3, 4), keepdim=True).expand_as(grid)
    else:
        rows, columns = (blur(side, sigma).to(grid) for side in (layout.height, layout.width))
        grid = torch.einsum("yr,xc,bhfrcd->bhfyxd", rows, columns, grid)
    q[:, :, layout.visual] = grid.flatten(2, 4).to(q.dtype)
    return q


@functools.lru_cache(maxsize=16)
def blur(side: int, sigma: float) -> Tensor:
    """Return the matrix float32 [side, side] of a Gaussian blur along an axis, mirrored at its ends.

    The kernel has an odd length of about six standard deviations, at most what a mirror can fill.
    """
    reach = min(math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2, 2 * side - 1) // 2
    with torch.inference_mode(False):
        offsets = torch.arange(-reach, reach + 1)
        weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
        places = (torch.arange(side)[:, None] + offsets).abs()
        places = torch.where(places >= side, 2 * (side - 1) - places, places).clamp(min=0)
        return torch.zeros(side, side).scatter_add_(1, places, (weights / weights.sum()).expand(side, -1))


def attended(call: Call, q: Tensor) -> Tensor:
    """Return plain attention of other queries [B, H, any number, D] over a call's keys and values."""
    mask, count = call.key_mask(), q.shape[1] // call.k.shape[1]
    k, v = (x.repeat_interleave(count, 1) if count > 1 else x for x in (call.k, call.v))
    mask = None if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.scale)


def _valid(call: Call) -> Tensor:
    mask = call.key_mask()
    mask = torch.ones(1, call.tokens, dtype=torch.bool, device=call.k.device) if mask is None else mask
    return mask[:, None, :, None]
