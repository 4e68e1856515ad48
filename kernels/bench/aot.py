"""Compile the Triton kernels for six GPU targets without a GPU, and tabulate what the compilers made of them.

`python kernels/bench/aot.py --out aot.jsonl` compiles what real calls launch (recorded.py): calls of the methods
(cases.py), and those that launch every row of the launch table on every target that takes it (promised.py). It prints
one row each (registers, spills, shared memory, blocks an SM, hot loop) and writes JSON lines; with --match and --merge
it compiles some of them anew in a file that has all. A record names its row of the launch table with its sizes, and
holds the Triton version and the fingerprint of what was compiled: the kernel as Triton's front end makes it for that
target, without locations, so that comments and lines don't count. With --changed only what differs from its record in
--out, or has none, is compiled. Exits with 1 if a kernel fails to compile, spills in its hot loop (under the Triton of
the committed table; else that is told), asks for more shared memory than its target has, or has in the hot loop of full
tiles what should not be there.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import astuple
from functools import lru_cache
from pathlib import Path
from typing import Any

import listing
from cards import EVERY, TARGETS
from compiled import describe, has_hot_loop, turns
from dit_accel_kernels.backends.triton.launch import table
from recorded import Recorded, gpu_target

PACKAGE = "dit_accel_kernels"
Key = tuple[str, str]  # launch, target
SPILLS = 96  # words that a kernel may spill outside of its hot loop: once a tile or less
WIDE_SPILLS = 4  # words that it may in the hot loop, with products of fp32
COLD_SPILLS = 8  # words that a kernel without a hot loop may spill: it waits for memory
TABLE = Path(__file__).parent / "results" / "aot.jsonl"
MODULES = "cases,promised"  # calls of the methods, and calls that launch every row of the launch table


def tasks(match: str, targets: list[str], modules: str = MODULES) -> list[Recorded]:
    """The launches to compile, each once a target: what each module's `record_cases(target, into)` records.

    `match` is a regular expression searched in their names.
    """
    found: list[Recorded] = []
    for target in targets:
        into: dict[str, Recorded] = {}
        for module in modules.split(","):
            importlib.import_module(module).record_cases(target, into)
        found += [x for x in into.values() if re.search(match, x.name)]
    return found


def compile_one(launch: Recorded) -> dict[str, Any]:
    """One launch, as a JSON-ready record; a compiler's failure becomes its `error`."""
    target = EVERY[launch.target]
    record: dict[str, Any] = {
        "launch": launch.name,
        "target": launch.target,
        "warps": launch.num_warps,
        "stages": launch.num_stages,
        "logits": launch.constants.get("BLOCK_Q", 0) * launch.constants.get("BLOCK_K", 0),  # of a turn of a hot loop
        "hot_loop": has_hot_loop(launch),
    }
    record |= row_of(launch)
    start = time.perf_counter()
    try:
        record |= {"triton": triton_version(), "fingerprint": fingerprint(launch)}
        compiled = launch.compiled()
    except Exception as error:  # whatever a compiler raises is the finding
        return {**record, "error": f"{type(error).__name__}: {str(error).strip()[-300:]}"}
    record["seconds"] = round(time.perf_counter() - start, 2)
    return {**record, **describe(compiled.asm, compiled.metadata.shared, launch, target)}


def row_of(launch: Recorded) -> dict[str, Any]:
    """The row of the launch table that gave a launch its sizes, and those sizes; empty where none did."""
    return {} if launch.row is None else {"row": list(launch.row), "sizes": list(astuple(table()[launch.row]))}


def triton_version() -> str:
    """The version that compiles here."""
    import triton

    return triton.__version__


def _options(launch: Recorded) -> dict[str, Any]:
    """The options that we set ourselves: the others are Triton's version's and this machine's."""
    chosen = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return {**chosen, "enable_fp_fusion": launch.options["enable_fp_fusion"]}


def fingerprint(launch: Recorded) -> str:
    """Digest of all that decides a record, but for Triton's version.

    The kernel with everything it calls, as Triton's front end makes it from signature and constants, without locations
    and without the modules that functions lie in; options, the target's limits, and how listings are read.
    """
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    gpu, source = gpu_target(launch.target), launch.source()
    backend = make_backend(gpu)
    options = backend.parse_options({**_options(launch), **source.parse_options()})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    front = (backend.get_codegen_implementation(options), backend.get_module_map(), context)
    rest = (_options(launch), has_hot_loop(launch), turns(launch), EVERY[launch.target], listing.READING)
    text = re.sub(rf"\b{PACKAGE}(?:\.[a-z]\w*)*\.(?=_)", "", source.make_ir(gpu, options, *front).str_nodebug())
    return hashlib.sha256((text + repr(rest)).encode()).hexdigest()[:16]


def _fingerprint_of(launch: Recorded) -> str:
    try:
        return fingerprint(launch)
    except Exception:  # whatever a compiler raises becomes a finding where it is compiled
        return ""


def workers(jobs: int) -> ProcessPoolExecutor:
    """Processes in which Triton's interpreter is off."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))


def run(todo: list[Recorded], jobs: int) -> Iterator[dict[str, Any]]:
    """Records as they come, from `jobs` processes."""
    with workers(jobs) as pool:
        futures = [pool.submit(compile_one, launch) for launch in todo]
        for future in as_completed(futures):
            yield future.result()


def _key_of(launch: Recorded) -> Key:
    return launch.name, launch.target


def changed(todo: list[Recorded], records: dict[Key, dict[str, Any]], jobs: int) -> list[Recorded]:
    """What has no record of this Triton version and of what it is now."""
    with workers(jobs) as pool:
        prints = list(pool.map(_fingerprint_of, todo, chunksize=8))
    found = [records.get(_key_of(launch), {}) for launch in todo]
    now = [(triton_version(), text) for text in prints]
    known = [(record.get("triton"), record.get("fingerprint")) for record in found]
    return [launch for launch, a, b in zip(todo, known, now, strict=True) if a != b]


def faults(record: dict[str, Any]) -> list[str]:
    """What is wrong with one record, in words; empty if nothing is.

    Registers are the compiler's affair: spills count with the version of Triton that the committed table names.
    """
    if "error" in record:
        return [record["error"]]
    found = [] if spilled(record) is None or record["triton"] not in table_versions() else [spilled(record) or ""]
    if record["shared"] > record["shared_limit"]:
        found.append(f"{record['shared']} bytes of shared memory of {record['shared_limit']}")
    return found


def spilled(record: dict[str, Any]) -> str | None:
    """Spills beyond what is allowed in the hot loop and in all, in words; or None."""
    if "error" in record:
        return None
    hot = record.get("hot_spills", record["spills"])
    if record["spills"] <= SPILLS and hot <= (WIDE_SPILLS if "-fp32-" in record.get("launch", "") else 0):
        return None
    if not record.get("hot_loop", True) and record["spills"] <= COLD_SPILLS:
        return None
    return f"{record['spills']} spills, {hot} in the hot loop, {record['stack']} bytes of stack"


@lru_cache(maxsize=1)
def table_versions() -> frozenset[str]:
    """Versions of Triton that made the committed table."""
    return frozenset(json.loads(line)["triton"] for line in TABLE.read_text().splitlines())


def loop_faults(record: dict[str, Any]) -> list[str]:
    """What the hot loop of a full-tile kernel has that it must not, or lacks; empty where it claims no hot loop."""
    if not record["hot_loop"] or "error" in record:
        return []
    ir, mix = record["ir"], record["mix"]
    if ir is None or mix is None:
        return ["no loop with tensor-core instructions"]
    expected = EVERY[record["target"]].tensor
    wide = ir["dots"] == ir["wide_dots"]  # products of fp32 at full precision don't run on tensor cores
    found = [] if wide or expected in record["tensor"] else [f"hot loop on {record['tensor']!r}, not {expected}"]
    found += [f"{ir['masked']} masked loads"] if ir["masked"] else []
    found += [f"{ir['selects']} selects"] if ir["selects"] else []
    found += ["nothing behind a branch that is not for every turn"] if mix.get("rare") == [] else []
    plain = ir["loads"] + ir["scalars"]
    if mix["guards"] > plain:
        found.append(f"{mix['guards']} predicates on loads for {plain} plain loads")
    return found


COLUMNS = (
    "launch", "target", "w/s", "regs", "spill", "shared KB", "blocks", "bound", "tensor", "loads", "masked", "select",
    "exp2", "cvt", "instr", "pooled", "s",
)  # fmt: skip


def row(record: dict[str, Any]) -> list[str]:
    """One record under COLUMNS: tensor to instr count machine instructions of one warp in one turn of the hot loop.

    "pooled" counts those in one turn of the loop over pooled tiles.
    """
    head = [record["launch"], record["target"], f"{record['warps']}/{record['stages']}"]
    if "error" in record:
        return [*head, record["error"][:60]]
    mix, ir = record["mix"] or {}, record["ir"] or {}
    return [
        *head,
        str(record["registers"]),
        str(record["spills"]),
        f"{record['shared'] / 1024:.0f}/{record['shared_limit'] // 1024}",
        str(record["blocks"]),
        record["bound"],
        f"{mix.get('tensor', 0)} {record['tensor']}",
        str(mix.get("loads", 0)),
        str(ir.get("masked", 0)),
        f"{ir.get('selects', 0)}/{mix.get('selects', 0)}",
        *(str(mix.get(name, 0)) for name in ("exp2", "converts")),
        str(mix.get("every", mix.get("instructions", 0))),
        str(record["pooled"]["instructions"]) if "pooled" in record else "",
        f"{record['seconds']:.1f}",
    ]


def read(path: Path | None, order: dict[Key, int]) -> dict[Key, dict[str, Any]]:
    """Records of a file, if there is one, whose launch and target still exist."""
    if path is None or not path.exists():
        return {}
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {(r["launch"], r["target"]): r for r in records if (r["launch"], r["target"]) in order}


def spread(todo: list[Any], count: int) -> list[Any]:
    """So many of the tasks, evenly over their order, always the same; all of them if there are no more."""
    return todo if count >= len(todo) else [todo[i * len(todo) // count] for i in range(count)]


def write(path: Path, records: list[dict[str, Any]], order: dict[Key, int]) -> None:
    """Replace a file by these records, in the order of the launches, all or nothing."""
    lines = [json.dumps(r) + "\n" for r in sorted(records, key=lambda r: order[r["launch"], r["target"]])]
    new = path.with_suffix(".new")
    new.write_text("".join(lines))
    os.replace(new, path)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    text = "comma list of modules with record_cases(target, into), which record calls (default %(default)s)"
    parser.add_argument("--module", default=MODULES, help=text)
    parser.add_argument("--match", default="", help="only launches whose name matches this regular expression")
    parser.add_argument("--target", default=",".join(TARGETS), help="comma list (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default %(default)s)")
    parser.add_argument("--out", type=Path, help="write one JSON line a launch and target to this file")
    parser.add_argument("--merge", action="store_true", help="keep the other lines of --out whose launches still exist")
    parser.add_argument("--changed", action="store_true", help="like --merge, and compile only what differs from --out")
    parser.add_argument("--sample", type=int, help="compile only so many of them, spread evenly")
    return parser.parse_args()


def main() -> None:
    """Compile, print the table, write the records."""
    from rich.console import Console
    from rich.table import Table

    args = arguments()
    os.environ.pop("TRITON_INTERPRET", None)
    targets = args.target.split(",")
    unknown = [t for t in targets if t not in EVERY]
    if unknown:
        raise SystemExit(f"--target takes {', '.join(EVERY)}: found {', '.join(unknown)}")
    kept = TARGETS if args.merge or args.changed else ()
    everything = tasks("", list(dict.fromkeys([*kept, *targets])), args.module)
    order = {_key_of(launch): i for i, launch in enumerate(everything)}
    todo = asked = [x for x in everything if x.target in targets and re.search(args.match, x.name)]
    if not todo:
        raise SystemExit(f"no launch matches --match {args.match!r}: try --match ''")
    records = read(args.out, order) if args.merge or args.changed else {}
    if args.changed:
        todo = changed(todo, records, args.jobs)
        print(f"{len(asked) - len(todo)} of {len(asked)} are as {args.out} records them, {len(todo)} to be compiled")
    for launch in everything:  # rows change without what they compile to
        if _key_of(launch) in records:
            records[_key_of(launch)] |= row_of(launch)
    if args.sample is not None:
        todo = asked = spread(todo, args.sample)
    records = {key: record for key, record in records.items() if key not in set(map(_key_of, todo))}
    compiled = []
    for record in run(todo, args.jobs):
        compiled.append(record)
        records[record["launch"], record["target"]] = record
        if args.out:  # what is compiled is not lost if the run is cut short
            write(args.out, list(records.values()), order)
        print(f"\r{len(compiled)} of {len(todo)}", end="", file=sys.stderr, flush=True)
    if args.out and not todo:
        write(args.out, list(records.values()), order)
    print(file=sys.stderr)
    compiled.sort(key=lambda r: order[r["launch"], r["target"]])
    title = "masked: IR; select: IR/machine; tensor ... instr: instructions of one warp in one turn of the hot loop"
    table = Table(*COLUMNS, title=title)
    for record in compiled:
        table.add_row(*row(record))
    Console(width=200).print(table)
    scope = [records[_key_of(launch)] for launch in asked]
    bad = [f"{r['launch']} on {r['target']}: {'; '.join(faults(r) + loop_faults(r))}" for r in scope]
    bad = [line for line in bad if not line.endswith(": ")]
    print("\n".join(bad))
    known = ", ".join(table_versions())
    for r in scope:
        if spilled(r) and r["triton"] not in table_versions():
            print(f"warning, the table is of Triton {known}: {r['launch']} on {r['target']}: {spilled(r)}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
