"""Rules of sparse attention that are tried, and the arithmetic of dense calls under masks that they need."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dit_accel.plan.call import Call
from dit_accel.plan.layout import TokenLayout

TILE = 16

Score = Literal[
    "mass", "loss", "value", "moved", "moved, pooled", "sol", "quest", "quest, rows", "frames", "some frames"
]
Rest = Literal[
    "skip", "cached", "delta", "delta, fresh weight", "delta of pooled", "fresh output", "fresh weight", "exact lists"
]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule of sparse attention, for a whole run.

    Attributes:
        density: share of the visual key tiles that is exact outside of dense calls.
        warm: first computed steps that are dense.
        first: first layers that stay dense.
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
            those above a ``theta`` of the head there. ``mass``: the fewest of a row that reach this share of its score.
        order: in which visual tokens are cut into tiles: ``patches`` of a frame, ``cubes`` of 4 x 2 x 2 tokens, or
            ``columns`` of 2 x 2 tokens through all frames.
        anew: lists are chosen at every step.
        tokens: share of the density that goes to single keys, each the heaviest outside the tiles.
        still: share of all heads that compute no logits after the warm-up, those where it costs least there.
        instead: what a still head gives: its ``last`` dense output or its own ``value``.
    """

    density: float = 0.3
    warm: int = 3
    first: int = 1
    every: int = 3
    turn: Literal["layers", "rows", "all"] = "layers"
    rest: Rest = "cached"
    line: float = 0.0
    along: Literal["steps", "noise"] = "steps"
    bits: int = 0
    score: Score = "mass"
    budget: Literal["row", "head", "call", "model", "heads", "theta", "mass"] = "row"
    order: Literal["raster", "patches", "cubes", "columns"] = "raster"
    anew: bool = False
    tokens: float = 0.0
    still: float = 0.0
    instead: Literal["last", "value"] = "last"


@dataclass
class Dense:
    """A dense call: probabilities, log-sum-exp of logits, values and output, [B, H, N, ...], and scores of tiles."""

    call: Call
    p: Tensor
    lse: Tensor
    v: Tensor
    out: Tensor
    scores: Tensor | None = None


def dense_call(call: Call) -> Dense:
    """Compute a call densely."""
    v, s = call.v.float(), call.q.float() @ call.k.float().mT * scale_of(call)
    lse = s.logsumexp(-1, keepdim=True)
    p = (s - lse).exp_()
    return Dense(call, p, lse, v, p @ v)


def scale_of(call: Call) -> float:
    """Return the factor on a call's logits."""
    return call.scale or call.q.shape[-1] ** -0.5


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


def partial(dense: Dense, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output over kept keys alone and its log-sum-exp; zeros and -inf where a row keeps none."""
    kept = dense.p * keep
    share = kept.sum(-1, keepdim=True)
    return kept @ dense.v / share.clamp_min(1e-30), dense.lse + share.log()


def merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """Return the output over the keys of two partial ones."""
    share = torch.nan_to_num(torch.sigmoid(other[1] - one[1]))
    return one[0] * (1 - share) + other[0] * share


def with_pooled(dense: Dense, keep: Tensor) -> Tensor:
    """Return the output over kept keys and the other tiles' mean keys and values, each for as many keys as it has."""
    means = dense.call.q.float() @ pooled(dense.call.k.float()).mT * scale_of(dense.call)
    weights = (means - dense.lse).exp() * TILE * ~keep[..., ::TILE]
    kept = dense.p * keep
    total = kept.sum(-1, keepdim=True) + weights.sum(-1, keepdim=True)
    return (kept @ dense.v + weights @ pooled(dense.v)) / total


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


def scores_of(rule: Rule, now: Dense, last: Dense | None, layout: TokenLayout) -> Tensor:
    """Return what ranks the tiles of a dense call, [B, H, NQ, NK]; see `Rule.score`."""
    now, last = visual_dense(now, layout), last and visual_dense(last, layout)
    q, k, mass = now.call.q, now.call.k, masses(now.p)
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


def fewest(scores: Tensor, share: float) -> Tensor:
    """Return the fewest tiles of each row that reach a share of its scores."""
    ranked, order = scores.sort(-1, descending=True)
    wanted = ranked.cumsum(-1) - ranked < share * ranked.sum(-1, keepdim=True)
    return torch.zeros_like(wanted).scatter_(-1, order, wanted)


@lru_cache(maxsize=16)
def token_order(order: str, layout: TokenLayout) -> Tensor | None:
    """Return int64 [N]: place in the order -> token; None: the sequence's own."""
    if order == "raster":
        return None
    token = np.arange(layout.visual_tokens)
    frame, place = token // layout.tokens_per_frame, token % layout.tokens_per_frame
    y, x = place // layout.width, place % layout.width
    keys = {
        "patches": (x, y, x // 4, y // 4, frame),
        "cubes": (x, y, frame, x // 2, y // 2, frame // 4),
        "columns": (x, y, frame, x // 2, y // 2),
    }
    visual = np.lexsort(keys[order]) + layout.text_before
    every = np.arange(layout.tokens)
    every[layout.visual] = visual
    return torch.from_numpy(every)


def ordered(dense: Dense, order: Tensor) -> Dense:
    """Return a dense call whose tokens stand in another order."""
    q, k, v = (x[:, :, order] for x in (dense.call.q, dense.call.k, dense.v))
    p, call = dense.p[:, :, order][..., order], replace(dense.call, q=q, k=k, v=v)
    return Dense(call, p, dense.lse[:, :, order], v, dense.out[:, :, order])


def visual_dense(dense: Dense, layout: TokenLayout) -> Dense:
    """Return the visual tokens of a dense call."""
    at, call = layout.visual, dense.call
    cut = replace(call, q=call.q[:, :, at].float(), k=call.k[:, :, at].float(), v=call.v[:, :, at].float())
    return Dense(cut, dense.p[:, :, at, at], dense.lse[:, :, at], dense.v[:, :, at], dense.out[:, :, at])


def with_text(keys: Tensor, layout: TokenLayout) -> Tensor:
    """Return lists over visual tokens with all text: its rows keep every key, and every row keeps its keys."""
    before, after = layout.text_before, layout.tokens - layout.text_before - layout.visual_tokens
    if not before + after:
        return keys
    if before % TILE or after % TILE:
        raise ValueError(f"text of {before} and {after} tokens is no whole number of tiles of {TILE}")
    edges = (before, after, before // TILE, after // TILE)
    return torch.nn.functional.pad(keys, edges, value=True)
