"""One planned attention call under ring attention: a process's own rows of it, over the keys of all.

diffusers' ring attention gathers the keys and values of all processes, attends to one process's after the other, and
merges the parts by their log-sum-exp. It gathers them at once, so that one call over all of them holds no more, and
needs no merge: also a pooled tile may lie across two processes' tokens. What such a call needs is a plan that follows
from the tokens' places alone, of which a process computes its own rows.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import ConfigError
from ..plan.call import Call, call_of
from ..plan.exact_rows import dense_rows
from ..plan.plan import AttentionPlan, ReusedRows
from .backward import NO_TICKET
from .execution import Execution
from .kernel_call import computed_rows
from .observed import PlannedCall


def attend(
    execution: Execution,
    number: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    grid: Sequence[int],
    tokens_first: bool,
    scale: float | None,
    differentiate: bool,
) -> tuple[Tensor, Tensor]:
    """Plan one attention call and compute a process's rows of it; as `Execution.attend`, with queries of these alone.

    Raises:
        ConfigError: as there, and where a gradient is wanted.
    """
    layer = execution.layers[number]
    ring = layer.state.ring
    assert ring is not None
    if differentiate:
        raise ConfigError(
            "methods on attention have no gradient under ring attention; train with ContextParallelConfig("
            "ulysses_degree=...)"
        )
    call = call_of(q, k, v, mask, scale, execution.backend, tokens_first)
    q = call.q
    given = call
    call = replace(call, q=q.new_zeros(()).expand(*q.shape[:2], call.tokens, q.shape[3]))
    context = execution._context(layer, call, grid, differentiate)
    handlers = execution.acting(context, layer.depth)
    dense = execution._stays_dense(handlers, call, context)
    plan = AttentionPlan() if dense else execution._plan(handlers, call, context)
    call = call.with_keys(plan.centred(call.k))
    if not dense:
        execution.recorder.sparse_call(context, plan)
    if plan.skips_logits:
        out = call.values().index_select(2, ring.own)
    else:
        cut, small, at = _own_rows(plan, call, q, ring.own)
        if cut.needs_kernel:
            out = execution._run_kernel(cut, small)[0].index_select(2, at)
        else:
            out = execution._run_dense(cut, small, layer)
        out = _finished(plan, call, q, ring.own, out)
    planned = None
    if plan.led is not None:
        first, last = (int((ring.own < token).sum()) for token in (plan.led.tokens.start, plan.led.tokens.stop))
        planned, out = out, replace(plan.led, tokens=slice(first, last)).applied(out)
    if not dense:
        execution.show(PlannedCall(plan=plan, context=context, call=given, out=out, planned=planned, rows=ring.own))
    return call.as_held(out)[0], torch.tensor(NO_TICKET)


def _own_rows(plan: AttentionPlan, call: Call, q: Tensor, own: Tensor) -> tuple[AttentionPlan, Call, Tensor]:
    """Return the plan and call that compute a process's rows, and where among their rows these are.

    Args:
        plan: of the whole call.
        call: without queries, its keys centred where the plan says so.
        q: this process's queries, [B, H, S', D].
        own: int64 [S'], its tokens.
    """
    bare = replace(plan, row_override=None, identity_mix=None, identity_rows=None, only_values=False)
    cut, small, rows = computed_rows(replace(bare, reused=ReusedRows(rows=(own,), out=q)), call)
    place = torch.empty(call.tokens, dtype=torch.int64, device=q.device)
    place.index_copy_(0, rows, torch.arange(len(rows), device=q.device))
    at = place[own]
    asked = q.new_zeros(*q.shape[:2], len(rows), q.shape[3]).index_copy_(2, at, q)
    asked = call.as_held(call.as_held(asked)[0].contiguous())[0]
    return cut, replace(small, q=asked), at


def _finished(plan: AttentionPlan, call: Call, q: Tensor, own: Tensor, out: Tensor) -> Tensor:
    """Return a process's output [B, H, S', D] with what the plan does to rows besides its tiles: own rules, mixed V."""
    weight = plan.value_share(q.shape[1], out.dtype, own)
    if weight is not None:
        values = call.v.index_select(2, own).repeat_interleave(q.shape[1] // call.v.shape[1], 1)
        out = torch.lerp(out, values, weight.expand_as(out))
    if plan.row_override is None:
        return out
    at = torch.isin(own, plan.row_override.rows).nonzero()[:, 0]
    if not len(at):
        return out
    whole = q.new_zeros(call.q.shape).index_copy_(2, own, q)
    rows = dense_rows(plan, replace(call, q=whole), own[at], plan.row_override.keys)
    return out.index_copy(2, at, rows)
