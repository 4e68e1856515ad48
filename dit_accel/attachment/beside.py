"""How the attention calls of a forward ran, for the forwards that run beside it: these run alike, and keep nothing.

What guidance leads away from is the difference of two forwards, so all that methods leave out must be left out of both:
a call beside another takes over its tiles, turns, rests and corrections, and no method is asked again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..methods.base import AttentionHandler, Correction
from ..plan.context import CallContext
from ..plan.layout import TokenLayout
from ..plan.plan import AttentionPlan, KernelResult
from ..plan.rests import Stored, merged
from ..plan.tiling import exact_bits

Launch = Callable[[AttentionPlan], KernelResult]
"""Runs a plan of a given call, with its LSE."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Turn:
    """What becomes of the tiles that a call's lists leave out, where its layer takes turns to be dense."""

    exact: Tensor | None = None  # they are computed beside these, bits int32 [B, H, NQ, W]; None: they are not
    rest: Stored | None = None  # they are what this is, kept from the last dense call; None: they are left out

    def run(self, plan: AttentionPlan, launch: Launch, heads: int) -> Tensor:
        """Run a plan without values, [B, H, S, D]."""
        if self.exact is None:
            out = launch(plan).out
            return out if self.rest is None else out + self.rest.read(out.device)
        result = launch(plan.only(self.exact))
        return with_others(plan, self.exact, result, launch, heads)

    def of_rows(self, rows: Sequence[int]) -> "Turn":
        """Return the turn of some rows of the batch."""
        index = list(rows)
        exact = None if self.exact is None else self.exact[index]
        return Turn(exact=exact, rest=None if self.rest is None else self.rest.mapped(lambda x: x[index]))


def with_others(plan: AttentionPlan, exact: Tensor, result: KernelResult, launch: Launch, heads: int) -> Tensor:
    """Merge a call over some tiles with one over all others, where there are any."""
    if plan.is_dense:
        return result.out
    rest = launch(plan.only(exact_bits(plan.all_tiles(), heads) & ~exact))
    return merged(result.out, result.lse, rest.out, rest.lse)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunFacts:
    """How one attention call ran."""

    plan: AttentionPlan  # by which, without what guidance planned: its routing is settled, and it votes no more
    batch: int  # its rows
    handlers: tuple[AttentionHandler, ...]  # the methods that planned it
    turn: Turn | None = None  # of its layer
    corrections: tuple[Correction, ...] = ()  # what corrected its output

    def ended(
        self, plan: AttentionPlan, exact: Tensor | None, turn: Turn | None, corrections: tuple[Correction, ...]
    ) -> "RunFacts":
        """Return the facts of a call of this plan, and of what guidance added to it, once it has run.

        ``exact``: the tiles that its selection left exact, bits int32 [B, H, NQ, W]; None: they are not known.
        """
        base = self.plan
        if turn is None or turn.exact is None:
            base = replace(base, tiles=plan.tiles, token_order=plan.token_order, selection=plan.selection)
        if base.selection is not None:
            chosen = base.selection
            base = replace(base, selection=replace(chosen, vote=None)) if exact is None else base.followed(exact)
        return replace(self, plan=base, turn=turn, corrections=corrections)

    def of_rows(self, rows: Sequence[int], heads: int) -> "RunFacts":
        """Return the facts of some rows of the batch."""
        turn = None if self.turn is None else self.turn.of_rows(rows)
        corrections = tuple(correction.of_rows(rows) for correction in self.corrections)
        plan = self.plan.of_rows(list(rows), self.batch, heads)
        if self.plan.reused is not None:
            plan = replace(plan, reused=self.plan.reused.of_rows(rows))
        return replace(self, plan=plan, batch=len(rows), turn=turn, corrections=corrections)


class CallsMade:
    """The attention calls of the forwards that others may run beside."""

    def __init__(self) -> None:
        self.wanted = False  # methods are attached that may run forwards beside others
        self._calls: dict[tuple[str, int, TokenLayout], dict[int, RunFacts]] = {}
        self._batches: dict[str, int] = {}

    def note(self, context: CallContext, batch: int, facts: RunFacts) -> None:
        """Keep the facts of a call, in a forward of ``batch`` rows, unless it is trained or runs beside another."""
        if self.wanted and context.beside is None and not (context.training or context.differentiate):
            self._calls.setdefault((context.branch, context.layer, context.layout), {})[context.row] = facts
            self._batches[context.branch] = batch

    def find(self, context: CallContext, batch: int, heads: int) -> RunFacts | None:
        """Find the call that another one runs beside; None: none ran, or not over the same rows and grid."""
        branch = context.beside or ""
        calls, theirs = self._calls.get((branch, context.layer, context.layout), {}), self._batches.get(branch)
        if context.rows is None and batch != theirs:
            return None
        rows = tuple(range(batch)) if context.rows is None else context.rows
        rows = rows[context.row * context.batch : (context.row + 1) * context.batch]
        whole = calls.get(0)
        if whole is not None and whole.batch == theirs:
            return whole if rows == tuple(range(whole.batch)) else whole.of_rows(rows, heads)
        ran = calls.get(rows[0]) if len(rows) == 1 else None  # each row was attended by itself
        return ran if ran is not None and ran.batch == 1 else None

    def clear(self) -> None:
        """Forget all calls."""
        self._calls.clear()
