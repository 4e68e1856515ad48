"""Choose the launches of forward and backward for a card and write them to the package's launch table.

`python kernels/bench/tune.py` on a card takes a key at a time (dtype, head dim, tile, kernel), compiles a grid of
launches ahead of time for every feature of the kernel, drops those that spill or ask for too much shared memory, times
the most promising ones on random inputs, and keeps the one with the lowest median, summed over the features. Rows go
to the table one by one, so that an interrupted run goes on where it stopped; 540 seconds are the limit (--budget).
`--device none --arch sm_80` chooses by the compilers' reports alone: a row that is clean stays as it is.
`--device cpu --tiny` runs all of it in Triton's interpreter on toy shapes, a test whose times mean nothing.

How the grid is bounded: 16 or 32 query rows a warp; chunks of 32, 64 or 128 keys; 16 or 32 keys in slow loops; 2 or 3
stages (36 launches); a launch whose accumulators or buffers cannot fit a thread's registers or a block's shared memory
is never compiled; a compile stops at the first feature that fails; the --timed (3) launches with the fewest
instructions a logit are timed, and the one in the table. With 16 cores that is about half a minute of compiling and as
much of timing for a key, of which there are twelve.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__" and "cpu" in sys.argv:  # before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"

import aot
import torch
from calls import Setting
from cards import TARGETS
from dit_accel_kernels import (
    POOLED,
    SKIPPED,
    FrameDecay,
    TileLists,
    block_sparse_attention_backward,
    block_sparse_attention_eager,
)
from dit_accel_kernels.backends.triton.launch import (
    TABLE,
    Key,
    Launch,
    architecture,
    family,
    key_of_row,
    launch_of,
    table,
)
from inputs import decay, lists
from recorded import launches_of

DTYPES = {"half": torch.bfloat16, "fp32": torch.float32}
NAMES = {"half": "bf16", "fp32": "fp32"}
KEYS = (  # kind, head dim, tile, kernel
    *itertools.product(DTYPES, (128, 64), (128, 64), ("fwd",)),
    *itertools.product(("half",), (128, 64), (128,), ("dq", "dkdv")),
)
ROWS_OF_A_WARP = (16, 32)
GRID = tuple(
    Launch(block_q=rows, block_k=keys, block_s=slow, num_warps=rows // each, num_stages=stages)
    for rows, each, keys, slow, stages in itertools.product((128, 64), ROWS_OF_A_WARP, (128, 64, 32), (32, 16), (3, 2))
    if rows // each >= 4
)
FEATURES = {  # kinds of calls that launches are judged by
    "fwd": ("plain", "decay", "pooled", "mask", "pinned+route", "keep+maxgap", "keep+mass", "keep+budget"),
    "dq": ("backward", "pooled+backward", "pinned+routed+backward", "order+backward"),
    "dkdv": ("backward", "pooled+backward", "pinned+routed+backward", "order+backward"),
}
TIMED = ("plain", "decay", "pooled")


def fits(launch: Launch, key: Key) -> bool:
    """Whether accumulators, logits and buffers can fit the target at all; far cheaper than a compile."""
    target = TARGETS[key.arch]
    threads, size = launch.num_warps * target.warp, 4 if key.kind == "fp32" else 2
    rows, columns = launch.block_q, launch.block_k
    if key.kernel == "dkdv":  # its rows are keys, of which it holds two gradients
        rows, columns = columns, rows
    held = rows * ((2 if key.kernel == "dkdv" else 1) * key.dim + columns) / threads  # float32 a thread
    buffers = 2 * (launch.num_stages - 1) * columns * key.dim * size
    return held <= (1024 if target.tensor == "tcgen05" else 232) and buffers <= target.shared_block


def candidates(key: Key, tiny: bool) -> list[Launch]:
    """Launches of the grid, cut down to the key's tile, that can fit; the one in the table first."""
    kind, tile = key.kind, key.tile
    current = launch_of(key.arch, DTYPES[kind], key.dim, tile, key.kernel)
    if tiny:
        return [current, replace(current, block_k=32, block_s=32)]
    grid = list(GRID)
    if kind == "fp32":  # three products each: a quarter of the rows, short chunks
        grid = [replace(x, block_q=x.block_q // 4, block_k=min(x.block_k, 32), num_stages=1) for x in grid]
    grid = [launch for launch in grid if launch.block_q <= tile and launch.block_k <= tile]
    return list(dict.fromkeys([current, *(launch for launch in grid if fits(launch, key))]))


@contextmanager
def trial(key: Key, launch: Launch) -> Iterator[None]:
    """A launch in the table of this process, for as long as this lasts."""
    rows = table()
    before = rows.get(key)
    rows[key] = launch
    try:
        yield
    finally:
        if before is None:
            del rows[key]
        else:
            rows[key] = before


def compile_launch(key: Key, launch: Launch, match: str = "") -> list[dict[str, Any]]:
    """Compile table records of the kernel's calls with this launch, up to the first that fails or spills."""
    at, into = Setting(dtype=NAMES[key.kind], dim=key.dim, tile=key.tile), {}
    with trial(key, launch):
        for kind in FEATURES[key.kernel]:
            if re.search(match, kind):
                launches_of(kind, at, key.arch, into)
        records = []
        for recorded in into.values():  # a record names its row of the table, which is there inside the trial alone
            if recorded.name.startswith(f"{key.kernel}-"):
                records.append(aot.compile_one(recorded))
                if aot.faults(records[-1]) or aot.spilled(records[-1]):
                    break
    return records


def instructions(records: list[dict[str, Any]]) -> float:
    """Instructions of a lane for a logit in the plain loop, the mean over features: less is better."""
    lanes = [r["warps"] * TARGETS[r["target"]].warp / r["logits"] for r in records]
    return sum(r["mix"]["instructions"] * n for r, n in zip(records, lanes, strict=True)) / len(records)


def clean(key: Key, launches: list[Launch], jobs: int, match: str) -> dict[Launch, float]:
    """Launches that compile without a fault for every feature, with their instructions a logit, best first.

    Launches with fewer than 8 warps on a multiprocessor hide no latency and come last.
    """
    interpret = os.environ.pop("TRITON_INTERPRET", None)  # for the processes that compile
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(compile_launch, *zip(*((key, launch, match) for launch in launches), strict=True)))
    if interpret is not None:
        os.environ["TRITON_INTERPRET"] = interpret
    good: dict[Launch, tuple[bool, float]] = {}
    for launch, records in zip(launches, found, strict=True):
        if records and not any(aot.faults(r) or aot.spilled(r) for r in records):
            idle = min(r["blocks"] * r["warps"] for r in records) < 8
            good[launch] = (idle, instructions(records))
    return {launch: good[launch][1] for launch in sorted(good, key=lambda launch: good[launch])}


def seconds(key: Key, launch: Launch, args: argparse.Namespace) -> float:
    """Median seconds of a call with this launch, or of its backward, summed over the features."""
    kind, dim, tile = key.kind, key.dim, key.tile
    heads, tokens = (1, 2 * tile) if args.tiny else (args.heads, args.tokens)
    dtype = torch.float16 if args.tiny and kind == "half" else DTYPES[kind]  # the interpreter has no bfloat16 products
    q, k, v = (torch.randn(1, heads, tokens, dim).to(args.device, dtype) for _ in range(3))
    features: dict[str, tuple[int, dict[str, FrameDecay]]] = {
        "plain": (SKIPPED, {}),
        "decay": (SKIPPED, {"frame_decay": decay(tokens, args.device)}),
        "pooled": (POOLED, {}),
    }
    total = 0.0
    with trial(key._replace(arch=family(architecture(torch.device(args.device)))), launch):
        for rest, arguments in (features[name] for name in TIMED):
            if key.kernel != "fwd" and "frame_decay" in arguments:
                continue  # its rows are apart
            tiles: TileLists = lists(tokens, tile, args.density, rest, args.device)
            options: dict[str, Any] = {"layout": "bhsd", "backend": "triton", **arguments}
            run = block_sparse_attention_eager if key.kernel == "fwd" else partial(block_sparse_attention_backward, q)
            total += median(partial(run, q, k, v, tiles, **options), args.device)
    return total


def median(call: Any, device: str) -> float:
    """Median seconds of a call after a warm-up."""
    if device != "cpu":
        import triton

        return triton.testing.do_bench(call, warmup=25, rep=100, return_mode="median") / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def fingerprint() -> str:
    """Of the kernels' source: a row measured with another kernel is measured again."""
    sources = [(TABLE.parent / f"{name}.py").read_bytes() for name in ("forward", "backward_kernels")]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:12]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace the table, all or nothing."""
    new = path.with_suffix(".new")
    new.write_text("[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n]\n")
    os.replace(new, path)


def put(path: Path, key: Key, launch: Launch, source: Any) -> None:
    """Write one row to the table at `path`, in order."""
    rows = {key_of_row(row): row for row in json.loads(path.read_text())}
    rows[key] = {**key._asdict(), **asdict(launch), "source": source}
    kernels = ("fwd", "dq", "dkdv", "pooled")
    order = sorted(rows, key=lambda k: (kernels.index(k.kernel), k.arch, k.kind != "half", k.dim, k.tile, k.feature))
    write(path, [rows[k] for k in order])


def source_of(path: Path, key: Key) -> Any:
    """How the row of a key was chosen; None where there is none."""
    return next((row["source"] for row in json.loads(path.read_text()) if key_of_row(row) == key), None)


def tune(key: Key, args: argparse.Namespace, setting: dict[str, Any]) -> list[str]:
    """Choose a key's launch, write its row, and give a line of the printed table."""
    launches = candidates(key, args.tiny)
    current = launches[0]
    good = clean(key, launches, args.jobs, args.match)
    head = [*map(str, key[1:5]), str(len(launches)), str(len(good))]
    if not good:
        return [*head, "none is clean: row unchanged"]
    if args.device == "none":
        best, source, time_taken = (current if current in good else next(iter(good))), "compiled", ""
    else:
        chosen = list(good)[: args.timed]
        chosen = list(dict.fromkeys([*([current] if current in good else []), *chosen]))
        times = {launch: seconds(key, launch, args) for launch in chosen}
        best = min(times, key=lambda launch: times[launch])
        source, time_taken = {**setting, "seconds": round(times[best], 6)}, f"{times[best] * 1e3:.3f}"
    if args.device != "none" or best != current:
        put(args.out, key, best, source)
    sizes = f"{best.block_q}x{best.block_k}x{best.block_s} w{best.num_warps} s{best.num_stages}"
    return [*head, sizes, f"{good[best]:.2f}", time_taken]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu", "none"), help="none: compile only")
    parser.add_argument("--arch", help="architecture, with --device none or cpu (default sm_90)")
    parser.add_argument("--key", default="", help="only keys that match this, such as half,128,64 (default: all)")
    parser.add_argument("--match", default="", help="only kinds of calls that match this regular expression")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of the timed calls (default %(default)s)")
    parser.add_argument("--heads", type=int, default=16, help="heads of the timed calls (default %(default)s)")
    parser.add_argument("--density", type=float, default=0.25, help="kept share of tiles (default %(default)s)")
    parser.add_argument("--timed", type=int, default=3, help="launches timed for a key (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default %(default)s)")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which no key starts (%(default)s)")
    parser.add_argument("--again", action="store_true", help="measure again what this card has measured")
    parser.add_argument("--tiny", action="store_true", help="two launches on toy shapes")
    parser.add_argument("--out", type=Path, default=TABLE, help="table to write (default: the package's)")
    return parser.parse_args()


def checked(args: argparse.Namespace) -> tuple[str, list[Key], dict[str, Any]]:
    """Architecture, keys and what a measured row says of its source; bad arguments end the program."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "--device cuda needs a CUDA or ROCm GPU, found none: --device none --arch sm_90 chooses by compile reports"
        )
    if args.device == "cuda" and args.arch:
        raise SystemExit(f"--arch is the card's own on --device cuda, found {args.arch!r}: leave it out")
    if args.device == "cpu" and (not args.tiny or args.out == TABLE):
        raise SystemExit("--device cpu tests the script and measures nothing: give --tiny and --out of a copy")
    arch = family(architecture(torch.device("cuda")) if args.device == "cuda" else args.arch or "sm_90")
    if arch not in TARGETS:
        raise SystemExit(f"launches are tuned for {', '.join(TARGETS)}: found {arch!r}")
    keys = [Key(arch, *key) for key in KEYS if re.match(args.key, ",".join(map(str, key)))]
    if not keys:
        known = "; ".join(",".join(map(str, key)) for key in KEYS)
        raise SystemExit(f"--key matches kind,dim,tile,kernel of {known}: found {args.key!r}")
    if not args.out.exists():
        write(args.out, json.loads(TABLE.read_text()))
    names = {"cpu": "none: interpreted on a CPU", "none": "none: compiled only"}
    card = names.get(args.device) or torch.cuda.get_device_name()
    return arch, keys, {"card": card, "date": date.today().isoformat(), "kernel": fingerprint()}


def main() -> None:
    """Tune every key, print a table."""
    from rich.console import Console
    from rich.table import Table

    args = arguments()
    arch, keys, setting = checked(args)
    torch.manual_seed(0)
    deadline = time.monotonic() + args.budget
    shown = Table(
        "dtype",
        "D",
        "tile",
        "kernel",
        "grid",
        "clean",
        "launch",
        "instr/logit",
        "ms",
        title=f"{arch}, {setting['card']}",
    )
    late = []
    for key in keys:
        source = source_of(args.out, key)
        done = isinstance(source, dict) and all(source.get(name) == setting[name] for name in ("card", "kernel"))
        if done and not args.again and args.device != "none":
            shown.add_row(*map(str, key[1:]), "", "", "measured before")
        elif time.monotonic() > deadline:
            late.append(",".join(map(str, key[1:5])))
        else:
            shown.add_row(*tune(key, args, setting))
    Console(width=120).print(shown)
    if late:
        print(f"left out for time, run it again to go on: {'; '.join(late)}")


if __name__ == "__main__":
    main()
