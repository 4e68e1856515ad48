"""Dense arithmetic under masks, for `frontier_sparse`: what a rule of sparse attention would compute, not how fast.

A call is dense, or each row of query tiles computes its listed keys exactly and takes the rest from an earlier step.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dit_accel.plan.call import Call
from dit_accel.plan.context import CallContext, Key
from dit_accel.plan.layout import TokenLayout

TILE = 16

Score = Literal["mass", "loss", "value", "moved", "moved, pooled", "sol", "quest", "quest, rows", "frames", "some frames"]
Rest = Literal["skip", "cached", "delta", "delta, fresh weight", "delta of pooled", "fresh output", "fresh weight", "exact lists"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule of sparse attention, for a whole run.

    Attributes:
        density: share of the visual key tiles that is exact outside of dense calls.
        warm: first computed steps that are dense.
        every: after how many computed steps a list and its rest are made anew; 0: never.
        turn: what is made anew, and so dense, in one step: a layer of so many, a row of query tiles of so many, or all.
        rest: what stands for the other keys. ``cached``: their partial output of the last dense step, merged by
            log-sum-exp; ``delta``: that step's difference of dense and sparse output is added. Oracles: the cached rest
            with this step's output or weight; ``exact lists``: lists of this step with the rest cached for them.
            ``delta, fresh weight`` weights it by this step's log-sum-exp; ``delta of pooled``: the sparse output has
            the other tiles as one key each, as in that step.
        line: the rest moves on along the line through its last two, at this share of the slope.
        along: what the line is over: computed steps or the noise level.
        bits: in which a cached output is stored; 0: as it is.
        score: what ranks tiles. ``loss``: what leaving one out does to the output; ``value``: mass times the norm of V;
            ``moved``: what its part of the output changed by since the last dense step, ``pooled``: the same by means;
            ``sol``, ``quest``: pooled logits, and the bound by the keys' extremes, of a pooled query or of each;
            ``frames``: near frames; ``some frames``: those in the heads where they hold 90 % of the best tiles' mass.
        budget: over what tiles are ranked together: a query tile's ``row``, a ``head``, a layer's ``call``, the layers
            of the ``model`` (numbers by layer) or its heads (``heads``: numbers by head) in the last dense step; or
            those above a ``theta`` of the head there.
        anew: lists are chosen at every step.
        tokens: share of the density that goes to single keys, each the heaviest outside the tiles.
        still: share of all heads that compute no logits after the warm-up, those where it costs least there.
        instead: what a still head gives: its ``last`` dense output or its own ``value``.
    """

    density: float = 0.3
    warm: int = 3
    every: int = 3
    turn: Literal["layers", "rows", "all"] = "layers"
    rest: Rest = "cached"
    line: float = 0.0
    along: Literal["steps", "noise"] = "steps"
    bits: int = 0
    score: Score = "mass"
    budget: Literal["row", "head", "call", "model", "heads", "theta"] = "row"
    anew: bool = False
    tokens: float = 0.0
    still: float = 0.0
    instead: Literal["last", "value"] = "last"


@dataclass
class Dense:
    """What one dense call computed: logits, probabilities, values and output, [B, H, N, ...], and its tile scores."""

    s: Tensor
    p: Tensor
    v: Tensor
    out: Tensor
    call: Call | None = None
    scores: Tensor = field(default_factory=lambda: torch.empty(0))


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


def rows_of(tiles: Tensor) -> Tensor:
    """Return what holds for query tiles, [B, H, NQ, ...], for their rows."""
    return tiles.repeat_interleave(TILE, 2)


def pooled(x: Tensor, axis: int = 2) -> Tensor:
    """Return the means of tiles along an axis."""
    return x.unflatten(axis, (-1, TILE)).mean(axis + 1)


def masses(p: Tensor) -> Tensor:
    """Return the mean mass of every tile, [B, H, NQ, NK]."""
    return pooled(p.unflatten(-1, (-1, TILE)).sum(-1))


def parts(p: Tensor, v: Tensor) -> Tensor:
    """Return each key tile's part of the output, [B, H, N, NK, D]."""
    return torch.einsum("bhnkt,bhktd->bhnkd", p.unflatten(-1, (-1, TILE)), v.unflatten(2, (-1, TILE)))


def partial(s: Tensor, v: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output over kept keys alone and its log-sum-exp; zeros and -inf where a row keeps none."""
    masked = s.masked_fill(~keep, -torch.inf)
    lse = masked.logsumexp(-1, keepdim=True)
    return torch.nan_to_num(masked.softmax(-1)) @ v, lse


def merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """Return the output over the keys of two partial ones."""
    share = torch.nan_to_num(torch.sigmoid(other[1] - one[1]))
    return one[0] * (1 - share) + other[0] * share


def with_pooled(call: Call, s: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Return the output over kept keys and the other tiles' mean keys and values, each of them a key of their weight."""
    k = pooled(call.k.float())
    means = call.q.float() @ k.mT * (call.scale or k.shape[-1] ** -0.5) + math.log(TILE)
    logits = torch.cat([s.masked_fill(~keep, -torch.inf), means.masked_fill(keep[..., ::TILE], -torch.inf)], -1)
    return logits.softmax(-1) @ torch.cat([v, pooled(v)], 2)


def stored(x: Tensor, bits: int) -> Tensor:
    """Return a tensor as it comes back from so many bits with a scale a row; 0: as it is."""
    if not bits:
        return x
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-8) / (2 ** (bits - 1) - 1)
    return (x / scale).round() * scale


def frame_distance(layout: TokenLayout) -> Tensor:
    """Return how many frames two visual tiles lie apart, [N, N]."""
    frame = torch.arange(0, layout.visual_tokens, TILE) // layout.tokens_per_frame
    return (frame[:, None] - frame).abs().float()


def scores_of(rule: Rule, call: Call, now: Dense, last: Dense | None, layout: TokenLayout) -> Tensor:
    """Return what ranks the tiles of a dense call, [B, H, NQ, NK]; see `Rule.score`."""
    q, k, mass = call.q, call.k, masses(now.p)
    near = lambda: (-frame_distance(layout)).expand_as(mass) + mass * 1e-3  # noqa: E731
    match rule.score:
        case "loss":
            dropped = parts(now.p, now.v) - now.p.unflatten(-1, (-1, TILE)).sum(-1)[..., None] * now.out[..., None, :]
            return pooled(dropped.norm(dim=-1))
        case "value":
            return pooled((now.p * now.v.norm(dim=-1)[:, :, None]).unflatten(-1, (-1, TILE)).sum(-1))
        case "moved" if last is not None:
            moved = parts(now.p, now.v) - parts(last.p, last.v)
            moved -= (now.p - last.p).unflatten(-1, (-1, TILE)).sum(-1)[..., None] * now.out[..., None, :]
            return pooled(moved.norm(dim=-1))
        case "moved, pooled" if last is not None:
            v, before, out = pooled(now.v), pooled(last.v), pooled(now.out)
            apart = torch.cdist(out, v)
            return (mass - masses(last.p)).abs() * apart + mass * (v - before).norm(dim=-1)[:, :, None]
        case "sol":
            return pooled(q) @ pooled(k).mT
        case "quest" | "quest, rows":
            of = k.unflatten(2, (-1, TILE))
            low, high = of.amin(3), of.amax(3)
            asked = pooled(q) if rule.score == "quest" else q
            bound = asked.clamp(min=0) @ high.mT + asked.clamp(max=0) @ low.mT
            return bound if rule.score == "quest" else pooled(bound)
        case "frames":
            return near()
        case "some frames":
            count = round(rule.density * mass.shape[-1])
            local = mass.gather(-1, near().topk(count, -1).indices).sum((-1, -2))
            enough = local >= 0.9 * mass.topk(count, -1).values.sum((-1, -2))
            return torch.where(enough[..., None, None], near(), mass)
    return mass


def most(scores: Tensor, count: int, axes: int) -> Tensor:
    """Return the highest of all scores that lie along the last so many axes, and of each row the highest one."""
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.flatten(-axes)
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, flat.topk(count, -1).indices, True)
    first = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.argmax(-1, keepdim=True), True)
    return chosen.view_as(scores) | first


class Tried:
    """Computes the attention calls of one run by a rule, in place of an execution's own; 'None' is dense.

    Attributes:
        shares: of each call, the share of its pairs that were computed.
        errors: of each sparse call, the relative error of its output to the dense one of the same q, k and v.
        repeats: of each sparse call that follows another, the cosine between the errors of the two.
    """

    def __init__(self, rule: Rule | None) -> None:
        self.rule = rule
        self.shares: list[float] = []
        self.errors: list[float] = []
        self.repeats: list[float] = []
        self._wrong: dict[Key, Tensor] = {}
        self.kept: dict[Key, Kept] = {}
        self.counts: dict[Any, Tensor | int] = {}
        self.stills: dict[Key, Tensor] = {}

    def run(self, plan: Any, call: Call, context: CallContext, layer: Any) -> tuple[Tensor, Any]:
        """Stand for `Execution._run`."""
        with torch.no_grad():
            return self.attend(call, context), plan

    def attend(self, call: Call, context: CallContext) -> Tensor:
        """Return the output of a call, [B, H, S, D]."""
        rule, v = self.rule, call.v.float()
        s = call.q.float() @ call.k.float().mT * (call.scale or call.q.shape[-1] ** -0.5)
        if rule is None:
            return s.softmax(-1) @ v
        own = self.kept.setdefault(context.key, Kept())
        step, own.steps = own.steps, own.steps + 1
        fresh = self._fresh(rule, step, context, s.shape[2] // TILE)
        if fresh is None or bool(fresh.all()):
            now = Dense(s, s.softmax(-1), v, torch.empty(0))
            now.out = now.p @ v
            self._note(own, rule, call, context, now, torch.ones(s.shape[2] // TILE, dtype=torch.bool), step)
            self.shares.append(1.0)
            self._wrong.pop(context.key, None)
            return now.out
        self._settle(rule, context)
        out = self._sparse(rule, own, call, context, s, v, step)
        now = Dense(s, s.softmax(-1), v, torch.empty(0))
        now.out = now.p @ v
        if bool(fresh.any()):
            self._note(own, rule, call, context, now, fresh, step)
            self.shares[-1] += float(fresh.float().mean()) * (1 - self.shares[-1])
            out = torch.where(fresh.repeat_interleave(TILE)[:, None], now.out, out)
        self._watch(context.key, out - now.out, now.out)
        return out

    def _fresh(self, rule: Rule, step: int, context: CallContext, tiles: int) -> Tensor | None:
        """Return which query tiles a step makes anew; None: the call is dense."""
        if step < rule.warm or (context.depth < 1 and rule.turn != "rows"):
            return None
        row = torch.arange(tiles)
        if not rule.every:
            return torch.zeros(tiles, dtype=torch.bool)
        if rule.turn == "rows":
            return (row + step) % rule.every == 0
        place = context.layer + step if rule.turn == "layers" else step - rule.warm + 1
        return None if place % rule.every == 0 else torch.zeros(tiles, dtype=torch.bool)

    def _note(
        self, own: Kept, rule: Rule, call: Call, context: CallContext, now: Dense, rows: Tensor, step: int
    ) -> None:
        """Keep a dense call of which lists are made before the next sparse one, ranked where there may be one."""
        last, layout = own.dense, context.layout
        if step + 1 >= rule.warm and (context.depth > 0 or rule.turn == "rows"):
            visual = visual_call(call, layout), visual_dense(now, layout)
            now.scores = scores_of(rule, *visual, last and visual_dense(last, layout), layout)
        own.earlier, now.call = last and last.out, call
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
        scores = {key: own.dense.scores for key, own in waiting.items() if own.dense and own.dense.scores.numel()}
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
                if dense is None or key[1] == 0:
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
        lists = self._lists(rule, key, dense.scores, dense.p, layout)
        keep = rows_of(lists)
        rest = partial(dense.s, dense.v, ~keep)
        rest = stored(rest[0], rule.bits), rest[1].half().float() if rule.bits else rest[1]
        delta = None
        if rule.rest in ("delta", "delta, fresh weight"):
            delta = (dense.out if rule.rest == "delta" else rest[0]) - partial(dense.s, dense.v, keep)[0]
        elif rule.rest == "delta of pooled" and dense.call:
            delta = dense.out - with_pooled(dense.call, dense.s, dense.v, keep)
        if own.lists is not None and not bool(rows.all()):
            at = rows.repeat_interleave(TILE)[:, None]
            assert own.rest is not None
            lists = torch.where(rows[:, None], lists, own.lists)
            rest = torch.where(at, rest[0], own.rest[0]), torch.where(at, rest[1], own.rest[1])
            delta = None if delta is None or own.delta is None else torch.where(at, delta, own.delta)
        own.before, own.delta_before, own.pending = own.rest, own.delta, None
        own.lists, own.rest, own.delta = lists, rest, delta

    def _lists(self, rule: Rule, key: Key, scores: Tensor, p: Tensor, layout: TokenLayout) -> Tensor:
        """Return which keys each query tile keeps, bool [B, H, NQ, N]; of text all."""
        tiles, share = scores.shape[-1], rule.density * (1 - rule.tokens)
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
            case "theta":
                chosen = most(scores, 1, 1) | (scores >= number)
        keys = chosen.repeat_interleave(TILE, 3)
        if rule.tokens:
            heavy = pooled(p)[..., : keys.shape[2], :].masked_fill(keys, -1.0)
            keys = keys | most(heavy, round(rule.density * rule.tokens * keys.shape[-1]), 1)
        return with_text(keys, layout)

    def _sparse(
        self, rule: Rule, own: Kept, call: Call, context: CallContext, s: Tensor, v: Tensor, step: int
    ) -> Tensor:
        lists = own.lists
        assert lists is not None
        assert own.dense is not None
        if rule.anew:
            now = Dense(s, s.softmax(-1), v, torch.empty(0))
            now.out = now.p @ v
            cut = visual_call(call, context.layout), visual_dense(now, context.layout)
            scores = scores_of(rule, *cut, visual_dense(own.dense, context.layout), context.layout)
            lists = self._lists(rule, context.key, scores, now.p, context.layout)
        keep = rows_of(lists)
        exact = partial(s, v, keep)
        rest = self._rest(rule, own, s, v, keep, place_of(rule, context, step))
        delta = stored(own.delta, rule.bits) if own.delta is not None else torch.zeros(())
        if rule.line and own.delta_before is not None:
            delta = delta + own.ahead(rule, place_of(rule, context, step)) * (delta - own.delta_before)
        match rule.rest:
            case "skip":
                out = exact[0]
            case "delta":
                out = exact[0] + delta
            case "delta, fresh weight":
                out = exact[0] + torch.sigmoid(rest[1] - exact[1]) * delta
            case "delta of pooled":
                out = with_pooled(call, s, v, keep) + delta
            case _:
                out = merged(exact, rest)
        still = self.stills.get(context.key)
        share = lists.float().mean((0, 2, 3))
        if rule.rest == "delta of pooled":
            share = share + (1 - share) / TILE
        if still is not None:
            instead = v if rule.instead == "value" else own.dense.out
            out = torch.where(still[:, None, None], instead, out)
            share = torch.where(still, 0.0, share)
        self.shares.append(float(share.mean()))
        return out

    def _rest(self, rule: Rule, own: Kept, s: Tensor, v: Tensor, keep: Tensor, place: float) -> tuple[Tensor, Tensor]:
        """Return what stands for the keys that are not kept: their partial output and its log-sum-exp."""
        dense, rest = own.dense, own.rest
        assert dense is not None
        assert rest is not None
        if rule.rest == "exact lists":
            return partial(dense.s, dense.v, ~keep)
        if rule.rest in ("fresh output", "fresh weight"):
            now = partial(s, v, ~keep)
            return (now[0], rest[1]) if rule.rest == "fresh output" else (rest[0], now[1])
        if rule.line and own.before is not None:
            ahead = own.ahead(rule, place)
            return rest[0] + ahead * (rest[0] - own.before[0]), rest[1] + ahead * (rest[1] - own.before[1])
        return rest

    def _watch(self, key: Key, wrong: Tensor, dense: Tensor) -> None:
        self.errors.append(float(wrong.norm() / dense.norm()))
        if key in self._wrong:
            self.repeats.append(float(torch.cosine_similarity(wrong.flatten(), self._wrong[key].flatten(), 0)))
        self._wrong[key] = wrong


def visual_call(call: Call, layout: TokenLayout) -> Call:
    """Return the visual tokens of a call."""
    at = layout.visual
    return Call(q=call.q[:, :, at].float(), k=call.k[:, :, at].float(), v=call.v[:, :, at].float(), scale=call.scale)


def visual_dense(dense: Dense, layout: TokenLayout) -> Dense:
    """Return the visual tokens of a dense call."""
    at = layout.visual
    return Dense(dense.s[:, :, at, at], dense.p[:, :, at, at], dense.v[:, :, at], dense.out[:, :, at])


def with_text(keys: Tensor, layout: TokenLayout) -> Tensor:
    """Return lists over visual tokens with all text: its rows keep every key, and every row keeps its keys."""
    before, after = layout.text_before, layout.tokens - layout.text_before - layout.visual_tokens
    if not before + after:
        return keys
    if before % TILE or after % TILE:
        raise ValueError(f"text of {before} and {after} tokens is no whole number of tiles of {TILE}")
    edges = (before, after, before // TILE, after // TILE)
    return torch.nn.functional.pad(keys, edges, value=True)
