"""What planned attention calls computed, held against dense attention in float64; for `dit_accel.testing`."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from dit_accel_kernels import EXACT
from torch import Tensor

from .attachment import Attachment
from .masks import key_validity
from .plan import AttentionPlan, Moment

WIDE = torch.float64


def require(condition: bool, text: str) -> None:
    """Raise `AssertionError` with ``text`` unless the condition holds; unlike ``assert``, under ``python -O`` too."""
    if not condition:
        raise AssertionError(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedCall:
    """One planned attention call and its result; tensors [B, H, S, D]."""

    plan: AttentionPlan
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None
    out: Tensor


@contextlib.contextmanager
def watched(attachment: Attachment) -> Iterator[list[PlannedCall]]:
    """Record the planned calls of an attachment."""
    session: Any = attachment._session
    original, calls = session.execute, []

    def execute(
        plan: AttentionPlan,
        moment: Moment,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        layout: str,
        scale: float | None,
    ) -> Tensor:
        out = original(plan, moment, q, k, v, mask, layout, scale)
        q, k, v, seen = ((x.transpose(1, 2) if layout == "bshd" else x).clone() for x in (q, k, v, out))
        calls.append(PlannedCall(plan=plan, q=q, k=k, v=v, mask=mask, scale=scale, out=seen))
        return out

    session.execute = execute
    try:
        yield calls
    finally:
        del session.execute


def require_same(found: Tensor, expected: Tensor, what: str) -> None:
    """Two float64 results differ by less than one rounding step of float32, which some models round to inside."""
    error, allowed = float((found - expected).abs().max()), torch.finfo(torch.float32).eps * float(expected.abs().max())
    require(error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}")


def require_within_rounding(found: Tensor, yardstick: Tensor, truth: Tensor, what: str) -> None:
    """Error <= 2 x the yardstick's own, plus one rounding step."""
    found, wide, step = found.to(WIDE), yardstick.to(WIDE), torch.finfo(yardstick.dtype).eps
    error = float((found - truth).abs().max())
    allowed = float(2 * (wide - truth).abs().max() + step * truth.abs().max())
    require(error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}")


def exact_pairs(plan: AttentionPlan, tokens: int) -> Tensor:
    """Pairs of tokens that every head computes exactly, bool [S, S], in the sequence's own order."""
    if plan.tiles is None:
        return torch.ones(tokens, tokens, dtype=torch.bool)
    tiles = plan.tiles
    exact = (tiles.states() == EXACT).all(0)
    exact = exact.repeat_interleave(tiles.block_q, 0)[:tokens].repeat_interleave(tiles.block_k, 1)[:, :tokens]
    if plan.token_order is None:
        return exact
    pairs = torch.empty_like(exact)
    pairs[plan.token_order[:, None], plan.token_order[None]] = exact
    return pairs


def require_as_planned(call: PlannedCall) -> None:
    """The kernels computed the exact pairs of the plan, and no others."""
    allowed = exact_pairs(call.plan, call.k.shape[2])
    if call.mask is not None:
        sizes = call.q.shape[0], call.q.shape[2], call.k.shape[2]
        allowed = allowed & key_validity(call.mask, *sizes)[:, None, None]
    q, k, v = (x.to(WIDE) for x in (call.q, call.k, call.v))
    options = {"scale": call.scale, "enable_gqa": q.shape[1] != k.shape[1]}
    truth = F.scaled_dot_product_attention(q, k, v, allowed, **options)
    yardstick = F.scaled_dot_product_attention(call.q, call.k, call.v, allowed, **options)
    require_within_rounding(call.out, yardstick, truth, "a planned call is not what its plan says")
