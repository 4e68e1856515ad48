"""Runs calls of layers that are dense in turn: what their tiles leave out is kept and added to the calls after."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from dit_accel_kernels import selected_tiles
from torch import Tensor

from ..methods.base import AttentionHandler
from ..plan.call import Call
from ..plan.context import CallContext
from ..plan.plan import AttentionPlan
from ..plan.rests import KeptRest, Rests, merged, stored
from ..plan.tiling import exact_bits
from .kernel_call import Launched, with_values

Launch = Callable[[AttentionPlan], Launched]
"""Runs a plan of a given call, with its LSE."""


def turned(handlers: Sequence[AttentionHandler], context: CallContext) -> tuple[Rests | None, CallContext]:
    """Return whose layers take turns to be dense, None where nobody's do, and the context with the call's turn."""
    asking = [one for one in handlers if one.rests is not None]
    if not asking:
        return None, context
    one = next((one for one in asking if one.rests is not None and one.rests.cached), asking[0])
    assert one.rests is not None
    return one.rests, one.rests.turned(context, one.name)


def with_rest(
    rests: Rests, plan: AttentionPlan, call: Call, context: CallContext, launch: Launch
) -> tuple[Launched, AttentionPlan]:
    """Return what a call gives over its tiles and the rest together, and the plan that says what it computed.

    A dense turn is two kernel calls over complementary tiles, which take as long as one over all; the votes of a
    method cost one more over what they drop.

    Args:
        rests: what is kept.
        plan: what the methods say, with tiles.
        call: the call, its keys centred where the plan says so.
        context: where it stands, with its turn.
        launch: runs a plan of this call.
    """
    bare = replace(plan, identity_mix=None, identity_rows=None, only_values=False)
    if context.turn == "frozen":
        known = rests.kept[context.key]
        bare = bare.only(known.exact)
        given = launch(bare)
        if known.out is not None and known.lse is not None:
            device = given.out.device
            rest = known.out.read(device), known.lse.to(device, non_blocking=True)
            given = given._replace(out=merged(given.out, given.lse, *rest))
        plan = replace(plan, tiles=bare.tiles, selection=bare.selection)
        return given._replace(out=with_values(plan, call, given.out)), plan
    given, kept = _dense(rests, bare, call, launch)
    rests.keep(context.key, kept)
    return given._replace(out=with_values(plan, call, given.out)), plan.whole()


def _dense(rests: Rests, plan: AttentionPlan, call: Call, launch: Launch) -> tuple[Launched, KeptRest]:
    """Return a dense call by two over its tiles and over all others, and what is kept of it."""
    exact, every = _exact(plan, call), exact_bits(plan.all_tiles(), call.q.shape[1])
    given, rest = launch(plan.only(exact, voting=True)), None
    out, total = given.out, given.lse
    if not plan.is_dense:
        rest = launch(plan.only(every & ~exact))
        out, total = merged(out, total, rest.out, rest.lse), total.logaddexp(rest.lse)
    if given.kept is not None:  # what the votes drop leaves the tiles and joins the rest
        dropped = launch(plan.only(exact & ~given.kept))
        exact = exact & given.kept
        rest = dropped if rest is None else _joined(rest, dropped)
    kept = KeptRest(exact=exact)
    if rest is not None:
        kept.out, kept.lse = stored(rest.out, rests.dtype), rest.lse
        if rests.memory is not None:
            kept.gain = float((rest.lse - total).exp().nan_to_num(0.0).mean())
    return given._replace(out=out, exact=None), kept


def _joined(one: Launched, other: Launched) -> Launched:
    """Return attention over the keys of two disjoint sets."""
    return Launched(merged(one.out, one.lse, other.out, other.lse), lse=one.lse.logaddexp(other.lse))


def _exact(plan: AttentionPlan, call: Call) -> Tensor:
    """Return the tiles that a plan leaves exact, and those that are pinned, bits int32 [B, H, NQ, W]."""
    tiles, arguments = plan.kernel_arguments(call)
    if plan.selection is None:
        return exact_bits(tiles, call.q.shape[1]).expand(*call.q.shape[:2], -1, -1).contiguous()
    q, k = call.as_held(call.q, call.k)
    exact = selected_tiles(q, k, tiles, **arguments)
    return exact if plan.selection.pinned is None else exact | plan.selection.pinned
