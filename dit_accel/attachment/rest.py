"""Runs calls of layers that are dense in turn: what is missing without it is kept, and added to the calls after."""

from collections.abc import Sequence
from dataclasses import replace

from dit_accel_kernels import selected_tiles
from torch import Tensor

from ..methods.base import AttentionHandler
from ..plan.call import Call
from ..plan.context import CallContext
from ..plan.plan import AttentionPlan, Launched
from ..plan.rests import KeptRest, Rests, stored
from ..plan.tiling import exact_bits
from .beside import Launch, Turn, with_others
from .kernel_call import with_values


def turned(handlers: Sequence[AttentionHandler], context: CallContext) -> tuple[Rests | None, CallContext]:
    """Return whose layers take turns to be dense, None where nobody's do, and the context with the call's turn."""
    asking = [one for one in handlers if one.rests is not None]
    if not asking:
        return None, context
    one = next((one for one in asking if one.rests is not None and one.rests.cached), asking[0])
    assert one.rests is not None
    return one.rests, one.rests.turned(context, one.name)


def run_turn(
    plan: AttentionPlan, call: Call, context: CallContext, rests: Rests | None, turn: Turn | None, launch: Launch
) -> tuple[Launched, AttentionPlan, Turn]:
    """Return what a call of a layer that keeps a rest gives, the plan that says what it computed, and its turn.

    ``turn`` is that of the call that it runs beside; None: there is none. The others are as in `with_rest`.
    """
    if turn is None:
        assert rests is not None
        return with_rest(rests, plan, call, context, launch)
    out = turn.run(plan.without_values(), launch, call.q.shape[1])
    return Launched(with_values(plan, call, out)), plan if turn.exact is None else plan.whole(), turn


def with_rest(
    rests: Rests, plan: AttentionPlan, call: Call, context: CallContext, launch: Launch
) -> tuple[Launched, AttentionPlan, Turn]:
    """Return what a call gives over its tiles and the rest together, the plan that says what it computed, and its turn.

    A dense turn is two kernel calls over complementary tiles, which take as long as one over all; where a method votes,
    one more is of the tiles that it keeps.

    Args:
        rests: what is kept.
        plan: what the methods say, with tiles.
        call: the call, its keys centred where the plan says so.
        context: where it stands, with its turn.
        launch: runs a plan of this call.
    """
    bare = plan.without_values()
    rest = rests.reading(context.key, call.q.device)
    if context.turn == "frozen":
        kept = rests.kept[context.key]
        bare = bare.only(kept.exact)
        given = launch(bare)
        if rest is not None:
            given = given._replace(out=given.out + rest.read(given.out.device))
        plan, turn = replace(plan, tiles=bare.tiles, selection=bare.selection), Turn(rest=kept.rest)
        return given._replace(out=with_values(plan, call, given.out)), plan, turn
    given, kept, turn = _dense(rests, bare, call, launch)
    rests.keep(context.key, kept)
    return given._replace(out=with_values(plan, call, given.out)), plan.whole(), turn


def _dense(rests: Rests, plan: AttentionPlan, call: Call, launch: Launch) -> tuple[Launched, KeptRest, Turn]:
    """Return a dense call by two over its tiles and over all others, and what is kept of it."""
    exact = _exact(plan, call)
    given, turn = launch(plan.only(exact, voting=True)), Turn(exact=exact)
    out, sparse = with_others(plan, exact, given, launch, call.q.shape[1]), given.out
    if given.kept is not None:  # the calls to come have the tiles that the votes keep
        exact = exact & given.kept
        sparse = launch(plan.only(exact)).out
    rest = out - sparse
    gain = 0.0 if rests.memory is None else float(rest.float().norm() / out.float().norm().clamp(min=1e-12))
    kept = KeptRest(exact=exact, rest=stored(rest, rests.dtype), gain=gain)
    return given._replace(out=out, exact=None), kept, turn


def _exact(plan: AttentionPlan, call: Call) -> Tensor:
    """Return the tiles that a plan leaves exact, and those that are pinned, bits int32 [B, H, NQ, W]."""
    tiles, arguments = plan.kernel_arguments(call)
    if plan.selection is None:
        return exact_bits(tiles, call.q.shape[1]).expand(*call.q.shape[:2], -1, -1).contiguous()
    q, k = call.as_held(call.q, call.k)
    exact = selected_tiles(q, k, tiles, **arguments)
    return exact if plan.selection.pinned is None else exact | plan.selection.pinned
