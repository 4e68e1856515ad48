"""Time calls whose lists change every time (kept bits, routing, votes) against static lists of the same tiles."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from block_sparse import add_timing, cpu_name, timed
from candidates import Call
from dit_accel_kernels import (
    EXACT,
    POOLED,
    Routing,
    Selection,
    TileLists,
    Vote,
    block_sparse_attention_eager,
    pack_bits,
    unpack_bits,
)
from inputs import append
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SHAPES = "1,4,4096,64,64;1,4,4096,64,128;1,12,4096,128,64;1,4,8192,128,128;1,4,16384,64,128"
VOTES = {
    "maxgap": Vote(threshold=-6.0),
    "mass": Vote(criterion="mass", threshold=0.002),
    "budget": Vote(criterion="budget", threshold=0.02),
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default=SHAPES, help="B,H,S,D,tile size;... (default %(default)s)")
    parser.add_argument("--density", default="0.1,0.3", help="comma list of kept shares (default %(default)s)")
    add_timing(parser, threads=1, clock="cpu")
    return parser.parse_args()


def calls_of(shape: list[int], density: float) -> tuple[dict[str, Call], dict[str, int]]:
    """The calls by name, and how many exact tiles each visits."""
    batch, heads, tokens, dim, block = shape
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, heads, tokens, dim) for _ in range(3))
    count = tokens // block
    sizes = dict(block_q=block, block_k=block, num_q=tokens, num_k=tokens)
    full = TileLists.full(tokens, tokens, block_q=block, block_k=block)
    keep = torch.rand(batch, heads, count, count) < density

    def ours(tiles: TileLists, selection: Selection | None = None, **returned: bool) -> Call:
        options: dict[str, Any] = dict(layout="bhsd", backend="torch", selection=selection, **returned)
        return lambda: block_sparse_attention_eager(q, k, v, tiles, **options)  # pyright: ignore

    def lists(states: Tensor) -> TileLists:
        return TileLists.from_states(states.to(torch.uint8), **sizes)

    shared = torch.rand(count, count).argsort(-1) < round(density * count)
    bits = pack_bits(keep)
    routing = Routing(beta=float(-torch.special.ndtri(torch.tensor(density, dtype=torch.float64))))
    _, routed = ours(full, Selection(routing=routing), return_tiles=True)()
    routed = unpack_bits(routed, count)
    calls = {
        "dense": lambda: scaled_dot_product_attention(q, k, v),
        "shared lists": ours(lists(shared * EXACT)),
        "lists": ours(lists(keep.flatten(0, 1) * EXACT)),
        "keep": ours(full, Selection(keep=bits)),
        **{f"keep, {name}": ours(full, Selection(keep=bits, vote=vote)) for name, vote in VOTES.items()},
        "keep, maxgap back": ours(full, Selection(keep=bits, vote=VOTES["maxgap"], reverse=True)),
        "lists, pooled": ours(lists(torch.where(routed.flatten(0, 1), EXACT, POOLED))),
        "routed": ours(full, Selection(routing=routing)),
    }
    exact = {name: int(keep.sum()) for name in calls} | {"dense": batch * heads * count**2}
    exact |= {"shared lists": int(shared.sum()) * batch * heads, "lists, pooled": int(routed.sum())}
    return calls, exact | {"routed": int(routed.sum())}


BASES = {"lists": "shared lists", "keep": "lists", "routed": "lists, pooled"}  # votes are compared with "keep"


def measure(args: argparse.Namespace, shape: list[int], density: float) -> list[dict[str, Any]]:
    """All calls of one shape and density, as JSON-ready records; ratios are paired by round."""
    calls, exact = calls_of(shape, density)
    seconds = timed(calls, args.rounds, args.clock, args.threads)
    records = []
    for name, rounds in seconds.items():
        base = "keep" if name.startswith("keep,") else BASES.get(name, "dense")
        ratio = statistics.median(x / y for x, y in zip(rounds, seconds[base], strict=True))
        records.append(
            {
                "device": cpu_name(),
                "torch": torch.__version__,
                "threads": args.threads,
                "clock": args.clock,
                "rounds": args.rounds,
                "shape": shape[:4],
                "block": shape[4],
                "dtype": "fp32",
                "call": name,
                "density": round(exact[name] / exact["dense"], 4),
                "seconds": statistics.median(rounds),
                "base": base,
                "ratio": ratio,
                "ratio_by_tile": ratio * exact[base] / exact[name],
                "speedup": statistics.median(x / y for x, y in zip(seconds["dense"], rounds, strict=True)),
            }
        )
    return records


def main() -> None:
    """Print the table; append the records."""
    args = arguments()
    torch.set_num_threads(args.threads)
    print(
        f"{cpu_name()}, {args.threads} threads, {args.clock} clock, torch {torch.__version__}, fp32, "
        f"{args.rounds} rounds"
    )
    for shape in ([int(x) for x in part.split(",")] for part in args.shapes.split(";")):
        for density in (float(x) for x in args.density.split(",")):
            print(f"\nB,H,S,D = {shape[:4]}, tiles of {shape[4]}")
            print(f"{'call':20}density        ms  x dense  time of this / of base  by exact tile")
            for r in measure(args, shape, density):
                times = f"{r['density']:7.3f}{r['seconds'] * 1e3:10.1f}{r['speedup']:9.2f}"
                print(f"{r['call']:20}{times}  {r['ratio']:6.3f} {r['base']:16}{r['ratio_by_tile']:12.3f}", flush=True)
                append(args.out, r)


if __name__ == "__main__":
    main()
