"""Compile the Triton kernels for six GPU targets without a GPU: registers, spills and shared memory of each launch.

`python kernels/bench/aot.py --out aot.jsonl` compiles what real calls launch (recorded.py): calls of the methods
(cases.py), and those that launch every row of the launch table on every target that takes it (promised.py). It prints
one line each and writes JSON lines. A record names its row of the launch table with its sizes, and holds the Triton
version and the fingerprint of what was compiled: the kernel as Triton's front end makes it for that target, without
locations, so that comments and lines don't count. With --changed only what differs from its record in --out, or has
none, is compiled. Exits with 1 if a kernel fails to compile, spills in its hot loop (a warning under another Triton
than that of the committed table), asks for more shared memory than its target has, or leaves the tensor cores unused.
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

from calls import PRECISIONS
from compiled import describe
from dit_accel_kernels.backends.triton.launch import launch_table
from predictions import pick
from recorded import Recorded, gpu_target
from targets import EVERY, TARGETS

Key = tuple[str, str]  # launch, target
Record = dict[str, Any]
SPILLS = 96  # words that a kernel may spill outside of its hot loop: once a tile or less
WIDE_SPILLS = 4  # words that it may in the hot loop, with products of fp32
COLD_SPILLS = 8  # words that a kernel without products may spill: it waits for memory
TABLE = Path(__file__).parent / "results" / "aot.jsonl"
MODULES = "cases,promised"  # calls of the methods, and calls that launch every row of the launch table
READING = 4  # to be raised when machine code is read in another way: records made before count no more


def tasks(targets: list[str], modules: str = MODULES) -> list[Recorded]:
    """The launches to compile, each once a target: what each module's `record_cases(target, into)` records."""
    launches: list[Recorded] = []
    for target in targets:
        into: dict[str, Recorded] = {}
        for module in modules.split(","):
            importlib.import_module(module).record_cases(target, into)
        launches += into.values()
    return launches


def compile_one(launch: Recorded) -> Record:
    """One launch, as a JSON-ready record; a compiler's failure becomes its `error`."""
    record: Record = {
        "launch": launch.name, "target": launch.target, "warps": launch.num_warps, "stages": launch.num_stages,
        **row_of(launch),
    }  # fmt: skip
    start = time.perf_counter()
    try:
        record |= {"triton": triton_version(), "fingerprint": fingerprint(launch)}
        compiled = launch.compiled()
    except Exception as error:  # whatever a compiler raises is the finding
        return {**record, "error": f"{type(error).__name__}: {str(error).strip()[-300:]}"}
    record["seconds"] = round(time.perf_counter() - start, 2)
    return {**record, **describe(compiled.asm, compiled.metadata.shared, EVERY[launch.target])}


def row_of(launch: Recorded) -> Record:
    """The row of the launch table that gave a launch its sizes, and those sizes; empty where none did."""
    return {} if launch.row is None else {"row": list(launch.row), "sizes": list(astuple(launch_table()[launch.row]))}


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

    The kernel as Triton's first passes make it of signature and constants for that target: without locations, functions
    inlined, dead code gone, and here constants in place of their names; options, the target's limits, and how machine
    code is read.
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
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    text = stages["ttir"](source.make_ir(gpu, options, *front), {}).str_nodebug()
    constant = r"^ *(%\w+) = (arith\.constant .*)\n"
    values = dict(re.findall(constant, text, re.M))
    text = re.sub(r"%\w+", lambda name: values.get(name[0], name[0]), re.sub(constant, "", text, flags=re.M))
    rest = (_options(launch), EVERY[launch.target], READING)
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


def run(todo: list[Recorded], jobs: int) -> Iterator[Record]:
    """Records as they come, from `jobs` processes."""
    with workers(jobs) as pool:
        futures = [pool.submit(compile_one, launch) for launch in todo]
        for future in as_completed(futures):
            yield future.result()


def _key_of(launch: Recorded) -> Key:
    return launch.name, launch.target


def changed(todo: list[Recorded], records: dict[Key, Record], jobs: int) -> list[Recorded]:
    """What has no record of this Triton version and of what it is now."""
    with workers(jobs) as pool:
        prints = list(pool.map(_fingerprint_of, todo, chunksize=8))
    known = [records.get(_key_of(launch), {}) for launch in todo]
    return [
        launch
        for launch, record, text in zip(todo, known, prints, strict=True)
        if (record.get("triton"), record.get("fingerprint")) != (triton_version(), text)
    ]


def faults(record: Record) -> list[str]:
    """What is wrong with one record, in words; empty if nothing is.

    Registers are the compiler's affair: spills count with the version of Triton that the committed table names.
    """
    if "error" in record:
        return [record["error"]]
    spills, expected = spilled(record), EVERY[record["target"]].tensor
    words = [spills] if spills and record["triton"] in table_versions() else []
    if record["shared"] > record["shared_limit"]:
        words.append(f"{record['shared']} bytes of shared memory of {record['shared_limit']}")
    if on_tensor_cores(record) and expected not in record["tensor"]:
        words.append(f"hot loop on {record['tensor']!r}, not {expected}")
    if in_eight_bits(record) and "eight_bits" not in record:
        words.append("no products of eight bits in its hot loop")
    return words


def spilled(record: Record) -> str | None:
    """Spills beyond what is allowed in the hot loop and in all, in words; or None."""
    if "error" in record:
        return None
    spills, hot = record["spills"], record.get("hot_spills")
    in_loop = 0 if hot is None else hot
    if spills <= (COLD_SPILLS if hot is None else SPILLS) and in_loop <= WIDE_SPILLS * ("-fp32-" in record["launch"]):
        return None
    return f"{spills} spills, {in_loop} in the hot loop, {record['stack']} bytes of stack"


def on_tensor_cores(record: Record) -> bool:
    """Whether a launch must multiply on tensor cores: products in 16 bits, of blocks that are large enough.

    Gradients of heads over 128, or with decay, take blocks too small for wgmma and tcgen05.
    """
    kernel, dtype, dim, _, kind = (record["launch"].split("-", 4) + [""] * 5)[:5]
    if dtype not in ("bf16", "fp16"):
        return False
    return kernel == "fwd" or (kernel in ("dq", "dkdv") and int(dim[1:]) <= 128 and "decay" not in kind.split("+"))


def in_eight_bits(record: Record) -> bool:
    """Whether a launch is to multiply queries and keys in eight bits."""
    kernel, *words = re.split("[-+]", record["launch"])
    return kernel == "fwd" and not set(PRECISIONS).isdisjoint(words)


@lru_cache(maxsize=1)
def table_versions() -> frozenset[str]:
    """Versions of Triton that made the committed table."""
    return frozenset(json.loads(line)["triton"] for line in TABLE.read_text().splitlines())


def line(record: Record) -> str:
    """One record in words."""
    names = ("warps", "stages", "registers", "spills", "shared", "tensor", "seconds")
    found = ", ".join(f"{name} {record[name]}" for name in names if name in record)
    return f"{record['launch']} on {record['target']}: {record.get('error', found)}"


def read(path: Path | None, order: dict[Key, int]) -> dict[Key, Record]:
    """Records of a file, if there is one, whose launch and target still exist."""
    if path is None or not path.exists():
        return {}
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {(r["launch"], r["target"]): r for r in records if (r["launch"], r["target"]) in order}


def spread(todo: list[Any], count: int) -> list[Any]:
    """So many of the tasks, evenly over their order, always the same; all of them if there are no more."""
    return todo if count >= len(todo) else [todo[i * len(todo) // count] for i in range(count)]


def write(path: Path, records: list[Record], order: dict[Key, int]) -> None:
    """Replace a file by these records, in the order of the launches, all or nothing."""
    lines = [json.dumps(r) + "\n" for r in sorted(records, key=lambda r: order[r["launch"], r["target"]])]
    new = path.with_suffix(".new")
    new.write_text("".join(lines))
    os.replace(new, path)


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "comma list of modules with record_cases(target, into), which record calls (default %(default)s)"
    parser.add_argument("--module", default=MODULES, help=text)
    parser.add_argument("--match", default="", help="only launches whose name matches this regular expression")
    parser.add_argument("--target", default=",".join(TARGETS), help="comma list (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default %(default)s)")
    parser.add_argument("--out", type=Path, help="write one JSON line a launch and target to this file")
    parser.add_argument(
        "--changed", action="store_true", help="compile only what differs from --out, and keep its other lines"
    )
    parser.add_argument("--sample", type=int, help="compile only so many of them, spread evenly")
    args = parser.parse_args()
    args.target = [target.name for target in pick(args.target, EVERY, "target")]
    return args


def main() -> None:
    """Compile, print the table, write the records."""
    args = arguments()
    os.environ.pop("TRITON_INTERPRET", None)
    everything = tasks(list(dict.fromkeys([*(TARGETS if args.changed else ()), *args.target])), args.module)
    order = {_key_of(launch): i for i, launch in enumerate(everything)}
    todo = chosen = [x for x in everything if x.target in args.target and re.search(args.match, x.name)]
    if not todo:
        raise SystemExit(f"no launch matches --match {args.match!r}: try --match ''")
    records = read(args.out, order) if args.changed else {}
    if args.changed:
        todo = changed(todo, records, args.jobs)
        print(f"{len(chosen) - len(todo)} of {len(chosen)} are as {args.out} records them, {len(todo)} to be compiled")
    for launch in everything:  # rows change without what they compile to
        if _key_of(launch) in records:
            records[_key_of(launch)] |= row_of(launch)
    if args.sample is not None:
        todo = chosen = spread(todo, args.sample)
    for record in run(todo, args.jobs):
        print(line(record), flush=True)
        records[record["launch"], record["target"]] = record
        if args.out:  # what is compiled is not lost if the run is cut short
            write(args.out, list(records.values()), order)
    if args.out and not todo:
        write(args.out, list(records.values()), order)
    sys.exit(report([records[_key_of(launch)] for launch in chosen]))


def report(records: list[Record]) -> bool:
    """Print what is wrong with the records; whether anything is."""
    bad = [f"{r['launch']} on {r['target']}: {'; '.join(faults(r))}" for r in records if faults(r)]
    print("\n".join(bad))
    for r in records:
        if spilled(r) and r["triton"] not in table_versions():
            known = ", ".join(table_versions())
            print(f"warning, the table is of Triton {known}: {r['launch']} on {r['target']}: {spilled(r)}")
    return bool(bad)


if __name__ == "__main__":
    main()
