"""Check and time the Triton kernels on this GPU, in two commands of less than eight minutes each.

`gpu.py check` compiles what the grid (grid.py) launches, in parallel on all cores, and compares every case with the
specification. `gpu.py time` times our calls beside their rivals on the shapes of models, and compares some rows of
every timed call with the specification. Both need torch, triton and numpy alone, write every finding as it comes
(--out), stop when --budget seconds are spent and say what they left out. `--device cpu --tiny` runs the same commands
in Triton's interpreter on toy shapes: a test of the script, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

if "cpu" in sys.argv:  # before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import calls
import grid
import torch
import triton
from calls import DTYPES
from inputs import append
from predictions import CANDIDATES, SHAPES, Shape, card_of, pick, predict
from recorded import Recorded, launches_of
from timed import Timed, calls_of

ORDER = ("wan-720p", "128k", "hunyuan-720p", "cogvideox1.5", "wan-480p", "mochi")
COMPILING = 0.5  # most of the budget that compiling ahead may take
GRACE = 25  # seconds after the budget at which the process ends, whatever hangs
TIMED_KINDS = ("plain", "decay", "pooled", "pinned+route", "keep+pinned", "keep+pinned+maxgap", "backward")
Record = dict[str, Any]


def compile_ahead(cases: list[tuple[str, calls.Setting]], deadline: float, jobs: int) -> Iterator[Record]:
    """Compile what the cases launch on this card into Triton's cache, in `jobs` processes, until the deadline."""
    from dit_accel_kernels.backends.triton.launch import architecture

    target = architecture(torch.device("cuda", torch.cuda.current_device()))
    into: dict[str, Recorded] = {}
    for kind, at in cases:
        launches_of(kind, at, target, into)
    context, start = multiprocessing.get_context("spawn"), time.monotonic()
    pool = ProcessPoolExecutor(jobs, mp_context=context)
    futures = {pool.submit(compile_one, launch): launch for launch in into.values()}
    done = 0
    try:
        for future in as_completed(futures, timeout=max(0.0, deadline - time.monotonic())):
            done += 1
            if future.result():
                yield {"kind": "compile", "launch": futures[future].name, "error": future.result()}
    except TimeoutError:
        pass
    for process in list(pool._processes.values()):
        process.terminate()
    pool.shutdown(wait=False, cancel_futures=True)
    yield {"kind": "compiled", "launches": done, "of": len(into), "seconds": round(time.monotonic() - start, 1)}


def compile_one(launch: Recorded) -> str | None:
    """Compile one launch into the cache on disk; what went wrong, or None."""
    try:
        launch.compiled()
    except Exception as error:  # whatever a compiler raises is the finding
        return f"{type(error).__name__}: {str(error).strip()[-300:]}"
    return None


def check(args: argparse.Namespace, deadline: float, left_out: list[str]) -> Iterator[Record]:
    """Compile the grid, then run it."""
    cases = grid.cases()
    if args.tiny:
        cases = [replace(case, at=replace(case.at, tile=16, dim=16, dtype="fp32")) for case in cases]
        cases = list(dict.fromkeys(cases))
    cases = [case for case in cases if args.match in case.name]
    if args.device != "cpu":
        until = time.monotonic() + COMPILING * (deadline - time.monotonic())
        yield from compile_ahead([(case.kind, case.at) for case in cases], until, args.jobs)
    for case in cases:
        if time.monotonic() > deadline:
            left_out.append(case.name)
            continue
        try:
            yield from grid.check(case, args.device)
        except Exception as error:  # one that can't run is a finding, not the end
            text = f"{type(error).__name__}: {str(error).strip()[:300]}"
            yield {"kind": "check", "case": case.name, "part": "run", "ok": False, "error": text}


def timed(args: argparse.Namespace, deadline: float, left_out: list[str]) -> Iterator[Record]:
    """Compile what is timed, then time it, shape by shape."""
    shapes: list[Shape] = args.shape
    if args.tiny:
        shapes = [replace(shape, heads=2, tokens=120, dim=16, block=32) for shape in shapes]
    if args.device != "cpu":
        settings = {calls.Setting(dtype=args.dtype, dim=x.dim, tile=x.block, batch=1, layout="bhsd") for x in shapes}
        until = time.monotonic() + COMPILING * (deadline - time.monotonic())
        yield from compile_ahead([(kind, at) for at in settings for kind in TIMED_KINDS], until, args.jobs)
    for shape in shapes:
        yield from measure(shape, args, deadline, left_out)


def measure(shape: Shape, args: argparse.Namespace, deadline: float, left_out: list[str]) -> Iterator[Record]:
    """Time everything of one shape until the deadline; what fails is recorded with its error, what is late left out."""
    for (candidate, density), prepare in calls_of(shape, DTYPES[args.dtype], args.device).items():
        if time.monotonic() > deadline:
            left_out.append(f"{shape.name} {candidate} {density:g}")
            continue
        record: Record = {"kind": "time", "shape": shape.name, "candidate": candidate, "density": density}
        try:
            call = prepare()
            results = call.run()
            visited, (error, allowed) = call.density_of(results), call.check(results)
            del results
            median, low, high = seconds_of(call, args.device)
        except Exception as error:  # a rival that cannot run here is a finding, not the end of the bench
            yield {**record, "error": f"{type(error).__name__}: {str(error).strip()[:200]}"}
            continue
        products = 4 * shape.batch * shape.heads * shape.tokens**2 * shape.dim * visited
        products *= 2.5 if candidate == "triton-backward" else 1.0
        times = {"seconds": median, "seconds_p20": low, "seconds_p80": high, "tflops": products / median / 1e12}
        rows = {"rows_error": error, "rows_allowed": allowed, "ok": error <= allowed}
        yield {**record, "density_found": visited, **times, **rows, **prediction(shape, candidate, visited, args)}


def seconds_of(call: Timed, device: str) -> tuple[float, float, float]:
    """Seconds of a call: median, 20th and 80th percentile, after a warm-up."""
    if device != "cpu":
        quantiles = triton.testing.do_bench(call.run, warmup=50, rep=300, quantiles=[0.5, 0.2, 0.8])
        return tuple(x / 1e3 for x in quantiles)  # pyright: ignore
    start = time.perf_counter()
    call.run()
    return (time.perf_counter() - start,) * 3


def prediction(shape: Shape, candidate: str, density: float, args: argparse.Namespace) -> Record:
    """The least seconds that the call can take and its slowest engine, if predictions.py knows this card and call."""
    card = None if args.device == "cpu" else card_of(torch.cuda.get_device_name())
    if card is None or candidate not in CANDIDATES:
        return {}
    predicted = predict(shape, candidate, density, card)
    return {"predicted_bound": predicted["bound"], "predicted_limit": predicted["limit"]}


def line(r: Record) -> str:
    """One finding in words; empty for what is as it should be and need not be shown."""
    if r["kind"] == "time":
        head = f"{r['shape']:14}{r['candidate']:16}{r['density']:5g} "
        if "error" in r:
            return head + r["error"]
        bound = ""
        if "predicted_bound" in r:
            bound = f"  at least {r['predicted_bound'] * 1e3:.3f} ms ({r['predicted_limit']})"
        rows = "" if r["ok"] else f"  WRONG: error {r['rows_error']:.2e}, allowed {r['rows_allowed']:.2e}"
        return f"{head}{r['seconds'] * 1e3:10.3f} ms {r['tflops']:8.2f} TFLOP/s{bound}{rows}"
    if r["kind"] == "check":
        allowed = f", allowed {r['allowed']:.2e}" if "allowed" in r else ""
        return "" if r["ok"] else f"WRONG {r['case']}, {r['part']}: error {r['error']}{allowed}"
    if r["kind"] == "compiled":
        return f"compiled {r['launches']} of {r['of']} launches in {r['seconds']} s"
    return f"DID NOT COMPILE {r['launch']}: {r['error']}"


def failed(record: Record) -> bool:
    """Whether a finding is a fault: a launch that did not compile, a wrong result, a timed call of ours that raised.

    Ours are the candidates whose name begins with "triton"; that a rival can't run here is none.
    """
    if record["kind"] == "time" and "error" in record:
        return record["candidate"].startswith("triton")
    return record["kind"] == "compile" or not record.get("ok", True)


def wrong(records: list[Record]) -> bool:
    """Whether any finding is a fault, or nothing was compared."""
    return any(map(failed, records)) or not any("ok" in r for r in records)


def summary(records: list[Record], left_out: list[str], title: str) -> None:
    """Print what all findings come to."""
    judged = [r for r in records if "ok" in r]
    print(f"{title}: {sum(r['ok'] for r in judged)} of {len(judged)} comparisons within the rule")
    raised = sum(failed(r) for r in records if r["kind"] == "time" and "error" in r)
    if raised:
        print(f"{raised} timed calls of ours raised")
    if "interpreted" in title and any(r["kind"] == "time" for r in records):
        print("interpreted: times mean nothing")
    if left_out:
        print(f"left out for time: {', '.join(left_out)}")


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("check", "time"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: Triton's interpreter")
    parser.add_argument("--dtype", choices=DTYPES, help="of timed calls; default: bf16 on cuda, fp32 on cpu")
    parser.add_argument("--shape", default=",".join(ORDER), help="timed shapes, in order (default %(default)s)")
    parser.add_argument("--match", default="", help="only cases of the grid whose name holds this")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--budget", type=float, default=440, help="seconds for everything (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile (%(default)s)")
    parser.add_argument("--out", type=Path, help="append one JSON line a finding to this file")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a CUDA or ROCm GPU, found none: --device cpu --tiny tests the script")
    args.shape = pick(args.shape, SHAPES, "shape")
    args.dtype = args.dtype or ("fp32" if args.device == "cpu" else "bf16")
    return args


def main() -> None:
    """Check or time, and report; exits with 1 if anything was wrong or nothing was compared."""
    args = arguments()
    deadline = time.monotonic() + args.budget
    faulthandler.dump_traceback_later(args.budget + GRACE, exit=True)
    device = "CPU, interpreted" if args.device == "cpu" else torch.cuda.get_device_name()
    setting = {"device": device, "torch": torch.__version__, "triton": triton.__version__}
    torch.manual_seed(0)
    left_out: list[str] = []
    records: list[Record] = []
    for record in {"check": check, "time": timed}[args.command](args, deadline, left_out):
        records.append(record)
        append(args.out, {**setting, "dtype": args.dtype, **record})
        if line(record):
            print(line(record), flush=True)
    summary(records, left_out, device)
    sys.stdout.flush()
    sys.exit(wrong(records))


if __name__ == "__main__":
    main()
