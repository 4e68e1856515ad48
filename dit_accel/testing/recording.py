"""Records planned attention calls, and checks what they computed against their plan's reference in float64."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from dit_accel_kernels import EXACT, block_sparse_attention_eager, unpack_bits
from torch import Tensor, nn

from ..attachment.attachment import Attachment
from ..attachment.layers import PlannedCall
from ..plan.context import CallContext
from ..plan.masks import key_validity
from ..plan.plan import AttentionPlan
from .reference import attention, tile_states, tiles_of

WIDE = torch.float64


@contextlib.contextmanager
def silenced(transformer: nn.Module) -> Iterator[None]:
    """Let every attention module give zeros, so that a token's value depends on nothing but the token."""

    def zeros(module: nn.Module, inputs: Any, out: Any) -> Any:
        return torch.zeros_like(out) if isinstance(out, Tensor) else type(out)(torch.zeros_like(x) for x in out)

    with contextlib.ExitStack() as stack:
        for module in transformer.modules():
            if hasattr(module, "processor"):
                stack.callback(module.register_forward_hook(zeros).remove)
        yield


@contextlib.contextmanager
def counted(transformer: nn.Module, names: Sequence[str]) -> Iterator[list[str]]:
    """Give the modules of these names that ran, by name, each time they did."""
    ran: list[str] = []
    with contextlib.ExitStack() as stack:
        for name in names:
            module = transformer.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(lambda *_, name=name: ran.append(name)).remove)
        yield ran


def require(condition: bool, text: str) -> None:
    """Raise `AssertionError` with ``text`` unless the condition holds; unlike ``assert``, under ``python -O`` too."""
    if not condition:
        raise AssertionError(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedCall:
    """One planned attention call and its result, kept.

    Tensors are [B, H, S, D], keys as the plan centres them; ``exact`` are a selection's exact tiles as bits;
    ``planned`` is the output before methods corrected it, where one does.
    """

    plan: AttentionPlan
    context: CallContext
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None
    out: Tensor
    exact: Tensor | None = None
    planned: Tensor | None = None

    def states(self) -> Tensor:
        """Return the state of every tile, uint8 [B or 1, H or 1, NQ, NK]."""
        return tile_states(self.plan, self.q.shape[1], self.k.shape[2], self.exact)

    def valid(self) -> Tensor | None:
        """Return which keys count, bool [B, S]; None: all."""
        sizes = self.q.shape[0], self.q.shape[2], self.k.shape[2]
        return None if self.mask is None else key_validity(self.mask, *sizes)


@contextlib.contextmanager
def recorded(attachment: Attachment) -> Iterator[list[RecordedCall]]:
    """Keep the planned calls of an attachment."""
    calls: list[RecordedCall] = []

    def keep(seen: PlannedCall) -> None:
        call, plan, planned = seen.call, seen.plan, seen.planned
        calls.append(
            RecordedCall(
                plan=plan, context=seen.context, q=call.q.clone(), k=plan.centred(call.k).clone(), v=call.v.clone(),
                mask=call.mask, scale=call.scale, out=seen.out.clone(), exact=seen.exact,
                planned=None if planned is None else planned.clone(),
            )
        )  # fmt: skip

    with attachment.observe(keep):
        yield calls


class _EnoughError(Exception):
    """Ends a forward."""


@contextlib.contextmanager
def stopped_at(attachment: Attachment, tokens: int) -> Iterator[list[Tensor]]:
    """Give the values of row 0, [S, H * D], of the first planned call over so many tokens; end the forward there."""
    seen: list[Tensor] = []

    def stop(planned: PlannedCall) -> None:
        values = planned.call.v[0].transpose(0, 1).flatten(1)
        if len(values) == tokens:
            seen.append(values.clone())
            raise _EnoughError

    with contextlib.suppress(_EnoughError), attachment.observe(stop):
        yield seen


def require_same(result: Tensor, expected: Tensor, what: str) -> None:
    """Two float64 results differ by less than one rounding step of float32, which some models round to inside."""
    error = float((result - expected).abs().max())
    allowed = torch.finfo(torch.float32).eps * float(expected.abs().max())
    require(error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}")


def require_within_rounding(result: Tensor, yardstick: Tensor, truth: Tensor, what: str) -> None:
    """Error <= 2 x the yardstick's own, plus one rounding step."""
    result, wide, step = result.to(WIDE), yardstick.to(WIDE), torch.finfo(yardstick.dtype).eps
    error = float((result - truth).abs().max())
    allowed = float(2 * (wide - truth).abs().max() + step * truth.abs().max())
    require(error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}")


def exact_pairs(call: RecordedCall) -> Tensor:
    """Pairs of tokens that every row and head computes exactly, bool [S, S], in the sequence's own order."""
    tokens, order = call.k.shape[2], call.plan.token_order
    tiles = tiles_of(call.plan, tokens)
    exact = (call.states() == EXACT).all(0).all(0)
    exact = exact.repeat_interleave(tiles.block_q, 0)[:tokens].repeat_interleave(tiles.block_k, 1)[:, :tokens]
    if order is None:
        return exact
    pairs = torch.empty_like(exact)
    pairs[order[:, None], order[None]] = exact
    return pairs


def require_text_exact(call: RecordedCall) -> None:
    """Every token sees all text exactly, and text sees every token exactly."""
    pairs = exact_pairs(call)
    text = torch.ones(len(pairs), dtype=torch.bool)
    text[call.context.layout.visual] = False
    require(bool(pairs[text].all() & pairs[:, text].all()), "text tokens are not exact")


def require_as_planned(calls: Sequence[RecordedCall]) -> None:
    """The kernels computed the exact and the pooled tiles of the plans, no others, and selected what they say.

    The calls of one forward share a yardstick: the largest error of a single call is a matter of luck.
    """
    outputs, low, truth = [], [], []
    for call in calls:
        if call.exact is not None:
            _require_selected(call, call.exact)
        states, valid, scale = call.states(), call.valid(), call.scale
        q, k, v = (x.to(WIDE) for x in (call.q, call.k, call.v))
        truth.append(attention(call.plan, states, q, k, v, valid, scale).flatten())
        low.append(attention(call.plan, states, call.q, call.k, call.v, valid, scale).flatten())
        outputs.append((call.out if call.planned is None else call.planned).flatten())
    require_within_rounding(
        torch.cat(outputs), torch.cat(low), torch.cat(truth), "a planned call is not what its plan says"
    )


def _require_selected(call: RecordedCall, exact: Tensor) -> None:
    """Every tile was left exact, or not, as the reference does in float64 or, where rounding decides, in q's dtype."""
    tiles = tiles_of(call.plan, call.k.shape[2])
    selected = unpack_bits(exact, tiles.key_tiles)
    agrees = torch.zeros_like(selected)
    for dtype in (WIDE, call.q.dtype):
        q, k, v = (x.to(dtype) for x in (call.q, call.k, call.v))
        _, bits, *_ = block_sparse_attention_eager(
            q, k, v, tiles, layout="bhsd", scale=call.scale, key_mask=call.valid(), token_order=call.plan.token_order,
            selection=call.plan.selection, return_tiles=True, backend="reference",
        )  # fmt: skip
        agrees |= selected == unpack_bits(bits, tiles.key_tiles)
        if bool(agrees.all()):
            return
    raise AssertionError(f"{int((~agrees).sum())} of {selected.numel()} tiles were not selected as the plan says")
