"""Predict the time of block-sparse attention on a card from its arithmetic, its bytes and its compiled instructions.

Seven engines work side by side: in every SM the tensor cores, the special functions (exp2), the lanes for everything
else (plain), the schedulers that issue all of it (issue) and shared memory; and for all of them the second-level cache
and the memory. A call takes at least the time of the slowest one, `limit`, and latency: kernels are launched one after
the other, and every program first follows a list to its first chunk while its SM has nothing else to do. That is
`bound`, which is reached only where all work overlaps; with no overlap in an SM, and the least known bandwidth of the
cache, it takes `serial`. One block an SM overlaps little, many overlap well. The truth lies between: the table shows
both ends, never one number that looks exact.

What a logit takes comes from the compile table (mixes.py), for exact tiles and for pooled ones. A call with pooled
tiles walks all of a row's tiles, one column each, and takes a pass over K and V for the means; routing adds a pass over
Q and the products of means. Bytes are counted twice: `hbm` moves every tensor once, `l2` every chunk that a program
visits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cards import CARDS, TARGETS, Card
from mixes import Mix, Table, launch_of, mixes_of
from shared import CLOCK_BYTES

VOTE_INSTRUCTIONS = 4  # of a lane for a row of a tile: bar, difference, bit, and its part of a test and a branch
LAUNCH_SECONDS = 3e-6  # between the end of one kernel and the start of the next in a stream
CACHE_CYCLES = 265  # of the second-level cache's latency: 261 to 273 on Ampere, Ada and Hopper (arXiv 2402.13499)
FIRST_LOADS = 4  # that wait for each other before a program's first product: its tile, its list, an entry, the chunk
ENGINES = ("tensor", "exp2", "plain", "issue", "shared", "l2", "hbm", "latency")
Found = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One self-attention call: batch, heads, tokens, head dim; tiles of `block` x `block` tokens, 16-bit elements."""

    name: str
    heads: int
    tokens: int
    dim: int
    batch: int = 1
    block: int = 128

    @property
    def tiles(self) -> int:
        """Tiles of one head, all of them."""
        return (-(-self.tokens // self.block)) ** 2

    @property
    def lanes(self) -> int:
        """Heads of all batches."""
        return self.batch * self.heads


# (frames, height, width) patch grids after the VAE and patching, plus text where it is part of self-attention: Wan 2.1
# 480x832 and 720x1280 at 81 frames, HunyuanVideo 720x1280 at 129, CogVideoX1.5 768x1360 at 81, Mochi 480x848 at 163.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="wan-480p", heads=40, tokens=21 * 30 * 52, dim=128),
        Shape(name="wan-720p", heads=40, tokens=21 * 45 * 80, dim=128),
        Shape(name="hunyuan-720p", heads=24, tokens=33 * 45 * 80 + 256, dim=128),
        Shape(name="cogvideox1.5", heads=48, tokens=11 * 48 * 85 + 224, dim=64),
        Shape(name="mochi", heads=24, tokens=28 * 30 * 53 + 256, dim=128),
        Shape(name="128k", heads=24, tokens=131072, dim=128),
    )
}


def predict(
    shape: Shape,
    density: float,
    card: Card,
    mixes: Mapping[str, Mix],
    *,
    pooled: float = 0.0,
    gathered: bool = False,
    routed: bool = False,
    votes: bool = False,
) -> Found:
    """Seconds of every engine and of the whole forward, with `density` exact and `pooled` shares of tiles.

    `mixes` are those of the loops over "exact" and "pooled" tiles. `gathered`: only the pooled tiles themselves are
    visited, from a list; `routed`: the call chooses its exact tiles itself; `votes`: its exact tiles vote for the next
    call by instructions that are not in the mix. Raises ValueError where the shares are not in [0, 1].
    """
    if not (0 <= density <= 1 and 0 <= pooled <= 1 - density + 1e-9):
        raise ValueError(f"density and pooled are shares of tiles, at most 1 together: found {density} and {pooled}")
    exact = mixes["exact"]
    seconds = _loop(shape, shape.tokens * density, card, exact)
    if pooled:
        mix = mixes.get("pooled", exact)
        columns = shape.tiles**0.5 * (pooled if gathered else 1.0)
        chunks = -(-columns // mix.columns) * mix.columns
        seconds = {name: value + more for (name, value), more in zip(
            seconds.items(), _loop(shape, chunks, card, mix).values(), strict=True
        )}  # fmt: skip
    if routed:
        seconds["tensor"] += 2 * shape.lanes * shape.tiles * shape.dim / (card.tflops * 1e12)
    if votes:
        voted = shape.lanes * shape.tiles * density * shape.block * VOTE_INSTRUCTIONS
        seconds["plain"] += voted / _issued(card)
        seconds["issue"] += voted / _issued(card)
    passes = 4 + (2 if pooled or routed else 0) + (1 if routed else 0)  # q, k, v, out; k, v for means; q for means
    seconds["hbm"] = _memory(shape, passes, card)
    launches = 1 + (5 if routed else 1 if pooled else 0) + (2 if votes else 0)
    return _limits(seconds, launches, shape, card, exact)


def predict_backward(shape: Shape, density: float, card: Card, mixes: Mapping[str, Mix]) -> Found:
    """Seconds of the backward without pooled tiles: a pass for delta, the gradient of Q, those of K and V, in turn.

    `mixes` are those of "dq" and "dkdv": three products and four, each with its own exponentials.
    """
    delta = {**dict.fromkeys(ENGINES, 0.0), "hbm": _memory(shape, 2, card)}
    parts = [_limits(delta, 1, shape, card, None)]
    for kernel, products, passes in (("dq", 3, 5), ("dkdv", 4, 6)):  # q, k, v, grad_out and what is written
        seconds = _loop(shape, shape.tokens * density, card, mixes[kernel], products)
        seconds["hbm"] = _memory(shape, passes, card)
        parts.append(_limits(seconds, 1, shape, card, mixes[kernel]))
    slowest = max(parts, key=lambda part: part["bound"])
    return {name: sum(part[name] for part in parts) for name in (*ENGINES, "bound", "serial")} | {
        "limit": slowest["limit"]
    }


def _loop(shape: Shape, columns: float, card: Card, mix: Mix, products: int = 2) -> dict[str, float]:
    """Seconds of every engine for so many columns of every row, `products` of them with the head dim a logit."""
    logits = shape.lanes * shape.tokens * columns
    clocks = card.cores * card.clock * 1e9  # of all SMs in a second
    issued = _issued(card)
    return {
        "tensor": 2 * products * logits * shape.dim / (card.tflops * 1e12),
        "exp2": logits * mix.exp2 / (clocks * card.exp2),
        "plain": logits * max(mix.fp32 / (clocks * card.lanes), mix.plain / issued),
        "issue": logits * (mix.plain + mix.exp2 + mix.tensor) / issued,
        "shared": logits * mix.shared / (clocks * CLOCK_BYTES),
        "l2": logits / mix.rows * 2 * _row(shape) / (card.l2[1] * 1e9),
        "hbm": 0.0,
        "latency": 0.0,
    }


def _issued(card: Card) -> float:
    """Instructions of a lane that all schedulers issue in a second."""
    target = TARGETS[card.target]
    return card.cores * card.clock * 1e9 * target.issue * target.warp


def _row(shape: Shape) -> int:
    """Bytes of a token of one head."""
    return 2 * shape.dim


def _memory(shape: Shape, passes: int, card: Card) -> float:
    """Seconds in which so many tensors are read or written once."""
    return passes * shape.lanes * shape.tokens * _row(shape) / (card.bandwidth * 1e9)


def _limits(seconds: dict[str, float], launches: int, shape: Shape, card: Card, mix: Mix | None) -> Found:
    """Times of the engines with the slowest one, the time that it allows, and the time without overlap in an SM."""
    first = FIRST_LOADS * CACHE_CYCLES / (card.clock * 1e9)
    waves = shape.lanes * shape.tokens / mix.rows / (card.cores * mix.blocks) if mix else 0.0
    latency = launches * LAUNCH_SECONDS + waves * first
    slowest = max(seconds, key=lambda name: seconds[name])
    inside = max(seconds["tensor"], seconds["shared"]) + seconds["exp2"] + seconds["plain"]
    serial = max(inside, seconds["hbm"], seconds["l2"] * card.l2[1] / card.l2[0], seconds[slowest])
    return {
        **seconds,
        "latency": latency,
        "limit": slowest if seconds[slowest] >= latency else "latency",
        "bound": seconds[slowest] + latency,
        "serial": serial + latency,
    }


def predict_call(shape: Shape, candidate: str, density: float, card: Card, table: Table) -> Found | None:
    """The prediction for a candidate of gpu.py ("triton-routed" ...), None where the table has no such launch.

    `density` is what was visited exactly; the rest is pooled where the candidate pools it.
    """
    launch = launch_of(candidate, shape.dim, shape.block, card.target, table)
    if launch is None:
        return None
    mixes = mixes_of(launch, card.target, table)
    if candidate == "triton-backward":
        return predict_backward(shape, density, card, mixes)
    routed = candidate == "triton-routed"
    counted = re.search("maxgap|mass|budget", launch) is not None  # votes of a launch that votes are in its mix
    rest = 1 - density if routed or candidate == "triton-pooled" else 0.0
    votes = candidate == "triton-votes" and not counted
    return predict(shape, density, card, mixes, pooled=rest, routed=routed, votes=votes)


def predict_dense(shape: Shape, card: Card) -> float | None:
    """Seconds of the best dense attention by the share of the peak that it is published to reach; None without one."""
    if card.dense is None or shape.dim != 128:
        return None
    return 4 * shape.lanes * shape.tokens**2 * shape.dim / (card.tflops * 1e12 * card.dense)


def card_of(device: str) -> Card | None:
    """The card that a device's name holds, if it is one of those known."""
    return next((card for name, card in CARDS.items() if name in device), None)
