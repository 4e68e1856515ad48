"""How many small defects in the core's rules and the kernels' Python the tests notice: ``make mutants``.

A sample of defects (`mutations.py`) is drawn with a seed. Each is written into a copy of the checkout, and the tests
that run its lines are run there, the shortest first, until one fails. A defect that no test notices is a survivor:
either a test is missing, or the changed line does the same as before. Those of the second kind stand in
``equivalent.toml``, each with its reason, and do not count. The score and its survivors are written to ``score.json``.

    make mutants                                     # 200 defects; about an hour on two cores
    make mutants ARGS="--sample 50 --seed 3"         # others
    make mutants ARGS="--only plan/plan.py"          # all defects of one file
    make mutants ARGS="--also tests/core/test_x.py"  # survivors once more, now that this file has other tests

Which tests run a line is measured once, by coverage, and kept in ``.mutants/`` until ``--anew``, as is how each defect
ended: a run that was stopped goes on where it was, survivors are tried again. What `make test` runs counts alone.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from mutations import Mutation, mutated, mutations_of

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
WORK = ROOT / ".mutants"
TARGETS = [f"dit_accel/{room}" for room in ("rules", "plan", "attachment", "methods/caches")]
TARGETS.append("kernels/dit_accel_kernels")
KEPT = WORK / "outcomes.jsonl"
PACKAGES = (".", "kernels", "pipelines", "eval", "assets")
TESTS = ("tests/core", "tests/kernels", "tests/pipelines")
FIRST_SECONDS, LONGEST = 20.0, 900.0


def drawn(count: int, seed: int, only: str | None) -> list[Mutation]:
    """Return a sample of the defects of all targets, each as likely as any other; all of a file's with ``only``."""
    files = sorted(path for target in TARGETS for path in (ROOT / target).rglob("*.py"))
    if only:
        files = [path for path in files if only in str(path)]
    found = [one for path in files for one in mutations_of(str(path.relative_to(ROOT)), path.read_text())]
    # by a hash of each, so that a change elsewhere in the code leaves the sample as it is
    return found if only else sorted(found, key=lambda one: sha256(f"{seed} {one.key}".encode()).digest())[:count]


def copied(number: int) -> Path:
    """Return a fresh copy of the tracked files."""
    place = WORK / f"copy{number}"
    shutil.rmtree(place, ignore_errors=True)
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, place / name)
    return place


def environment(place: Path) -> dict[str, str]:
    """Return the variables under which a copy's packages come before the installed ones."""
    paths = os.pathsep.join([*(str(place / name) for name in PACKAGES), str(HERE)])
    ones = dict.fromkeys(("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TRITON_INTERPRET", "PYTHONDONTWRITEBYTECODE"), "1")
    return {**os.environ, **ones, "PYTHONPATH": paths}


def measured(anew: bool, also: Sequence[str] = ()) -> dict[str, Any]:
    """Return which tests run which line, and how long each takes; measured once, and again in the files of ``also``."""
    kept = WORK / "lines.json"
    known: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() and not anew else {"lines": {}, "times": {}}
    if known["lines"] and not also:
        return known
    place = copied(0)
    options = [
        "-n", "auto", "--dist", "worksteal", "--cov-context=test", "--cov-report=", "-p", "mutant_worker",
        "-p", "no:cacheprovider",
    ]  # fmt: skip
    options += [f"--cov={place / target}" for target in TARGETS]
    command = [sys.executable, "-m", "pytest", "-m", "not slow", *(also if known["lines"] else TESTS), *options]
    extra = {"MUTANT_TIMES": str(WORK / "times.json"), "COVERAGE_FILE": str(WORK / "coverage")}
    subprocess.run(command, cwd=place, env={**environment(place), **extra}, check=False)
    from coverage import CoverageData

    data = CoverageData(str(WORK / "coverage"))
    data.read()
    for file in data.measured_files():
        by_line = known["lines"].setdefault(str(Path(file).relative_to(place)), {})
        for line, contexts in data.contexts_by_lineno(file).items():
            tests = {context.split("|")[0] for context in contexts if context}
            by_line[str(line)] = sorted({*by_line.get(str(line), ()), *tests})
    known["times"] |= json.loads((WORK / "times.json").read_text())
    kept.write_text(json.dumps(known))
    return known


def covering(mutation: Mutation, known: dict[str, Any]) -> list[str]:
    """Return the passing tests that run a defect's lines, or of a line that runs on import the file's, shortest first.

    A statement over several lines counts by any of them.
    """
    lines, times = known["lines"].get(mutation.file, {}), known["times"]
    own = {test for line in range(mutation.span[0], mutation.span[2] + 1) for test in lines.get(str(line), ())}
    tests = own or {test for some in lines.values() for test in some}
    return sorted((test for test in tests if test in times), key=lambda test: times[test])


def stages(tests: Sequence[str], times: dict[str, float]) -> Iterable[list[str]]:
    """Yield the tests in two parts: short ones from few files, since each file costs its import; then all the rest."""
    by_file: dict[str, list[str]] = defaultdict(list)
    for test in tests:
        by_file[test.split("::")[0]].append(test)
    # the files with the most tests of the line are the likeliest to notice
    first, seconds = [], 0.0
    for file in sorted(by_file, key=lambda name: -len(by_file[name]))[:6]:
        for test in by_file[file]:
            if seconds + times[test] > FIRST_SECONDS:
                break
            first.append(test)
            seconds += times[test]
    yield first
    taken = set(first)
    yield [test for test in tests if test not in taken]


class Bench:
    """One copy of the checkout and a process that forks a run of tests there, with all heavy imports done before."""

    def __init__(self, number: int) -> None:
        self.place = copied(number)
        command, pipe = [sys.executable, str(HERE / "mutant_worker.py")], subprocess.PIPE
        paths = environment(self.place)
        self.process = subprocess.Popen(command, cwd=self.place, env=paths, stdin=pipe, stdout=pipe, text=True)

    def run(self, tests: Sequence[str], limit: float) -> dict[str, Any]:
        """Run tests until one fails; return how that ended: ``passed``, ``failed`` with its name, or ``hung``."""
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps({"tests": list(tests), "limit": limit}), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def judge(self, mutation: Mutation, known: dict[str, Any], without: frozenset[str] = frozenset()) -> dict[str, Any]:
        """Return how a defect ended."""
        path = self.place / mutation.file
        text = path.read_text()
        tests = [test for test in covering(mutation, known) if test not in without]
        begun, outcome = time.monotonic(), {"end": "passed"}
        path.write_text(mutated(text, mutation))
        try:
            for part in stages(tests, known["times"]):
                limit = 60 + 6 * sum(known["times"][test] for test in part)
                if part and (outcome := self.run(part, min(limit, LONGEST)))["end"] != "passed":
                    break
        finally:
            path.write_text(text)
        return {**outcome, "tests": len(tests), "seconds": round(time.monotonic() - begun, 1)}

    def close(self) -> None:
        """End the process."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()


def kept() -> dict[str, dict[str, Any]]:
    """Return how defects ended in runs before, survivors left out: a test may notice them now."""
    lines = [json.loads(line) for line in KEPT.read_text().splitlines()] if KEPT.exists() else []
    ended = {line.pop("defect"): line for line in lines}
    return {key: outcome for key, outcome in ended.items() if outcome["end"] != "passed"}


def judged(mutations: Sequence[Mutation], known: dict[str, Any], workers: int) -> dict[str, dict[str, Any]]:
    """Return how each defect ended; what a test noticed counts only if that test passes without any defect."""
    free: SimpleQueue[Bench] = SimpleQueue()
    benches = [Bench(number + 1) for number in range(workers)]
    for bench in benches:
        free.put(bench)

    def one(mutation: Mutation, without: frozenset[str] = frozenset()) -> tuple[str, dict[str, Any]]:
        bench = free.get()
        try:
            outcome = bench.judge(mutation, known, without)
        finally:
            free.put(bench)
        print(f"{outcome['end']:7} {outcome['seconds']:6.1f} s  {mutation.line:4} {mutation.key[:150]}", flush=True)
        with KEPT.open("a") as file:
            file.write(json.dumps({"defect": mutation.key, **outcome}) + "\n")
        return mutation.key, outcome

    try:
        with ThreadPoolExecutor(workers) as pool:
            before = kept()
            outcomes = {mutation.key: before[mutation.key] for mutation in mutations if mutation.key in before}
            outcomes |= dict(pool.map(one, [mutation for mutation in mutations if mutation.key not in before]))
        failing: set[str] = set()
        while True:  # tests that fail here without a defect notice nothing
            killers = {outcome["test"] for outcome in outcomes.values() if outcome["end"] == "failed"} - failing
            new = set()
            remaining = sorted(test for test in killers if test in known["times"])
            while remaining:
                ended = benches[0].run(remaining, LONGEST)
                if ended["end"] == "passed":
                    break
                new.add(ended["test"])
                remaining = [test for test in remaining if test != ended["test"]]
            if not new:
                return outcomes
            failing |= new
            again = [mutation for mutation in mutations if outcomes[mutation.key].get("test") in new]
            outcomes |= dict(one(mutation, frozenset(failing)) for mutation in again)
    finally:
        for bench in benches:
            bench.close()


def score(mutations: Sequence[Mutation], outcomes: dict[str, dict[str, Any]], equivalent: dict[str, str]) -> dict:
    """Return the figures to keep: how many defects were noticed, and the others by name."""
    ends = Counter("equivalent" if one.key in equivalent else outcomes[one.key]["end"] for one in mutations)
    counted, noticed = len(mutations) - ends["equivalent"], ends["failed"] + ends["hung"]
    lived = [one for one in mutations if one.key not in equivalent and outcomes[one.key]["end"] == "passed"]
    return {
        "drawn": len(mutations), "equivalent": ends["equivalent"],
        "noticed": noticed, "noticed_by_hanging": ends["hung"], "share": round(noticed / max(1, counted), 3),
        "survivors": [{"line": one.line, "defect": one.key, "tests": outcomes[one.key]["tests"]} for one in lived],
    }  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Draw, judge, write down and print; 1 if fewer than 95 % are noticed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", help="all defects of the files whose path holds this; nothing is written down")
    parser.add_argument("--anew", action="store_true", help="measure again which tests run which line")
    parser.add_argument("--also", nargs="+", default=(), help="measure again which lines these files' tests run")
    parser.add_argument("--out", type=Path, default=HERE / "score.json")
    options = parser.parse_args(arguments)
    WORK.mkdir(exist_ok=True)
    if options.anew:
        KEPT.unlink(missing_ok=True)
    known = measured(options.anew, options.also)
    entries = tomllib.loads((HERE / "equivalent.toml").read_text()).get("equivalent", [])
    equivalent = {entry["defect"]: entry["reason"] for entry in entries}
    mutations = drawn(options.sample, options.seed, options.only)
    outcomes = judged([one for one in mutations if one.key not in equivalent], known, options.workers)
    result = {"seed": options.seed, **score(mutations, outcomes, equivalent)}
    print(json.dumps(result, indent=1))
    if not options.only:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["share"] >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
