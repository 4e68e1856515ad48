"""What a plan hands to the kernels: all of it, or only those rows that it does not reuse."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from dit_accel_kernels import FrameDecay, TileLists, predicted_speedup, resolve_backend
from torch import Tensor

from ..plan.call import Call
from ..plan.context import CallContext
from ..plan.plan import AttentionPlan
from ..plan.tiling import TILE, full_tiles
from ..report.recorder import Recorder


def kernel_arguments(plan: AttentionPlan, call: Call) -> tuple[TileLists, dict[str, Any]]:
    """Return the tiles and the further arguments of the kernels' call."""
    tiles = plan.tiles
    if tiles is None:
        tiles = full_tiles(call.q.shape[2], call.tokens, TILE, str(call.q.device))
    return tiles, {
        **call.kernel_layout,
        "scale": call.scale,
        "head_scale": plan.head_scale,
        "key_mask": call.key_mask(),
        "frame_decay": plan.frame_decay,
        "token_order": plan.token_order,
        "identity_mix": plan.identity_mix,
        "identity_rows": plan.identity_rows,
        "selection": plan.selection,
        "backend": call.backend,
    }


def backend_of(plan: AttentionPlan, call: Call, tiles: TileLists, *, differentiate: bool) -> str:
    """Return the backend that runs a plan over its tiles, or of which a backward may ask."""
    selection, decay = plan.selection, plan.frame_decay
    votes = selection is not None and selection.vote is not None
    lists = None if votes or decay is not None or differentiate else tiles
    return resolve_backend(call.backend, call.q.device, call.q.dtype, call.q.shape[-1], lists)


def without_slow_lists(plan: AttentionPlan, call: Call, context: CallContext, recorder: Recorder) -> AttentionPlan:
    """Return a plan whose lists only save time without them where dense attention takes less; the report says so.

    Never where a backend was named, where the plan needs our kernels for more than its lists, or where the kernels'
    table does not tell what they gain.
    """
    tiles, dense = plan.tiles, replace(plan, tiles=None, token_order=None)
    if tiles is None or call.backend != "auto" or dense.needs_kernel or plan.reused is not None:
        return plan
    speed = predicted_speedup(call.q.device, call.q.dtype, tiles)
    if speed is None or speed >= 1:
        return plan
    recorder.backends.add("dense")
    recorder.note(
        f"{context.transformer}: {tiles.density:.1%} of the tiles take {1 / speed:.2f} times as long as all of them by "
        "the model's own attention on this processor, so calls of so many went there; a named backend would run them"
    )
    return dense


def followed(plan: AttentionPlan, exact: Tensor) -> AttentionPlan:
    """Return the plan as its backward follows it: the tiles that the forward chose, without routing or voting again."""
    selection = plan.selection
    assert selection is not None
    routed = None if selection.routing is None else exact
    return replace(plan, selection=replace(selection, routing=None, vote=None, routed=routed))


def by_rows(plan: AttentionPlan, call: Call, out: Tensor) -> Iterator[tuple[AttentionPlan, Call]]:
    """Yield the plan and call of the rows of the batch that follow one list of computed tokens, list by list.

    Args:
        plan: of the whole batch.
        call: likewise.
        out: [B, H, S, D], what is reused, to be written to; each plan holds its own rows of it.
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
        own = replace(reused, rows=(tokens,), out=out[rows], keys=keys)
        yield replace(plan.of_rows(rows, count, call.q.shape[1]), reused=own), call.of_rows(rows)


def computed_rows(plan: AttentionPlan, call: Call) -> tuple[AttentionPlan, Call, Tensor]:
    """Return the smaller plan and call that compute only the rows that are not reused, and which tokens these are.

    All rows of the batch follow one list of them, as those that `by_rows` yields.

    Without tiles it is a call of the same keys and fewer queries. With tiles every row of a tile that holds one of
    these tokens is computed, by that tile's own list, in the tiles' order. A routing's statistics leave out the key
    tiles that are pinned in all rows of the call, which may be more of them here.
    """
    reused = plan.reused
    assert reused is not None
    (rows,), mask = reused.rows, call.mask
    if plan.tiles is None:
        if mask is not None and mask.ndim == 4 and mask.shape[2] > 1:
            mask = mask[:, :, rows]
        k, v = call.k, call.v
        if reused.keys is not None:
            seen = reused.keys[0].nonzero()[:, 0]
            k, v = k.index_select(2, seen), v.index_select(2, seen)
            mask = None if mask is None else mask[..., seen]
        small = replace(call, q=call.q.index_select(2, rows), k=k, v=v, mask=mask)
        if plan.frame_decay is None:
            return replace(plan, reused=None), small, rows
        decay = plan.frame_decay
        k_frames = decay.k_frames if reused.keys is None else decay.k_frames[reused.keys[0]]
        decay = FrameDecay(table=decay.table, q_frames=decay.q_frames[rows], k_frames=k_frames)
        return replace(plan, reused=None, frame_decay=decay), small, rows
    return _tiled_rows(plan, call)


def _tiled_rows(plan: AttentionPlan, call: Call) -> tuple[AttentionPlan, Call, Tensor]:
    reused, tiles, order, selection = plan.reused, plan.tiles, plan.token_order, plan.selection
    assert reused is not None
    assert tiles is not None
    tokens, size, device = call.tokens, tiles.block_q, call.q.device
    order = torch.arange(tokens, device=device) if order is None else order
    wanted = torch.zeros(tiles.query_tiles * size, dtype=torch.bool, device=device)
    wanted[:tokens].index_put_((_places(order)[reused.rows[0]],), torch.ones((), dtype=torch.bool, device=device))
    chosen = wanted.view(-1, size).any(1).nonzero()[:, 0]
    places = (chosen[:, None] * size + torch.arange(size, device=device)).flatten()
    rows = order[places[places < tokens]]
    mask = call.key_mask()
    if reused.keys is not None:
        mask = reused.keys.expand(len(call.k), -1) if mask is None else mask & reused.keys
    small = replace(
        call,
        q=call.q.index_select(2, rows),
        k=call.k.index_select(2, order),
        v=call.v.index_select(2, order),
        mask=None if mask is None else mask[:, order],
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
    decay = plan.frame_decay
    if decay is not None:
        decay = FrameDecay(table=decay.table, q_frames=decay.q_frames[rows], k_frames=decay.k_frames[order])
    cut = replace(plan, reused=None, tiles=lists, token_order=None, selection=selection, frame_decay=decay)
    return cut, small, rows


def _places(order: Tensor) -> Tensor:
    """Return the place of each token in an order."""
    return torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
