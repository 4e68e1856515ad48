"""Dense arithmetic under masks, for `frontier_sparse`: what a rule of sparse attention would compute, not how fast.

A call is dense, or each row of query tiles computes its listed keys exactly and takes the rest from an earlier step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tried_rules import (
    TILE,
    Dense,
    Rule,
    dense_call,
    fewest,
    merged,
    most,
    ordered,
    partial,
    pooled,
    rows_of,
    scores_of,
    stored,
    token_order,
    with_pooled,
    with_text,
)

from dit_accel.plan.call import Call
from dit_accel.plan.context import CallContext, Key
from dit_accel.plan.layout import TokenLayout


@dataclass
class Kept:
    """What a layer and branch carry: lists by query tile and key [B, H, NQ, N], the rest, and the last dense call."""

    dense: Dense | None = None
    earlier: Tensor | None = None
    pending: Tensor | None = None
    lists: Tensor | None = None
    rest: tuple[Tensor, Tensor] | None = None
    before: tuple[Tensor, Tensor] | None = None
    delta: Tensor | None = None
    delta_before: Tensor | None = None
    steps: int = 0
    since: tuple[float, float] = (0.0, 1.0)

    def ahead(self, rule: Rule, place: float) -> float:
        """Return how far to go on along the line through the last two dense calls, at 1 as far as they are apart."""
        before, last = self.since
        return rule.line * (place - last) / (last - before)


def place_of(rule: Rule, context: CallContext, step: int) -> float:
    """Return where a step lies on the rest's line: its number, or its noise level."""
    return float(step if rule.along == "steps" or context.sigma is None else context.sigma)


class Tried:
    """Computes the attention calls of one run by a rule, in place of an execution's own.

    Attributes:
        shares: of each call, the share of its pairs that were computed.
        errors: of each sparse call, the relative error of its output to the dense one of the same q, k and v.
        repeats: of each sparse call that follows another, the cosine between the errors of the two.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.shares: list[float] = []
        self.errors: list[float] = []
        self.repeats: list[float] = []
        self._wrong: dict[Key, Tensor] = {}
        self.kept: dict[Key, Kept] = {}
        self.counts: dict[Any, Tensor | int] = {}
        self.stills: dict[Key, Tensor] = {}

    def run(self, plan: Any, call: Call, context: CallContext, *_: Any) -> tuple[Tensor, Any]:
        """Stand for `Execution._run`."""
        with torch.no_grad():
            return self.attend(call, context), plan

    def attend(self, call: Call, context: CallContext, now: Dense | None = None) -> Tensor:
        """Return the output of a call, [B, H, S, D]; ``now`` is the same call computed densely, if that was done."""
        rule, own = self.rule, self.kept.setdefault(context.key, Kept())
        now, order = dense_call(call) if now is None else replace(now), token_order(rule.order, context.layout)
        if order is not None:
            out = self._attended(rule, own, context, ordered(now, order))
            return torch.empty_like(out).index_copy_(2, order, out)
        return self._attended(rule, own, context, now)

    def _attended(self, rule: Rule, own: Kept, context: CallContext, now: Dense) -> Tensor:
        """Return the output of a call in the order of its tiles."""
        step, own.steps, tiles = own.steps, own.steps + 1, now.p.shape[2] // TILE
        fresh = self._fresh(rule, step, context, tiles)
        if fresh is None:
            self._note(own, rule, context, now, torch.ones(tiles, dtype=torch.bool), step)
            self.shares.append(1.0)
            self._wrong.pop(context.key, None)
            return now.out
        self._settle(rule, context)
        out = self._sparse(rule, own, context, now, step)
        if bool(fresh.any()):
            self._note(own, rule, context, now, fresh, step)
            self.shares[-1] += float(fresh.float().mean()) * (1 - self.shares[-1])
            out = torch.where(fresh.repeat_interleave(TILE)[:, None], now.out, out)
        self._watch(context.key, out - now.out, now.out)
        return out

    def _fresh(self, rule: Rule, step: int, context: CallContext, tiles: int) -> Tensor | None:
        """Return which query tiles a step makes anew; None: the call is dense."""
        if step < rule.warm or (context.depth < rule.first and rule.turn != "rows"):
            return None
        row = torch.arange(tiles)
        if not rule.every:
            return torch.zeros(tiles, dtype=torch.bool)
        if rule.turn == "rows":
            return (row + step) % rule.every == 0
        place = context.layer + step if rule.turn == "layers" else step - rule.warm + 1
        return None if place % rule.every == 0 else torch.zeros(tiles, dtype=torch.bool)

    def _note(self, own: Kept, rule: Rule, context: CallContext, now: Dense, rows: Tensor, step: int) -> None:
        """Keep a dense call of which lists are made before the next sparse one, ranked where there may be one."""
        last = own.dense
        if step + 1 >= rule.warm and (context.depth >= rule.first or rule.turn == "rows"):
            now.scores = scores_of(rule, now, last, context.layout)
        own.earlier = last and last.out
        own.dense, own.pending, own.since = now, rows, (own.since[1], place_of(rule, context, step))

    def _settle(self, rule: Rule, context: CallContext) -> None:
        """Make the lists and the rest of the layer's dense call since; the first time share out what layers share."""
        waiting = {
            key: own for key, own in self.kept.items()
            if own.pending is not None and own.dense is not None and key[2] == context.branch
        }  # fmt: skip
        if waiting and (context.branch, "set") not in self.counts:
            self._calibrate(rule, context, waiting)
        if context.key in waiting:
            self._make(rule, context.key, waiting[context.key], context.layout)

    def _calibrate(self, rule: Rule, context: CallContext, waiting: dict[Key, Kept]) -> None:
        """Share one budget out among layers or heads, and choose the heads that stay still."""
        self.counts[context.branch, "set"] = 1
        scores = {key: own.dense.scores for key, own in waiting.items() if own.dense and own.dense.scores is not None}
        if rule.budget in ("model", "heads"):
            every = torch.cat([one.flatten() for one in scores.values()])
            bound = every.topk(round(rule.density * len(every))).values[-1]
            for key, one in scores.items():
                over = one >= bound
                self.counts[key] = over.sum((0, 2, 3)) if rule.budget == "heads" else over.sum((1, 2, 3))
        if rule.budget == "theta":
            for key, one in scores.items():
                flat = one.flatten(2)
                self.counts[key] = flat.topk(round(rule.density * flat.shape[-1]), -1).values[..., -1:, None]
        if rule.still:
            costs = {}
            for key, own in waiting.items():
                dense = own.dense
                if dense is None or dense.scores is None:
                    continue
                other = dense.v if rule.instead == "value" or own.earlier is None else own.earlier
                costs[key] = ((dense.out - other) ** 2).mean((0, 2, 3)) / (dense.out**2).mean((0, 2, 3))
            every = torch.cat([*costs.values()])
            bound = every.topk(round(rule.still * len(every)), largest=False).values[-1]
            self.stills = {**self.stills, **{key: one <= bound for key, one in costs.items()}}

    def _make(self, rule: Rule, key: Key, own: Kept, layout: TokenLayout) -> None:
        """Make the lists and the rest of a dense call, of the query tiles that are pending."""
        dense, rows = own.dense, own.pending
        assert dense is not None
        assert rows is not None
        lists = self._lists(rule, key, dense, layout)
        keep, rest, delta = rows_of(lists), None, None
        if rule.rest not in ("skip", "delta", "delta of pooled"):
            rest = partial(dense, ~keep)
            rest = stored(rest[0], rule.bits), rest[1].half().float() if rule.bits else rest[1]
        if rule.rest == "delta":
            delta = stored(dense.out - partial(dense, keep)[0], rule.bits)
        elif rule.rest == "delta of pooled":
            delta = stored(dense.out - with_pooled(dense, keep), rule.bits)
        elif rule.rest == "delta, fresh weight" and rest:
            delta = stored(rest[0] - partial(dense, keep)[0], rule.bits)
        if own.lists is not None and not bool(rows.all()):
            at = rows.repeat_interleave(TILE)[:, None]
            lists = torch.where(rows[:, None], lists, own.lists)
            if rest and own.rest:
                rest = torch.where(at, rest[0], own.rest[0]), torch.where(at, rest[1], own.rest[1])
            if delta is not None and own.delta is not None:
                delta = torch.where(at, delta, own.delta)
        own.before, own.delta_before, own.pending = own.rest, own.delta, None
        own.lists, own.rest, own.delta = lists, rest, delta

    def _lists(self, rule: Rule, key: Key, dense: Dense, layout: TokenLayout) -> Tensor:
        """Return which keys each query tile keeps, bool [B, H, NQ, N]; of text all."""
        scores, share = dense.scores, rule.density * (1 - rule.tokens)
        assert scores is not None
        tiles = scores.shape[-1]
        number = self.counts.get(key)
        match rule.budget:
            case "row":
                chosen = most(scores, round(share * tiles), 1)
            case "head":
                chosen = most(scores, round(share * tiles * tiles), 2)
            case "call":
                chosen = most(scores, round(share * scores[0].numel()), 3)
            case "model":
                chosen = most(scores, int(number or 0), 3)
            case "heads":
                each = number if isinstance(number, Tensor) else torch.ones(scores.shape[1])
                chosen = torch.cat([most(scores[:, h : h + 1], int(n), 2) for h, n in enumerate(each)], 1)
            case "mass":
                chosen = fewest(scores, rule.density)
            case "theta":
                chosen = most(scores, 1, 1) | (scores >= (torch.inf if number is None else number))
        keys = chosen.repeat_interleave(TILE, 3)
        if rule.tokens:
            heavy = pooled(dense.p[:, :, layout.visual, layout.visual]).masked_fill(keys, -1.0)
            keys = keys | most(heavy, round(rule.density * rule.tokens * keys.shape[-1]), 1)
        return with_text(keys, layout)

    def _sparse(self, rule: Rule, own: Kept, context: CallContext, now: Dense, step: int) -> Tensor:
        """Return the output by the lists and what stands for the other keys, and note the share that it computes."""
        lists, dense = own.lists, own.dense
        assert lists is not None
        assert dense is not None
        if rule.anew:
            now.scores = scores_of(rule, now, dense, context.layout)
            lists = self._lists(rule, context.key, now, context.layout)
        keep = rows_of(lists)
        exact = with_pooled(now, keep) if rule.rest == "delta of pooled" else partial(now, keep)
        delta, ahead = own.delta, own.ahead(rule, place_of(rule, context, step))
        if rule.line and delta is not None and own.delta_before is not None:
            delta = delta + ahead * (delta - own.delta_before)
        match rule.rest:
            case "skip":
                out = exact[0]
            case "delta" if delta is not None:
                out = exact[0] + delta
            case "delta of pooled" if delta is not None and isinstance(exact, Tensor):
                out = exact + delta
            case _:
                rest = self._rest(rule, own, now, keep, ahead)
                out = merged((exact[0], exact[1]), rest)
                if delta is not None:
                    out = exact[0] + torch.sigmoid(rest[1] - exact[1]) * delta
        return self._stilled(rule, context, own, now, out, lists)

    def _stilled(
        self, rule: Rule, context: CallContext, own: Kept, now: Dense, out: Tensor, lists: Tensor
    ) -> Tensor:  # fmt: skip
        """Let still heads give what stands for their output, and note the share that a call computes."""
        still, share = self.stills.get(context.key), lists.float().mean((0, 2, 3))
        if rule.rest == "delta of pooled":
            share = share + (1 - share) / TILE
        if still is not None and own.dense is not None:
            instead = now.v if rule.instead == "value" else own.dense.out
            out, share = torch.where(still[:, None, None], instead, out), torch.where(still, 0.0, share)
        self.shares.append(float(share.mean()))
        return out

    def _rest(self, rule: Rule, own: Kept, now: Dense, keep: Tensor, ahead: float) -> tuple[Tensor, Tensor]:
        """Return what stands for the keys that are not kept: their partial output and its log-sum-exp."""
        dense, rest = own.dense, own.rest
        assert dense is not None
        assert rest is not None
        if rule.rest == "exact lists":
            return partial(dense, ~keep)
        if rule.rest in ("fresh output", "fresh weight"):
            fresh = partial(now, ~keep)
            return (fresh[0], rest[1]) if rule.rest == "fresh output" else (rest[0], fresh[1])
        if rule.line and own.before is not None:
            return rest[0] + ahead * (rest[0] - own.before[0]), rest[1] + ahead * (rest[1] - own.before[1])
        return rest

    def _watch(self, key: Key, wrong: Tensor, dense: Tensor) -> None:
        self.errors.append(float(wrong.norm() / dense.norm()))
        if key in self._wrong:
            self.repeats.append(float(torch.cosine_similarity(wrong.flatten(), self._wrong[key].flatten(), 0)))
        self._wrong[key] = wrong


class Beside:
    """Computes a run's calls densely, and beside them each by several rules, to tell their errors on one trajectory."""

    def __init__(self, tried: Sequence[Tried]) -> None:
        self.tried = tried

    def run(self, plan: Any, call: Call, context: CallContext, *_: Any) -> tuple[Tensor, Any]:
        """Stand for `Execution._run`."""
        with torch.no_grad():
            now = dense_call(call)
            for one in self.tried:
                one.attend(call, context, now)
        return now.out, plan
