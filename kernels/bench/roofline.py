"""Predict the time of block-sparse attention on a card from its arithmetic, its bytes and its kernel's instruction mix.

Four engines work side by side in every SM: tensor cores, special functions (exp2), the lanes for everything else, and
memory. A kernel takes at least the time of the busiest one, `bound`, which is reached only where all work overlaps;
with no overlap in an SM it takes the sum, `serial`. One block an SM overlaps little, many overlap well. A call with
pooled tiles walks all of a row's tiles, one column each, and takes a pass over K and V for the means; routing adds a
pass over Q and the products of means, votes a few instructions for every row of a tile. Bytes are counted twice: `hbm`
moves every tensor once, `l2` every tile that is visited, at four times the card's bandwidth. The table shows both ends,
never one number that looks exact.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cards import CARDS, TARGETS, Card

VOTE_INSTRUCTIONS = 4  # of a lane for a row of a tile: bar, difference, bit, and its part of a test and a branch
L2_OVER_HBM = 4.0  # bandwidth of the second-level cache over HBM's, about what these cards have


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """Per logit (one query times one key): plain instructions of a lane, exponentials; and logits a step of the loop.

    `plain` counts what is neither tensor-core nor exp2. The default is the softmax at its least: scale and subtract in
    one, a maximum, a sum and half a conversion.
    """

    plain: float = 3.5
    exp2: float = 1.0


def read_mix(path: Path, launch: str, target: str) -> Mix:
    """The mix of a launch's hot loop, from the compile table's JSON lines.

    What doesn't run in every turn, such as the store of a word of votes, counts as often as it runs.

    Raises ValueError where the table has no such row with a hot loop.
    """
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if record["launch"] == launch and record["target"] == target and record.get("mix"):
            mix, lanes = record["mix"], record["warps"] * TARGETS[target].warp
            plain = mix.get("every", mix["instructions"]) - mix["tensor"] - mix["exp2"]
            return Mix(plain=plain * lanes / record["logits"], exp2=mix["exp2"] * lanes / record["logits"])
    raise ValueError(f"{path} must hold launch {launch!r} on {target} with a hot loop, found none: run aot.py first")


def predict(
    shape: Shape,
    density: float,
    card: Card,
    mix: Mix,
    *,
    pooled: float = 0.0,
    routed: bool = False,
    votes: bool = False,
) -> dict[str, Any]:
    """Seconds of every engine and of the whole forward, with `density` exact and `pooled` shares of tiles.

    `routed`: the call chooses its exact tiles itself; `votes`: its exact tiles vote for the next call. Raises
    ValueError where the shares are not in [0, 1].
    """
    if not (0 <= density <= 1 and 0 <= pooled <= 1 - density + 1e-9):
        raise ValueError(f"density and pooled are shares of tiles, at most 1 together: found {density} and {pooled}")
    lanes = shape.batch * shape.heads
    walked = 1.0 if pooled else 0.0  # share of a row's key tiles whose means the pooled loop reads
    logits = lanes * shape.tokens * (shape.tokens * density + shape.tiles**0.5 * walked)
    rate = card.cores * card.clock * 1e9
    row = 2 * shape.dim  # bytes of a token of one head
    passes = 4 + (2 if pooled or routed else 0) + (1 if routed else 0)  # q, k, v, out; k, v for means; q for means
    visits = lanes * shape.tiles * (density * shape.block + walked) * 2 * row
    products = 4 * logits * shape.dim + (2 * lanes * shape.tiles * shape.dim if routed else 0)
    voted = lanes * shape.tiles * density * shape.block if votes else 0.0
    seconds = {
        "tensor": products / (card.tflops * 1e12),
        "exp2": logits * mix.exp2 / (rate * card.exp2),
        "plain": (logits * mix.plain + voted * VOTE_INSTRUCTIONS) / (rate * card.lanes),
        "hbm": passes * lanes * shape.tokens * row / (card.bandwidth * 1e9),
        "l2": visits / (card.bandwidth * 1e9 * L2_OVER_HBM),
    }
    return _limits(seconds)


def features_of(candidate: str, density: float, launch: str | None = None) -> dict[str, Any]:
    """Arguments of `predict` for a candidate of gpu.py ("triton-routed" ...) at the density it ran at.

    Where the mix is of a launch that votes, its votes are in the mix.
    """
    routed = candidate == "triton-routed"
    rest = 1 - density if routed or candidate == "triton-pooled" else 0.0
    counted = launch is not None and re.search("maxgap|mass|budget", launch) is not None
    return {"pooled": rest, "routed": routed, "votes": candidate == "triton-votes" and not counted}


def _limits(seconds: dict[str, float]) -> dict[str, Any]:
    """Times of the engines with the busiest one, its time, and the time without overlap in an SM."""
    limit = max(seconds, key=lambda name: seconds[name])
    compute = seconds["tensor"] + seconds["exp2"] + seconds["plain"]
    serial = max(compute, seconds["hbm"], seconds["l2"])
    return {**seconds, "bound": seconds[limit], "limit": limit, "serial": serial}


def backward(forward: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the backward from those of the forward: seven products for two, two exponentials for one.

    grad_q needs three products (q k, grad v, grad_s k), grad_k and grad_v four; each recomputes the weights. Plain work
    doubles with the exponentials; every tile brings twice the bytes, twice.
    """
    factors = {"tensor": 3.5, "exp2": 2.0, "plain": 2.0, "hbm": 3.0, "l2": 2.0}
    return _limits({name: forward[name] * factor for name, factor in factors.items()})


def card_of(device: str) -> Card | None:
    """The card that a device's name holds, if it is one of those known."""
    return next((card for name, card in CARDS.items() if name in device), None)


CANDIDATES = ("triton", "triton-pooled", "triton-routed", "triton-votes", "triton-backward")


def measured(path: Path | None, shape: str, card: str, candidate: str, density: float) -> float | None:
    """Median seconds that gpu.py's JSON lines hold for a call on this card (the last of them), None without any."""
    if path is None:
        return None
    records = [json.loads(line) for line in path.read_text().splitlines()]
    found = [
        r["seconds"]
        for r in records
        if "seconds" in r
        and card in r["device"]
        and (r["shape"], r["candidate"], r["density"]) == (shape, candidate, density)
    ]
    return found[-1] if found else None


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default=",".join(SHAPES), help="comma list (default %(default)s)")
    parser.add_argument("--card", default=",".join(CARDS), help="comma list (default %(default)s)")
    parser.add_argument("--density", default="0.1,0.27,0.5,1.0", help="comma list of kept shares (default %(default)s)")
    parser.add_argument("--candidate", default="triton", choices=CANDIDATES, help="as in gpu.py (default %(default)s)")
    parser.add_argument("--measured", type=Path, help="JSON lines of gpu.py, to be shown beside the prediction")
    parser.add_argument("--table", type=Path, help="JSON lines of aot.py, for the instruction mix of --launch")
    parser.add_argument("--launch", help="name in --table")
    parser.add_argument("--out", type=Path, help="write one JSON line a row to this file")
    return parser.parse_args()


def pick(names: str, known: dict[str, Any], option: str) -> list[Any]:
    """The named entries; an unknown name ends the program with the known ones."""
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        raise SystemExit(f"--{option} takes {', '.join(known)}: found {', '.join(unknown)}")
    return [known[name] for name in names.split(",")]


def main() -> None:
    """Print the table; write the records."""
    from rich.console import Console
    from rich.table import Table

    args = arguments()
    times = ("tensor", "exp2", "plain", "hbm", "l2", "bound", "serial")
    columns = ("shape", "card", "density", *times, "limit", "x dense", "measured")
    table = Table(*columns, title=f"{args.candidate}: milliseconds; x dense: bound at density 1 over this bound")
    records = []
    for shape in pick(args.shape, SHAPES, "shape"):
        for card in pick(args.card, CARDS, "card"):
            mix = read_mix(args.table, args.launch, card.target) if args.table else Mix()
            for density in (float(d) for d in args.density.split(",")):
                found = predict(shape, density, card, mix, **features_of(args.candidate, density, args.launch))
                dense = predict(shape, 1.0, card, mix)
                if args.candidate == "triton-backward":
                    found, dense = backward(found), backward(dense)
                took = measured(args.measured, shape.name, card.name, args.candidate, density)
                speedup = dense["bound"] / found["bound"]
                record = {"shape": shape.name, "card": card.name, "candidate": args.candidate, "density": density}
                records.append({**record, **found, "speedup": speedup, "measured": took})
                cells = [f"{found[name] * 1e3:.2f}" for name in times]
                cells += [found["limit"], f"{speedup:.2f}", "" if took is None else f"{took * 1e3:.2f}"]
                table.add_row(shape.name, card.name, f"{density:g}", *cells)
    Console(width=140).print(table)
    if args.out:
        args.out.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
