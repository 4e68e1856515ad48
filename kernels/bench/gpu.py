"""Check every Triton kernel on this GPU against the specification, then time it beside its rivals, in one command.

`python kernels/bench/gpu.py --out gpu.jsonl` writes every finding as it comes, stops starting new work when --budget
seconds are spent and says what it left out; the most telling shapes come first. It ends with the goals that the kernels
are held to, each with what was measured. `--device cpu --tiny` runs the same script in Triton's interpreter on toy
shapes: a test of the script, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

if "cpu" in sys.argv:  # before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
from cards import CARDS
from dit_accel_kernels import POOLED, SKIPPED, Routing, Selection, TileLists, Vote, block_sparse_attention_eager
from dit_accel_kernels.problem import Problem
from dit_accel_kernels.selection import count_bits, pack_bits
from gpu_checks import check
from inputs import decay, keep_bits, lists
from roofline import SHAPES, Mix, Shape, backward, features_of, predict
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
ORDER = ("wan-720p", "128k", "hunyuan-720p", "cogvideox1.5", "wan-480p", "mochi")
RADIAL = 0.27  # RadialAttention's density at Wan 720p, 81 frames
BETA = 1.2816  # routes a tenth of the tiles of random inputs to exact ones: 1 - Phi(BETA) = 0.1
Call = Callable[[], object]


def calls_of(
    shape: Shape, dtype: torch.dtype, device: str, selecting: str
) -> dict[tuple[str, float], Callable[[], Call]]:
    """What to time for one shape: (candidate, density) -> a function that prepares the call, the telling ones first.

    `selecting` is the backend of the calls with a selection.
    """
    layout = (shape.batch, shape.heads, shape.tokens, shape.dim)
    q, k, v = (torch.randn(layout, device=device, dtype=dtype) for _ in range(3))

    def ours(density: float, rest: int = SKIPPED, backend: str = "triton", **arguments: Any) -> Call:
        tiles = lists(shape.tokens, shape.block, density, rest, device)
        return lambda: block_sparse_attention_eager(q, k, v, tiles, layout="bhsd", backend=backend, **arguments)

    def selected(kept: float, votes: bool = False, routes: bool = False) -> Call:
        """LiteAttention: kept tiles of every head, with votes or without. SolAttention: routing, diagonal pinned."""
        tiles = TileLists.full(shape.tokens, shape.tokens, block_q=shape.block, block_k=shape.block).to(device)
        count = tiles.key_tiles
        selection = Selection(
            keep=None if routes else keep_bits(shape.batch, shape.heads, count, kept, device),
            pinned=pack_bits(torch.eye(count, dtype=torch.bool, device=device)),
            routing=Routing(beta=BETA) if routes else None,
            vote=Vote() if votes else None,
        )
        arguments: dict[str, Any] = {"layout": "bhsd", "backend": selecting, "selection": selection}
        return lambda: block_sparse_attention_eager(q, k, v, tiles, return_tiles=routes, **arguments)

    def gradients(density: float) -> Call:
        from dit_accel_kernels.backends.triton.attend import attend
        from dit_accel_kernels.backends.triton.backward import attend_backward

        problem = problem_of(q, k, v, lists(shape.tokens, shape.block, density, SKIPPED, device))
        out, lse, *_ = attend(problem, need_lse=True)
        grad_out = torch.randn_like(out)
        return lambda: attend_backward(problem, out, lse, grad_out, None)

    def dense(name: str) -> Call:
        def call() -> Tensor:
            with sdpa_kernel(SDPA[name]):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v)

        return call

    found: dict[tuple[str, float], Callable[[], Call]] = {}
    found["triton", RADIAL] = lambda: ours(RADIAL)
    for name in SDPA:
        found[name, 1.0] = lambda name=name: dense(name)
    found["triton", 1.0] = lambda: ours(1.0)
    found["flex", RADIAL] = lambda: ours(RADIAL, backend="flex")
    found["triton", 0.1] = lambda: ours(0.1)
    found["triton-backward", RADIAL] = lambda: gradients(RADIAL)
    found["triton-decay", RADIAL] = lambda: ours(RADIAL, frame_decay=decay(shape.tokens, device))
    found["triton-pooled", 0.1] = lambda: ours(0.1, POOLED)
    found["triton-routed", 0.1] = lambda: selected(0.1, routes=True)
    found["triton-kept", RADIAL] = lambda: selected(RADIAL)
    found["triton-votes", RADIAL] = lambda: selected(RADIAL, votes=True)
    for density in (0.25, 0.5):
        found["triton", density] = lambda density=density: ours(density)
    return found


def problem_of(q: Tensor, k: Tensor, v: Tensor, tiles: TileLists) -> Problem:
    """A plain call as the backends see it."""
    names = ("exact_offsets", "exact_indices", "pooled_offsets", "pooled_indices", "block_q", "block_k")
    parts = {name: getattr(tiles, name) for name in names}
    scale = q.shape[-1] ** -0.5
    return Problem(q=q, k=k, v=v, **parts, logit_scale=scale, head_scale=None, key_valid=None, decay=None)


def timed(call: Call, device: str) -> tuple[float, float, float]:
    """Seconds of a call: median, 20th and 80th percentile, after a warm-up."""
    if device != "cpu":
        found = triton.testing.do_bench(call, warmup=50, rep=300, quantiles=[0.5, 0.2, 0.8])
        return tuple(x / 1e3 for x in found)  # pyright: ignore
    call()
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start,) * 3


def measure(
    shape: Shape, dtype: torch.dtype, device: str, selecting: str, deadline: float, left_out: list[str]
) -> Iterator[dict[str, Any]]:
    """Time everything of one shape until the deadline; what fails is recorded with its error, what is late left out."""
    for (candidate, density), prepare in calls_of(shape, dtype, device, selecting).items():
        if time.monotonic() > deadline:
            left_out.append(f"{shape.name} {candidate} {density:g}")
            continue
        record: dict[str, Any] = {"kind": "time", "shape": shape.name, "candidate": candidate, "density": density}
        try:
            call = prepare()
            found = routed_density(call(), shape) if candidate == "triton-routed" else density
            median, low, high = timed(call, device)
        except Exception as error:  # a rival that cannot run here is a finding, not the end of the bench
            yield {**record, "error": f"{type(error).__name__}: {str(error).strip()[:200]}"}
            continue
        products = 4 * shape.batch * shape.heads * shape.tokens**2 * shape.dim * found
        products *= 2.5 if candidate == "triton-backward" else 1.0
        times = {"seconds": median, "seconds_p20": low, "seconds_p80": high, "tflops": products / median / 1e12}
        yield {**record, "density_found": found, **times, **prediction(shape, candidate, found, device)}


def routed_density(found: Any, shape: Shape) -> float:
    """Share of exact tiles that a call with routing chose, from what it returned."""
    return float(count_bits(found[1]).sum()) / (shape.batch * shape.heads * shape.tiles)


def prediction(shape: Shape, candidate: str, density: float, device: str) -> dict[str, Any]:
    """The roofline's bound and serial seconds, if this card is one it knows."""
    card = next((c for name, c in CARDS.items() if device != "cpu" and name in torch.cuda.get_device_name()), None)
    if card is None or not candidate.startswith("triton"):
        return {}
    found = predict(shape, density, card, Mix(), **features_of(candidate, density))
    found = backward(found) if candidate == "triton-backward" else found
    return {"predicted_bound": found["bound"], "predicted_serial": found["serial"]}


def goals(records: list[dict[str, Any]]) -> list[tuple[str, float | None, float, bool]]:
    """(goal, worst found or None, limit, whether less is better), from the timed records."""
    seconds = {(r["shape"], r["candidate"], r["density"]): r["seconds"] for r in records if "seconds" in r}
    shapes = {shape for shape, _, _ in seconds}

    def ratios(a: tuple[str, float], b: tuple[str, float], only: set[str] | None = None) -> list[float]:
        found = [(seconds.get((s, *a)), seconds.get((s, *b))) for s in sorted(only or shapes)]
        return [x / y for x, y in found if x is not None and y is not None]

    def best_dense(shape: str, density: float) -> float | None:
        rivals = [seconds[shape, name, 1.0] for name in SDPA if (shape, name, 1.0) in seconds]
        own = seconds.get((shape, "triton", density))
        return min(rivals) / own if rivals and own else None

    def routed() -> list[float]:
        """Against the plain time at 0.1, which grows with the density that routing really chose."""
        found = {
            r["shape"]: r["density_found"] / 0.1
            for r in records
            if "seconds" in r and r["candidate"] == "triton-routed"
        }
        pairs = [(s, ratios(("triton-routed", 0.1), ("triton", 0.1), {s})) for s in sorted(found)]
        return [x / found[s] for s, values in pairs for x in values]

    def linear() -> list[float]:
        return [x / d for d in (0.1, 0.25, RADIAL, 0.5) for x in ratios(("triton", d), ("triton", 1.0))]

    worst = lambda values, pick: pick(values) if values else None  # noqa: E731
    return [
        ("time over density x all-tiles time", worst(linear(), max), 1.12, True),
        ("best SDPA over ours, wan-720p at 0.27", best_dense("wan-720p", RADIAL), 2.5, False),
        ("best SDPA over ours, 128k at 0.1", best_dense("128k", 0.1), 5.0, False),
        ("FlexAttention over ours", worst(ratios(("flex", RADIAL), ("triton", RADIAL)), min), 1.1, False),
        ("with decay over without", worst(ratios(("triton-decay", RADIAL), ("triton", RADIAL)), max), 1.05, True),
        ("with votes over without", worst(ratios(("triton-votes", RADIAL), ("triton-kept", RADIAL)), max), 1.02, True),
        ("with routing over without", worst(routed(), max), 1.1, True),
        ("with pooled rest over without", worst(ratios(("triton-pooled", 0.1), ("triton", 0.1)), max), 1.1, True),
        ("backward over forward", worst(ratios(("triton-backward", RADIAL), ("triton", RADIAL)), max), 2.7, True),
    ]


def report(records: list[dict[str, Any]], left_out: list[str], title: str) -> None:
    """Print checks, times and goals."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=140)
    checks = [r for r in records if r["kind"] == "check"]
    bad = [r for r in checks if not r["ok"]]
    console.print(f"{title}: {len(checks) - len(bad)} of {len(checks)} checks within the rule")
    for r in bad:
        console.print(f"  {r['feature']}, {r['part']}: error {r['error']:.2e}, allowed {r['allowed']:.2e}")
    table = Table("shape", "candidate", "density", "ms", "p20", "p80", "TFLOP/s", "bound ms", "serial ms")
    for r in (r for r in records if r["kind"] == "time"):
        head = (r["shape"], r["candidate"], f"{r['density']:g}")
        if "error" in r:
            table.add_row(*head, r["error"][:40])
            continue
        times = [f"{r[name] * 1e3:.3f}" for name in ("seconds", "seconds_p20", "seconds_p80")]
        predicted = [f"{r[n] * 1e3:.3f}" if n in r else "" for n in ("predicted_bound", "predicted_serial")]
        table.add_row(*head, *times, f"{r['tflops']:.2f}", *predicted)
    console.print(table)
    if "interpreted" in title:
        console.print("interpreted: times and goals mean nothing")
    for name, value, limit, less in goals(records):
        if value is None:
            console.print(f"not measured {name}")
        else:
            reached = value <= limit if less else value >= limit
            console.print(f"{'met' if reached else 'MISSED':12} {name}: {value:.3f} ({'<=' if less else '>='} {limit})")
    if left_out:
        console.print(f"left out for time: {', '.join(left_out)}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: Triton's interpreter")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on cuda, fp32 on cpu")
    parser.add_argument("--shape", default=",".join(ORDER), help="comma list, in order (default %(default)s)")
    parser.add_argument(
        "--selecting",
        default="triton",
        choices=("triton", "torch", "reference"),
        help="backend of calls with a selection",
    )
    parser.add_argument("--tiny", action="store_true", help="the same shapes with 2 heads and 120 tokens")
    parser.add_argument("--budget", type=float, default=500, help="seconds after which nothing starts (%(default)s)")
    parser.add_argument("--out", type=Path, help="append one JSON line a finding to this file")
    return parser.parse_args()


def main() -> None:
    """Check, time, report; exits with 1 if a check failed."""
    args = arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a CUDA or ROCm GPU, found none: --device cpu --tiny tests the script")
    unknown = [name for name in args.shape.split(",") if name not in SHAPES]
    if unknown:
        raise SystemExit(f"--shape takes {', '.join(SHAPES)}: found {', '.join(unknown)}")
    deadline = time.monotonic() + args.budget
    dtype = args.dtype or ("fp32" if args.device == "cpu" else "bf16")
    device = "CPU, interpreted" if args.device == "cpu" else torch.cuda.get_device_name()
    setting = {"device": device, "torch": torch.__version__, "triton": triton.__version__, "dtype": dtype}
    torch.manual_seed(0)
    left_out: list[str] = []
    records = []
    for record in work(args, DTYPES[dtype], deadline, left_out):
        records.append(record)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps({**setting, **record}) + "\n")
    report(records, left_out, f"{device}, {dtype}")
    sys.exit(any(not r["ok"] for r in records if r["kind"] == "check"))


def work(
    args: argparse.Namespace, dtype: torch.dtype, deadline: float, left_out: list[str]
) -> Iterator[dict[str, Any]]:
    """Everything there is to find, as it is found."""
    for record in check(dtype, args.device, 16 if args.tiny else 128, args.selecting):
        yield record
        if time.monotonic() > deadline:
            left_out.append("checks after this one")
            break
    for name in args.shape.split(","):
        shape = SHAPES[name]
        shape = replace(shape, heads=2, tokens=120, dim=16, block=32) if args.tiny else shape
        yield from measure(shape, dtype, args.device, args.selecting, deadline, left_out)


if __name__ == "__main__":
    main()
