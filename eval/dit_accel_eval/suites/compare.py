"""Runs a suite, as `dit-accel eval run` does: every arm on every clip, each a JSON line, written as it is made.

Arms are held against converged runs, or judged by themselves where the suite names a judge. A run that was stopped goes
on where it stopped. The protocol is in eval/README.md.
"""

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from dit_accel_pipelines.generation.request import Dtype
from dit_accel_pipelines.generation.solvers import BEST
from dit_accel_pipelines.generation.threads import threads
from dit_accel_pipelines.processes.ranks import Ranks

from dit_accel import ConfigError

from ..runs.budget import Budget, BudgetSpent
from ..runs.clips import OwnClips
from ..runs.embedded import EmbeddedModel
from ..runs.given import GivenModel
from ..runs.machine import Machine
from ..runs.model import SuiteModel
from ..runs.pool import run_beside
from ..runs.results import Line, append_line, latest, read_lines, write_lines
from .arms import Arm, dense_arm
from .comparison import rival_steps
from .job import Job, prepared
from .measuring import converged_line, judged_line, lacks_metrics
from .reference import AGREE, Reference, converged
from .runner import Runner
from .suite import Suite

EXTRA = ("seconds", "dense_seconds", "threads", "processor", "steps_in_time", "repeated", "kept", "kept_reference")
"""What a line keeps if its run is made anew for something else that it lacked."""


def run(
    job: Job, clips: Sequence[int], *, workers: int = 1, watch: Callable[[Sequence[Line]], None] | None = None
) -> str | None:
    """Make what the job's file does not hold yet, and append one JSON line per clip and arm.

    Of processes that `accelerate launch` started together each makes its part of the clips; all append to one file, on
    a disk where appending a line is atomic, and the first checks it before and sorts it after.

    Args:
        job: what runs.
        clips: their numbers.
        workers: processes.
        watch: is given the lines so far, now and then; for progress.

    Returns:
        Why this process stopped before all was made, where the suite's budget did not hold it; else None.

    Raises:
        ConfigError: if the file can't be written, or holds results of another model, call, reference or arm.
        Busy: if another run writes to it.
    """
    ranks = Ranks()
    if ranks.count > 1 and (workers > 1 or job.timed):
        asked = "--time" if job.timed else f"--workers {workers}"
        raise ConfigError(f"accelerate launch started {ranks.count} processes, got {asked} besides; leave one out")
    with prepared(job) if ranks.first else contextlib.nullcontext():
        return _run(job, clips, ranks, workers, watch)


def _run(
    job: Job, clips: Sequence[int], ranks: Ranks, workers: int, watch: Callable[[Sequence[Line]], None] | None
) -> str | None:
    """Make what the file lacks, once the first process has checked it."""
    ranks.wait()

    def look() -> None:
        if watch is not None:
            watch(read_lines(job.out))

    look()
    own = ranks.own(clips)
    workers = max(1, min(workers, len(own)))
    budget = job.suite.budget.share(workers * ranks.count) if job.suite.budget else None
    stopped = None
    if workers == 1:
        runner = _runner(job, budget)
        for clip in own:
            told = run_clip(job, clip, runner, look)
            stopped = stopped or told
    else:
        stopped = _run_beside(job, own, workers, budget, look)
    ranks.wait()
    if ranks.first:
        write_lines(job.out, _sorted(job.suite, latest(read_lines(job.out)).values()))
    return stopped


def _run_beside(
    job: Job, clips: Sequence[int], workers: int, budget: Budget | None, look: Callable[[], None]
) -> str | None:
    """Run clips in processes, and return why one of them stopped before all was made."""
    stopped: list[str | None] = []
    run_beside(_run_there, clips, workers, stopped.append, begin=_begin, given=(job, budget), look=look)
    return next(filter(None, stopped), None)


_there: list[tuple[Job, Runner]] = []
"""What a process of a pool runs; set when it begins."""


def _begin(job: Job, budget: Budget | None) -> None:
    _there.append((job, _runner(job, budget)))


def _run_there(clip: int) -> str | None:
    job, runner = _there[-1]
    return run_clip(job, clip, runner)


def _runner(job: Job, budget: Budget | None) -> Runner:
    suite = job.suite
    return Runner(lambda: _load(job), budget, warmup=suite.warmup, repeats=suite.repeats)


def run_clip(job: Job, clip: int, model: Runner, look: Callable[[], None] = lambda: None) -> str | None:
    """Run what one clip lacks: arms first, then the dense runs between which each is held; ``look`` follows each.

    Returns:
        Why it stopped, where the budget did not hold all; what had been made is written.
    """
    known = {name: line for (name, at), line in latest(read_lines(job.out)).items() if at == clip}
    if not any(_lacking(job, known)):
        return None
    with threads(job.threads):
        return _run_arms(job, clip, model, known, look)


def _run_arms(job: Job, clip: int, model: Runner, known: dict[str, Line], look: Callable[[], None]) -> str | None:
    try:
        if job.timed:
            model.run(clip, steps=1, solver=BEST)  # warms up
        reference = None if job.suite.judge else _reference(job, model, clip)
        while arm := next(_lacking(job, known), None):
            earlier = {key: value for key, value in known.get(arm.name, {}).items() if key in EXTRA}
            line = {**earlier, **_line(job, model, arm, clip, reference)}
            append_line(job.out, line)
            known[arm.name] = line
            look()
            if job.talk:
                print(f"clip {clip} {arm.name}: {_told(line)}", file=sys.stderr)
    except BudgetSpent as spent:
        return str(spent)
    return None


def _reference(job: Job, model: Runner, clip: int) -> Reference:
    """Return a clip's converged run, and say where the search for it ended before two runs agreed."""
    found = converged(model, clip, job.cache)
    if found.agreement < AGREE and job.talk:
        print(f"clip {clip}: {found.steps} steps agree with half as many to {found.agreement:.1f} dB only; "
              "the search for the converged run ends there", file=sys.stderr)  # fmt: skip
    return found


def _line(job: Job, model: Runner, arm: Arm, clip: int, reference: Reference | None) -> Line:
    return judged_line(model, arm, clip, job) if reference is None else converged_line(model, arm, clip, reference, job)


def _told(line: Line) -> str:
    if "psnr" in line:
        return f"{line['psnr']:.1f} dB at {line['work']:.1f} steps' work"
    return f"score {line['score']:.0%}"


def _lacking(job: Job, known: Mapping[str, Line]) -> Iterator[Arm]:
    """Give the arms that a clip lacks; the dense ones to hold others against last, since these tell which."""
    rivals = set[int]() if job.suite.judge else set[int]().union(*map(rival_steps, known.values()))
    for arm in (*job.suite.arms, *map(dense_arm, sorted(rivals))):
        line = known.get(arm.name)
        if (
            line is None
            or lacks_metrics(job.suite, line)
            or (job.timed and not arm.is_dense and "seconds" not in line)
            or (job.suite.repeats > 1 and len(line.get("repeated", {}).get("seconds", ())) < job.suite.repeats)
            or (job.frames is not None and not _has_frames(job, line))
        ):
            yield arm


def _has_frames(job: Job, line: Line) -> bool:
    return all(key in line and (job.out.parent / line[key]).is_file() for key in ("kept", "kept_reference"))


def _load(job: Job) -> SuiteModel:
    """Return a job's model, loaded once a process."""
    suite = job.suite
    call = json.dumps(suite.call, sort_keys=True)
    if suite.embedded:
        return _loaded(suite.model, call, suite.own)
    if suite.own is None:
        raise ConfigError(f"{suite.name} has no prompts for {suite.model}; add prompts = [...]")
    return _loaded_given(suite.model, suite.source, call, suite.own, job.machine.dtype(suite.dtype), job.machine)


@functools.lru_cache(maxsize=1)
def _loaded(name: str, call: str, own: OwnClips | None) -> SuiteModel:
    asked = json.loads(call)
    return EmbeddedModel(name, asked) if own is None else EmbeddedModel(name, asked, own=own)


@functools.lru_cache(maxsize=1)
def _loaded_given(name: str, source: str, call: str, own: OwnClips, dtype: Dtype, machine: Machine) -> SuiteModel:
    return GivenModel(name, source, json.loads(call), own, dtype, machine)


def _sorted(suite: Suite, lines: Iterable[Line]) -> list[Line]:
    """Return lines by clip, then in the order of the suite's arms, the added dense runs last."""
    places = {arm.name: place for place, arm in enumerate(suite.arms)}

    def place(line: Line) -> tuple[int, int, int]:
        return line["clip"], places.get(line["arm"], len(places)), line["num_inference_steps"]

    return sorted(lines, key=place)


if __name__ == "__main__":  # python -m dit_accel_eval.suites.compare SUITE.toml
    from dit_accel.cli import main

    sys.argv[1:1] = ["eval", "run"]
    main()
