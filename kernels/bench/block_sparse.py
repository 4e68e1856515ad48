"""Time block-sparse attention against dense SDPA and rivals, side by side in one process; append JSON lines."""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from calls import DTYPES
from candidates import NAMES, Call, exact_rows, make
from dit_accel_kernels import SKIPPED, TileLists
from inputs import append, lists
from torch import Tensor


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="1,4,16384,128", help="B,H,S,D (default %(default)s)")
    parser.add_argument("--dtype", default="fp32,bf16", help=f"comma list of {', '.join(DTYPES)} (default %(default)s)")
    parser.add_argument("--density", default="0.10,0.25,0.5", help="comma list of kept shares (default %(default)s)")
    parser.add_argument("--block", type=int, default=128, help="tokens a tile (default %(default)s)")
    parser.add_argument("--lists", default="random", choices=("random", "band"), help="where kept tiles lie")
    parser.add_argument("--only", default=",".join(NAMES), help=f"comma list of {', '.join(NAMES)}")
    add_timing(parser, threads=2, clock="wall")
    return parser.parse_args()


def add_timing(parser: argparse.ArgumentParser, *, threads: int, clock: str) -> None:
    """Add how calls are timed and where the records go, with these defaults."""
    parser.add_argument("--threads", type=int, default=threads, help="torch threads (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, all calls in each (default %(default)s)")
    parser.add_argument("--clock", default=clock, choices=("wall", "cpu"), help="cpu: of this process over threads")
    parser.add_argument("--out", type=Path, help="append one JSON line a row to this file")


def timed(calls: dict[str, Call], rounds: int, clock: str, threads: int) -> dict[str, list[float]]:
    """Seconds of every call, one of each a round so that drift hits all alike; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if turn:
                seconds[name].append(wall if clock == "wall" else cpu / threads)
    return seconds


def relative_error(out: Tensor, truth: Tensor, sample: list[int], block: int) -> float:
    """Root mean square error of the sampled block rows over the truth's root mean square."""
    sampled = out.unflatten(2, (-1, block))[:, :, sample].double()
    return float((sampled - truth).norm() / truth.norm())


def measure(args: argparse.Namespace, dtype: str, density: float) -> list[dict[str, Any]]:
    """All candidates at one dtype and density, as JSON-ready records."""
    batch, heads, tokens, dim = (int(x) for x in args.shape.split(","))
    if tokens % args.block:
        raise SystemExit(f"--shape needs whole tiles: found {tokens} tokens for --block {args.block}")
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, heads, tokens, dim).to(DTYPES[dtype]) for _ in range(3))
    tiles = lists(tokens, args.block, density, SKIPPED, "cpu", band=args.lists == "band")
    calls = make(q, k, v, tiles, ["dense", *(n for n in args.only.split(",") if n != "dense")])
    sample = list(range(0, tokens // args.block, max(1, tokens // args.block // 4)))[:4]
    truth = exact_rows(q, k, v, tiles, sample)
    full = exact_rows(q, k, v, TileLists.full(tokens, tokens, block_q=args.block, block_k=args.block), sample)
    errors = {
        n: relative_error(call(), full if n == "dense" else truth, sample, args.block) for n, call in calls.items()
    }
    seconds = timed(calls, args.rounds, args.clock, args.threads)
    dense = statistics.median(seconds["dense"])
    setting = {
        "device": cpu_name(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        **{name: getattr(args, name) for name in ("threads", "clock", "block", "lists", "rounds")},
        "shape": [batch, heads, tokens, dim],
        "dtype": dtype,
    }
    records = []
    for name, rounds in seconds.items():
        density_visited = 1.0 if name == "dense" else tiles.density
        low, median, high = (float(x) for x in torch.tensor(rounds).quantile(torch.tensor([0.2, 0.5, 0.8])))
        speedup = statistics.median(d / f for d, f in zip(seconds["dense"], rounds, strict=True))
        records.append(
            {
                **setting,
                "candidate": name,
                "density": round(density_visited, 4),
                "seconds": median,
                "seconds_p20": low,
                "seconds_p80": high,
                "dense_seconds": dense,
                "tflops": 4 * batch * heads * tokens**2 * dim * density_visited / median / 1e12,
                "speedup": speedup,
                "of_ideal": speedup * density_visited,
                "relative_error": errors[name],
            }
        )
    return records


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


HEADER = "dtype  density candidate          ms      p20      p80  TFLOP/s  x dense of ideal     error"


def line(r: dict[str, Any]) -> str:
    """One record as a row under HEADER."""
    times = "".join(f"{r[name] * 1e3:9.1f}" for name in ("seconds", "seconds_p20", "seconds_p80"))
    ratios = f"{r['tflops']:9.3f}{r['speedup']:9.2f}{r['of_ideal']:9.2f}{r['relative_error']:10.1e}"
    return f"{r['dtype']:6}{r['density']:8.3f} {r['candidate']:12}{times}{ratios}"


def main() -> None:
    """Print the table; append the records."""
    args = arguments()
    torch.set_num_threads(args.threads)
    print(f"{cpu_name()}, {args.threads} threads, {args.clock} clock, torch {torch.__version__}")
    print(f"B,H,S,D = {args.shape}, block {args.block}, {args.lists} lists, {args.rounds} rounds; ideal: 1 / density")
    print(HEADER)
    for dtype in args.dtype.split(","):
        for density in (float(x) for x in args.density.split(",")):
            for record in measure(args, dtype, density):
                print(line(record), flush=True)
                append(args.out, record)


if __name__ == "__main__":
    main()
