"""Check and time the kernels on this GPU, in pieces of less than eight minutes and less than forty in all.

`gpu.py` runs every piece, `--piece 2` one, `--list` prints what is in them. A piece is a few groups of cases: checks
against the float64 specification (grid.py) and timings beside rivals (timed.py). Each group has a process and a time
limit of its own: a case that crashes, hangs or takes all memory is recorded as failed with the last lines of output,
and the next one starts in a new process. Findings are written line by line (--out); a second start goes on where the
first one stopped, as long as the card, torch, Triton and the kernels' files are the same. It needs torch, triton and
numpy alone, and runs flash-attn-3, flash-attn-4 and our fa4 backend where they are installed.

`--dry-run sm_90` goes the same way without a card and compiles, ahead of time for that target, what each case would
launch. Ends with 1 if a case of ours was wrong, raised or did not run, or if nothing was compared.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import aot
import grid
import timed
import torch
import triton
from dit_accel_kernels.backends.triton.launch import architecture
from grid import Case
from inputs import append
from predictions import pick
from recorded import Recorded
from targets import EVERY

FIRST = ("methods", "time-wan-720p", "fa4", "time-128k", "bf16-d128", "bf16-d64", "d256")  # the most telling groups
PIECE_SECONDS = 440
START_SECONDS = 40  # of a group's limit, beside those of its cases
CASE_SECONDS = 120  # after which a case hangs
DRY_PATIENCE = 30  # times as long a dry run may take, on few cores
BROKEN = 3  # exit code of a process that can't go on, though its case is recorded
ROOT = Path(__file__).parents[1]
Plan = dict[str, list[Case]]
Record = dict[str, Any]


def groups() -> Plan:
    """All cases by group, the most telling groups first."""
    plan: Plan = {name: [] for name in FIRST}
    for case in (*grid.cases(), *timed.timings()):
        plan.setdefault(case.group, []).append(case)
    return plan


def limit(cases: list[Case]) -> int:
    """Seconds after which a group is ended."""
    return START_SECONDS + sum(case.seconds for case in cases)


def pieces(plan: Plan) -> list[Plan]:
    """The groups, each in the first piece that has time for it."""
    packed: list[Plan] = []
    for name, cases in plan.items():
        fits = [piece for piece in packed if sum(map(limit, piece.values())) + limit(cases) <= PIECE_SECONDS]
        if not fits:
            packed += (fits := [{}])
        fits[0][name] = cases
    return packed


def setting(target: str | None) -> Record:
    """What a finding holds for: the card, versions and the kernels' files."""
    files = sorted(path for path in ROOT.glob("dit_accel_kernels/**/*") if path.suffix in (".py", ".json", ".cpp"))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
    device = f"none: compiled for {target}" if target else torch.cuda.get_device_name()
    return {"device": device, "torch": torch.__version__, "triton": triton.__version__, "code": code}


class Results:
    """The file of findings, of which those of one setting count."""

    def __init__(self, path: Path, setting: Record) -> None:
        self.path, self.setting = path, setting

    def add(self, case: Case | str, group: str, record: Record) -> None:
        """Write a finding and print it."""
        name = case if isinstance(case, str) else case.name
        append(self.path, {**self.setting, "group": group, "case": name, **record})
        print(line(name, record), flush=True)

    def read(self) -> dict[str, list[Record]]:
        """The findings by case; a line that was cut short counts as not written."""
        by_case: dict[str, list[Record]] = {}
        for text in self.path.read_text().splitlines() if self.path.exists() else ():
            with contextlib.suppress(ValueError):
                record = json.loads(text)
                if record.items() >= self.setting.items():
                    by_case.setdefault(record["case"], []).append(record)
        return by_case

    def remaining(self, cases: list[Case]) -> list[Case]:
        """The cases without a finding."""
        by_case = self.read()
        return [case for case in cases if case.name not in by_case]


def work(group: str, cases: list[Case], results: Results, target: str | None) -> int:
    """Run what is left of a group in this process, one case after the other; the exit code."""
    todo = results.remaining(cases)
    pool = aot.workers(os.cpu_count() or 1)
    if not target:
        compile_ahead(todo, pool, limit(cases) / 2)
    for case in todo:
        print(f"> {case.name}", flush=True)
        faulthandler.dump_traceback_later(CASE_SECONDS * (DRY_PATIENCE if target else 1), exit=True)
        broken = False
        try:
            records = dry(case, pool, target) if target else real(case)
        except Exception as error:  # whatever is raised is the finding
            records = [verdict(case, "raised", f"{type(error).__name__}: {str(error).strip()[:300]}")]
            broken = isinstance(error, BrokenProcessPool) or not (target or usable())
        faulthandler.cancel_dump_traceback_later()
        for record in records:
            results.add(case, group, record)
        if broken:
            return BROKEN
    return 0


def real(case: Case) -> list[Record]:
    """A case on the card."""
    needs = case.missing("cuda")
    return [{"kind": "skipped", "needs": needs}] if needs else case.run("cuda")


def dry(case: Case, pool: ProcessPoolExecutor, target: str) -> list[Record]:
    """A case without a card: what it launches, compiled. What rivals and FlashAttention-4 launch is not ours."""
    names = list(pool.map(compile_one, case.launches(target).values()))
    if not names and case.backend != "triton":
        return [{"kind": "skipped", "needs": f"a card, since {case.backend} launches what it compiles itself"}]
    return [{"kind": "compiled", "launches": sorted(names), "ok": bool(names)}]


def compile_one(launch: Recorded) -> str:
    """Compile a launch into Triton's cache on disk; its name."""
    launch.compiled()
    return launch.name


def compile_ahead(cases: list[Case], pool: ProcessPoolExecutor, seconds: float) -> None:
    """Compile what the cases launch on this card, for so long; what fails or is left, its case compiles once more."""
    deadline, futures = time.monotonic() + seconds, {}
    target = architecture(torch.device("cuda", torch.cuda.current_device()))
    for case in cases:
        with contextlib.suppress(Exception):
            for identity, launch in case.launches(target).items():
                futures[identity] = futures.get(identity) or pool.submit(compile_one, launch)
    wait(futures.values(), timeout=max(0.0, deadline - time.monotonic()))
    pool.shutdown(wait=False, cancel_futures=True)


def usable() -> bool:
    """Whether the card still answers this process, as it does not after an illegal access."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:  # the error of the case, once more
        return False
    return True


def verdict(case: Case, kind: str, error: str, **more: Any) -> Record:
    """The finding of a case that came to nothing, which is a fault where it is one of ours."""
    return {"kind": kind, "error": error, **({"ok": False} if case.ours else {}), **more}


def supervise(group: str, cases: list[Case], results: Results, target: str | None) -> None:
    """Run a group in processes until nothing is left or its time is over; record the case at which one ended."""
    deadline = time.monotonic() + limit(cases) * (DRY_PATIENCE if target else 1)
    while (todo := results.remaining(cases)) and time.monotonic() < deadline:
        code, begun, tail = one_process(group, results.path, target, deadline - time.monotonic())
        why = f"its process ended with {code}" if code is not None else f"the {limit(cases)} s of its group were over"
        rest = results.remaining(cases)
        case = next((case for case in rest if case.name == begun), None)
        if case is not None:
            results.add(case, group, verdict(case, "ended", why, output=tail))
        elif len(rest) == len(todo):  # it ended before its first case
            results.add(f"{group}: start", group, {"kind": "ended", "error": why, "ok": False, "output": tail})
            return


def one_process(group: str, out: Path, target: str | None, seconds: float) -> tuple[int | None, str, list[str]]:
    """Run a group in a process: its exit code, None where it was out of time; the last case begun; its last lines."""
    command = [sys.executable, sys.argv[0], "--group", group, "--out", str(out)]
    process = subprocess.Popen(
        command + (["--dry-run", target] if target else []),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    over, begun, tail = threading.Event(), "", deque(maxlen=8)

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with what compiles for it

    timer = threading.Timer(seconds, lambda: (over.set(), end()))
    timer.start()
    try:
        for text in map(str.rstrip, process.stdout or ()):
            if text.startswith("> "):
                begun = text[2:]
            else:
                tail.append(text[-300:])
                print(text, flush=True)
        code = process.wait()
    finally:  # also where Ctrl-C ends this process
        timer.cancel()
        end()
    return None if over.is_set() else code, begun, list(tail)


def line(name: str, r: Record) -> str:
    """One finding in words."""
    if r["kind"] == "time":
        bound = ""
        if "predicted_bound" in r:
            bound = f"  at least {r['predicted_bound'] * 1e3:.3f} ms ({r['predicted_limit']})"
        rows = ""
        if not r.get("ok", r.get("agrees")):
            rows = f"  WRONG: error {r['rows_error']:.2e}, allowed {r['rows_allowed']:.2e}"
        return f"{name:36}{r['seconds'] * 1e3:10.3f} ms {r['tflops']:8.2f} TFLOP/s{bound}{rows}"
    if r["kind"] == "check":
        word = "fine " if r["ok"] else "WRONG"
        return f"{word} {name}, {r['part']}: error {r['error']:.2e}, allowed {r['allowed']:.2e}"
    if r["kind"] == "compiled":
        return f"{name}: {len(r['launches'])} launches compiled"
    return f"{name} needs {r['needs']}" if r["kind"] == "skipped" else f"FAILED {name}: {r['error']}"


def report(plan: Plan, results: Results) -> bool:
    """Print what the findings come to; whether the run failed."""
    judged = [r for group in results.read().values() for r in group if r["group"] in plan and "ok" in r]
    wrong, rest = [r for r in judged if not r["ok"]], results.remaining([x for cases in plan.values() for x in cases])
    print(f"{results.setting['device']}: {len(judged) - len(wrong)} of {len(judged)} findings as they should be")
    for r in wrong:
        print(line(r["case"], r))
    if rest:
        print(f"not run, start again to go on: {', '.join(case.name for case in rest)}")
    return bool(wrong or rest or not judged)


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the pieces and end")
    parser.add_argument("--piece", type=int, help="run this piece alone")
    parser.add_argument("--group", help="run what is left of this group in this very process, without a limit")
    parser.add_argument("--dry-run", metavar="TARGET", help=f"compile for one of {', '.join(EVERY)}, launch nothing")
    parser.add_argument("--out", type=Path, help="append one JSON line a finding to this file (default in results/)")
    args = parser.parse_args()
    if args.dry_run:
        pick(args.dry_run, EVERY, "dry-run")
    elif not args.list and not torch.cuda.is_available():
        raise SystemExit("it takes a CUDA or ROCm GPU, found none: --dry-run sm_90 needs none")
    args.out = args.out or ROOT / "bench" / "results" / ("gpu-dry.jsonl" if args.dry_run else "gpu.jsonl")
    return args


def main() -> None:
    """Run, list or dry-run; exits with 1 as said above, after Ctrl-C with 130."""
    try:
        code = run(arguments())
    except KeyboardInterrupt:
        print("stopped: what has ended is in the results, and the same command goes on", file=sys.stderr, flush=True)
        os._exit(130)  # without what compiles still
    if code is not None:
        sys.exit(code)


def run(args: argparse.Namespace) -> int | None:
    """Run, list or dry-run; the exit code of what ran."""
    everything = groups()
    every = dict(enumerate(pieces(everything), 1))
    if args.piece not in (None, *every):
        raise SystemExit(f"--piece takes 1 to {len(every)}, found {args.piece}")
    plan = every if args.piece is None else {args.piece: every[args.piece]}
    if args.list:
        for number, piece in plan.items():
            print(f"piece {number}: {sum(map(limit, piece.values()))} s at most")
            print(*(f"  {name}: {len(cases)} cases, {limit(cases)} s" for name, cases in piece.items()), sep="\n")
        return None
    results = Results(args.out, setting(args.dry_run))
    if args.group:
        [cases] = pick(args.group, everything, "group")
        torch.manual_seed(0)
        return work(args.group, cases, results, args.dry_run)
    if args.out.exists() and not args.out.read_text().endswith("\n"):
        append(args.out, {})  # ends a line that was cut short
    for number, piece in plan.items():
        for name, cases in piece.items():
            print(f"piece {number}, {name}: {len(cases)} cases", flush=True)
            supervise(name, cases, results, args.dry_run)
    return int(report({name: cases for piece in plan.values() for name, cases in piece.items()}, results))


if __name__ == "__main__":
    main()
