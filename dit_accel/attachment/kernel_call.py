"""Smaller plans and calls than those that methods made: only some rows, or without lists that gain nothing."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from dit_accel_kernels import FrameDecay, TileLists, selected_tiles, speed_over_dense
from torch import Tensor

from ..methods.base import AttentionHandler
from ..plan.call import Call
from ..plan.context import CallContext
from ..plan.exact_rows import dense_rows
from ..plan.plan import AttentionPlan, KernelResult
from ..plan.rests import Copy, KeptRest, Rests, Stored, stored
from ..plan.tiling import exact_bits
from ..report.recorder import Recorder
from .beside import Launch, Turn, with_others
from .layers import AttentionLayer

LEAST_SPEED = 0.97
"""Speed over dense attention below which lists gain nothing; what is nearer to 1 may be the measurement's error."""

RunKernel = Callable[[AttentionPlan, Call, Recorder], KernelResult]
"""Runs a plan's kernel call and counts it; the keys are centred already."""


def without_slow_lists(plan: AttentionPlan, call: Call, context: CallContext, recorder: Recorder) -> AttentionPlan:
    """Return a plan whose lists only save time without them where dense attention takes less; the report says so.

    Never where a backend was named, where the plan needs our kernels for more than its lists, or where it was not
    measured what they gain.
    """
    tiles, dense = plan.tiles, replace(plan, tiles=None, token_order=None)
    if tiles is None or call.backend != "auto" or dense.needs_kernel:
        return plan
    if plan.reused is not None or call.rows is not None:
        return plan
    tiles, arguments = plan.kernel_arguments(call)
    q, k, v = call.as_held(call.q, call.k, call.v)
    speed = speed_over_dense(q, k, v, tiles, **arguments)
    if speed is None or speed >= LEAST_SPEED:
        return plan
    recorder.backends.add("dense")
    recorder.stays_dense(context, "backend")
    recorder.note(
        f"{context.transformer}: {tiles.density:.1%} of the tiles took {1 / speed:.2f} times as long as dense "
        "attention here, so such calls went to the model's own; a named backend would run them"
    )
    return dense


def by_rows(plan: AttentionPlan, call: Call, out: Tensor) -> Iterator[tuple[AttentionPlan, Call]]:
    """Yield the plan and call of the rows of the batch that follow one list of computed tokens, list by list.

    Each plan holds its own rows of ``out`` [B, H, S, D], what is reused, to be written to.
    """
    reused, count = plan.reused, len(call.q)
    assert reused is not None
    lists = len(reused.rows)
    if lists == 1:
        yield replace(plan, reused=replace(reused, out=out)), call
        return
    for number, tokens in enumerate(reused.rows):
        rows = slice(number, None, lists)
        keys = None if reused.keys is None else reused.keys[number : number + 1]
        part = replace(reused, rows=(tokens,), out=out[rows], keys=keys)
        yield replace(plan.of_rows(rows, count, call.q.shape[1]), reused=part), call.of_rows(rows)


def computed_rows(
    plan: AttentionPlan, call: Call, rows: Tensor, seen: Tensor | None = None
) -> tuple[AttentionPlan, Call, Tensor]:
    """Return the smaller plan and call that compute only some rows, and which tokens these are.

    Without tiles it is a call of the same keys and fewer queries. With tiles every row of a tile that holds one of
    these tokens is computed, by that tile's own list, in the tiles' order. A routing's statistics leave out the key
    tiles that are pinned in all rows of the call, which may be more of them here.

    Args:
        rows: int64 [G], the tokens that are wanted, rising.
        seen: bool [1, S], the keys that they see; None: all.
    """
    mask, decay = call.mask, plan.frame_decay
    if plan.tiles is not None:
        return _tiled_rows(plan, call, rows, seen)
    if mask is not None and mask.ndim == 4 and mask.shape[2] > 1:
        mask = mask[:, :, rows]
    k, v = call.k, call.v
    if seen is not None:
        keys = seen[0].nonzero()[:, 0]
        k, v = k.index_select(2, keys), v.index_select(2, keys)
        mask = None if mask is None else mask[..., keys]
    if decay is not None:
        k_frames = decay.k_frames if seen is None else decay.k_frames[seen[0]]
        decay = FrameDecay(table=decay.table, q_frames=decay.q_frames[rows], k_frames=k_frames)
    small = replace(call, q=call.queries(rows), k=k, v=v, mask=mask, rows=None)
    return replace(plan, reused=None, frame_decay=decay), small, rows


def _tiled_rows(
    plan: AttentionPlan, call: Call, rows: Tensor, seen: Tensor | None
) -> tuple[AttentionPlan, Call, Tensor]:
    tiles, order, selection, decay = plan.tiles, plan.token_order, plan.selection, plan.frame_decay
    assert tiles is not None
    tokens, size, device = call.tokens, tiles.block_q, call.q.device
    order = torch.arange(tokens, device=device) if order is None else order
    wanted = torch.zeros(tiles.query_tiles * size, dtype=torch.bool, device=device)
    place = torch.empty_like(order).index_copy_(0, order, torch.arange(tokens, device=device))
    wanted[:tokens].index_put_((place[rows],), torch.ones((), dtype=torch.bool, device=device))
    chosen = wanted.view(-1, size).any(1).nonzero()[:, 0]
    positions = (chosen[:, None] * size + torch.arange(size, device=device)).flatten()
    rows = order[positions[positions < tokens]]
    mask = call.key_mask()
    if seen is not None:
        mask = seen.expand(len(call.k), -1) if mask is None else mask & seen
    small = replace(
        call,
        q=call.queries(rows),
        k=call.k.index_select(2, order),
        v=call.v.index_select(2, order),
        mask=None if mask is None else mask[:, order],
        rows=None,
    )
    lists = TileLists.from_states(
        tiles.states()[:, chosen], block_q=size, block_k=tiles.block_k, num_q=len(rows), num_k=tokens
    )
    if selection is not None:
        keep, pinned = selection.keep, selection.pinned
        selection = replace(
            selection,
            keep=None if keep is None else keep[:, :, chosen].contiguous(),
            pinned=None if pinned is None else pinned[chosen].contiguous(),
        )
    if decay is not None:
        decay = FrameDecay(table=decay.table, q_frames=decay.q_frames[rows], k_frames=decay.k_frames[order])
    cut = replace(plan, reused=None, tiles=lists, token_order=None, selection=selection, frame_decay=decay)
    return cut, small, rows


def run_dense(plan: AttentionPlan, call: Call, layer: AttentionLayer) -> Tensor:
    """Return the output of a plan that needs no kernel of ours, by the user's own dense attention."""
    if plan.skips_logits:
        return call.values()
    assert layer.dense is not None
    q = call.q
    if plan.head_scale is not None:
        q = (q * plan.head_scale.reshape(-1, q.shape[1])[:, :, None, None]).to(q.dtype)
    q, k, v = call.as_held(q, call.k, call.v)
    out = call.heads_first(layer.dense(q, k, v, call.mask, call.scale))
    return with_values(plan, call, out)


def with_values(plan: AttentionPlan, call: Call, out: Tensor) -> Tensor:
    """Return a call's output [B, H, S, D] with the share of V that the plan mixes into it."""
    share = plan.value_share(out.shape[1], out.dtype, call.rows)
    return out if share is None else torch.lerp(out, call.values(), share.expand_as(out))


def override_rows(plan: AttentionPlan, call: Call, *outs: Tensor) -> None:
    """Write the rows that the plan computes under a rule of their own into outputs [B, H, S, D]."""
    assert plan.row_override is not None
    rows = at = plan.row_override.rows
    if call.rows is not None:
        at = torch.isin(call.rows, rows).nonzero()[:, 0]
        rows = call.rows[at]
    if not len(rows):
        return
    computed = dense_rows(plan, call, rows, plan.row_override.keys)
    for out in outs:
        out.index_copy_(2, at, computed)


def run_own_rows(plan: AttentionPlan, call: Call, layer: AttentionLayer, recorder: Recorder, run: RunKernel) -> Tensor:
    """Return the rows of a plan that are this process's under ring attention, [B, H, S', D]."""
    bare = replace(plan.without_values(), row_override=None, reused=None)
    assert call.rows is not None
    cut, small, rows = computed_rows(bare, call, call.rows)
    out = run(cut, small, recorder).out if cut.needs_kernel else run_dense(cut, small, layer)
    # whole tiles were computed, in their order: pick this process's rows out of them
    position = torch.empty(call.tokens, dtype=torch.int64, device=rows.device)
    position.index_copy_(0, rows, torch.arange(len(rows), device=rows.device))
    return with_values(plan, call, out.index_select(2, position[call.rows]))


def run_reusing(
    plan: AttentionPlan, call: Call, context: CallContext, layer: AttentionLayer, recorder: Recorder, run: RunKernel
) -> Tensor:
    """Return the output of a plan that reuses rows: what it reuses, and the others computed, a smaller call a list."""
    assert plan.reused is not None
    out = plan.reused.out.clone()
    for part_plan, part in by_rows(plan, call, out):
        run_rows(part_plan, part, context, layer, recorder, run)
    return out


def run_rows(
    plan: AttentionPlan, call: Call, context: CallContext, layer: AttentionLayer, recorder: Recorder, run: RunKernel
) -> None:
    """Write the rows that a plan of `by_rows` computes, one smaller call, over what it reuses."""
    reused = plan.reused
    assert reused is not None
    if not len(reused.rows[0]):
        return recorder.planned_call(context, plan, rows=0.0)
    cut, small, rows = computed_rows(plan.without_values(), call, reused.rows[0], reused.keys)
    share = len(rows) * small.tokens / (call.q.shape[2] * call.tokens)
    if plan.skips_logits:
        rows, share, out, exact = reused.rows[0], 0.0, None, None
    elif not cut.needs_kernel:
        out, exact = run_dense(cut, small, layer), None
    else:
        small = small.with_keys(cut.centred(small.k))
        out, exact, *_ = run(cut, small, recorder)
    recorder.planned_call(context, cut, exact, share)
    part = replace(call, q=call.queries(rows), rows=rows)
    out = part.values() if out is None else with_values(plan, part, out)
    reused.out.index_copy_(2, rows, out.to(reused.out.dtype))


def stays_dense(handlers: Sequence[AttentionHandler], call: Call, context: CallContext, recorder: Recorder) -> bool:
    """Tell whether a mask that is not key padding keeps a call dense; the report says so."""
    mask = call.mask
    assert mask is not None
    if not handlers or not all(handler.votes for handler in handlers) or call.hides_keys:
        return False
    recorder.forward(context.transformer, context.branch, context.step_index, 1)
    recorder.stays_dense(context, "mask")
    recorder.note(
        f"{context.transformer} passes masks {mask.dtype} {list(mask.shape)} that are not key padding; such calls "
        "stayed dense"
    )
    return True


def turned(handlers: Sequence[AttentionHandler], context: CallContext) -> tuple[Rests | None, CallContext]:
    """Return the rests of the method whose layers take turns, or None, and the context with the call's turn."""
    asking = [handler for handler in handlers if handler.rests is not None]
    if not asking:
        return None, context
    handler = next((handler for handler in asking if handler.rests is not None and handler.rests.cached), asking[0])
    assert handler.rests is not None
    return handler.rests, handler.rests.turned(context, handler.name)


def run_turn(
    plan: AttentionPlan, call: Call, context: CallContext, rests: Rests | None, turn: Turn | None, launch: Launch
) -> tuple[KernelResult, AttentionPlan, Turn]:
    """Run a call of a layer that keeps a rest; return its result, the plan of what it computed, and its turn.

    ``turn`` is that of the call that it runs beside; None: there is none. The others are as in `with_rest`.
    """
    if turn is None:
        assert rests is not None
        return with_rest(rests, plan, call, context, launch)
    out = turn.run(plan.without_values(), launch, call.q.shape[1])
    return KernelResult(with_values(plan, call, out)), plan if turn.exact is None else plan.whole(), turn


def with_rest(
    rests: Rests, plan: AttentionPlan, call: Call, context: CallContext, launch: Launch
) -> tuple[KernelResult, AttentionPlan, Turn]:
    """Run a call over its tiles and add the rest; return its result, the plan of what it computed, and its turn.

    A dense turn is two kernel calls over complementary tiles, which take as long as one over all; where a method votes,
    one more is of the tiles that it keeps.
    """
    bare = plan.without_values()
    rest = rests.reading(context.key, call.q.device)
    if context.turn == "frozen":
        entry = rests.kept[context.key]
        bare = bare.only(entry.exact)
        result = launch(bare)
        if rest is not None:
            result = result._replace(out=result.out + rest.read(result.out.device))
        plan, turn = replace(plan, tiles=bare.tiles, selection=bare.selection), Turn(rest=entry.rest)
        return result._replace(out=with_values(plan, call, result.out)), plan, turn
    result, entry, turn = _dense(rests, bare, call, launch)
    if (last := rests.kept.get(context.key)) is not None:
        rests.measured.append((context, lists_error(bare, last, rest, context, result.out, launch)))
    rests.keep(context.key, entry)
    return result._replace(out=with_values(plan, call, result.out)), plan.whole(), turn


def _dense(rests: Rests, plan: AttentionPlan, call: Call, launch: Launch) -> tuple[KernelResult, KeptRest, Turn]:
    """Run a dense call as two, over its tiles and over all others; return the result and what is kept of it."""
    exact = _exact(plan, call)
    result, turn = launch(plan.only(exact, voting=True)), Turn(exact=exact)
    out, sparse = with_others(plan, exact, result, launch, call.q.shape[1]), result.out
    if result.kept is not None:  # the calls to come have the tiles that the votes keep
        exact = exact & result.kept
        sparse = launch(plan.only(exact)).out
    rest = out - sparse
    gain = 0.0 if rests.memory is None else float(rest.float().norm() / out.float().norm().clamp(min=1e-12))
    entry = KeptRest(exact=exact, rest=stored(rest, rests.dtype), gain=gain)
    return result._replace(out=out, exact=None), entry, turn


def lists_error(
    plan: AttentionPlan, last: KeptRest, rest: Stored | Copy | None, context: CallContext, out: Tensor, launch: Launch
) -> Tensor:
    """Return the squares [3] of what the last turn's tiles and rest, and tiles alone, are off by, and of the output.

    Of many query tiles an eighth is measured, in each step others, of few all: a kernel call over their tiles.
    """
    count = last.exact.shape[2]
    every = min(max(count // 8, 1), 8)
    rows = torch.arange(count, device=out.device) % every == (context.step_index + context.layer) % every
    some = launch(plan.only(last.exact * rows[:, None]))
    seen = (some.lse > -torch.inf)[..., None]
    alone = some.out.float() - out.float()
    off = alone if rest is None else alone + rest.read(out.device)
    return torch.stack([(x * seen).square().sum() for x in (off, alone, out.float())])


def _exact(plan: AttentionPlan, call: Call) -> Tensor:
    """Return the tiles that a plan leaves exact, and those that are pinned, bits int32 [B, H, NQ, W]."""
    tiles, arguments = plan.kernel_arguments(call)
    if plan.selection is None:
        return exact_bits(tiles, call.q.shape[1]).expand(*call.q.shape[:2], -1, -1).contiguous()
    q, k = call.as_held(call.q, call.k)
    exact = selected_tiles(q, k, tiles, **arguments)
    return exact if plan.selection.pinned is None else exact | plan.selection.pinned
