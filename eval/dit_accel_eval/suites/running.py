"""Runs a suite, as `dit-accel eval run` does: every arm on every clip, each a JSON line, written as it is made."""

import contextlib
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from dit_accel_pipelines.generation.request import Dtype
from dit_accel_pipelines.generation.solvers import BEST
from dit_accel_pipelines.generation.threads import threads
from dit_accel_pipelines.processes.ranks import Ranks
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dit_accel import ConfigError
from dit_accel.cli.console import TALK, warn
from dit_accel.cli.stopping import STOP

from ..metrics.registered import metric, unavailable
from ..runs.loaded import EmbeddedModel, GivenModel, Machine, OwnClips
from ..runs.model import ModelRun, SuiteModel
from ..runs.pool import run_beside
from ..runs.results import AGREE, KEPT, ResultLine, append_line, last_lines, result_lines, write_lines
from ..runs.servers import Server
from .arms import Arm
from .job import Job, checked
from .measuring import ALWAYS, Sampled, line_of
from .reference import dense_run, reference_run

EXTRA = ("seconds", "dense_seconds", "threads", "processor", "steps_in_time", "repeated", "card", *KEPT)
"""Keys of a line that stay if its run is made again for something else that it lacked."""

Watch = Callable[[Sequence[ResultLine]], None]  # called with the lines so far, now and then; for progress


def run_job(job: Job, clips: Sequence[int], workers: int, *, quiet: bool) -> None:
    """Run what a job's file does not hold yet, with a bar of its progress."""
    ranks = Ranks()
    quiet |= not ranks.first
    for name, reason in unavailable(job.suite.metrics).items() if ranks.first else ():
        warn(f"{name} is left out: {reason}")
    STOP.files = f"what has run stands in {job.out}, and the same command goes on there"
    job = dataclasses.replace(job, talk=not quiet and not TALK.is_terminal)
    with suite_progress(job, clips, quiet=quiet) as watch:
        run_arms(job, clips, workers=workers, watch=watch)


def run_arms(job: Job, clips: Sequence[int], *, workers: int = 1, watch: Watch = lambda lines: None) -> None:
    """Make what the job's file does not hold yet, and append one JSON line per clip and arm.

    Processes of `accelerate launch` share the clips and append to one file, on a disk where that is atomic; the first
    checks it before and sorts it after.
    """
    if job.timed and workers > 1:
        raise ConfigError(f"timed runs need the machine to themselves, got --workers {workers}")
    ranks = Ranks()
    if ranks.count > 1 and (workers > 1 or job.timed):
        requested = "--time" if job.timed else f"--workers {workers}"
        raise ConfigError(f"accelerate launch started {ranks.count} processes, got {requested} besides; leave one out")
    with checked(job, clips) if ranks.first else contextlib.nullcontext():
        ranks.wait()
        ours, look = ranks.own(clips), lambda: watch(result_lines(job.out))
        look()
        if (processes := min(workers, len(ours))) > 1:
            run_beside(functools.partial(Runner, job), Runner.run_clip, ours, processes, look=look)
        else:
            runner = Runner(job)
            for clip in ours:
                runner.run_clip(clip, look)
        ranks.wait()
        if ranks.first:
            places = {arm.name: place for place, arm in enumerate(job.suite.arms)}
            lines = last_lines(result_lines(job.out)).values()  # dense runs that were added stand last
            key = lambda line: (line.clip, places.get(line.arm, len(places)), line.num_inference_steps)  # noqa: E731
            write_lines(job.out, (line.raw for line in sorted(lines, key=key)))


class Runner:
    """Runs clips of a job in one process: the model, loaded when it is first needed."""

    def __init__(self, job: Job) -> None:
        self.job, self._warm = job, set[str]()

    @functools.cached_property
    def model(self) -> SuiteModel:
        """The model, whose own runs are not counted."""
        suite, machine = self.job.suite, self.job.machine
        origin = None if suite.embedded else (suite.source, machine.dtype(suite.dtype), machine)
        return _loaded(suite.model, json.dumps(suite.call, sort_keys=True), suite.own, origin)

    def run_clip(self, clip: int, look: Callable[[], None] = lambda: None) -> None:
        """Run what one clip lacks: arms, then the dense runs that cost as much; ``look`` follows each."""
        job = self.job
        known = {name: line for (name, at), line in last_lines(result_lines(job.out)).items() if at == clip}
        if not any(_missing_arms(job, known)):
            return
        with threads(job.threads):
            if job.timed:
                self.model.run(clip, steps=1, solver=BEST)  # warms up
            options = {"steps": job.suite.reference_steps, "solver": job.suite.reference_solver}
            reference = None if job.judge else reference_run(self.model, clip, job.cache, **options)
            if reference and reference.agreement < AGREE and job.talk:
                print(f"clip {clip}: {reference.steps} steps agree with half as many to "
                      f"{reference.agreement:.1f} dB only; the search for the converged run ends there",
                      file=sys.stderr)  # fmt: skip
            while arm := next(_missing_arms(job, known), None):
                runs, beside = self.sample(arm, clip)
                raw = line_of(Sampled(job=job, arm=arm, clip=clip, model=self.model, reference=reference,
                                      runs=runs, beside=beside))  # fmt: skip
                earlier = known[arm.name].raw if arm.name in known else {}
                raw = {key: value for key, value in earlier.items() if key in EXTRA} | raw
                known[arm.name] = ResultLine.of(raw)
                append_line(job.out, raw)
                look()
                if job.talk:
                    figures = "{psnr:.1f} dB at {work:.1f} steps' work" if reference else "score {score:.0%}"
                    print(f"clip {clip} {arm.name}: {figures.format(**{'work': math.nan, **raw})}", file=sys.stderr)

    def sample(self, arm: Arm, clip: int) -> tuple[list[ModelRun], list[ModelRun]]:
        """Return the repeated runs of an arm, and where timed the dense one of as many steps after each."""
        suite = self.job.suite
        plain = arm.is_dense or (not suite.ladder and arm == suite.rival(arm.num_inference_steps))
        dense = plain and not self.job.judge
        if dense and suite.repeats == 1:
            return [dense_run(self.model, clip, arm.num_inference_steps, self.job.cache, solver=arm.solver)], []
        if arm.name not in self._warm:
            for _ in range(suite.warmup):
                self._made(arm, clip)
            self._warm.add(arm.name)
        runs, beside = list[ModelRun](), list[ModelRun]()
        for _ in range(suite.repeats):
            runs.append(self._made(arm, clip))
            if self.job.timed and not dense and arm != suite.rival(arm.num_inference_steps):
                beside.append(self.model.run(clip, steps=arm.num_inference_steps, solver=BEST))
        return runs, beside

    def _made(self, arm: Arm, clip: int) -> ModelRun:
        """Return one run of an arm, here or by its server."""
        if not arm.is_served:
            return self.model.run(clip, **arm.run_options())
        prompt, seed, call = self.model.prompt(clip), self.model.seed(clip), {**self.model.call, **arm.call}
        return Server.of(arm.rival).run(prompt=prompt, seed=seed, steps=arm.num_inference_steps, call=call)


def _missing_arms(job: Job, known: Mapping[str, ResultLine]) -> Iterator[Arm]:
    """Give the arms that a clip lacks; the dense ones to compare others with last, since these tell which."""
    arms = [] if job.judge else [line for line in known.values() if not line.is_rival]
    rivals = set[int]().union(*(line.rival_steps for line in arms))
    for arm in (*job.suite.arms, *map(job.suite.rival, sorted(rivals))):
        if _lacks(job, arm, known.get(arm.name)):
            yield arm


def _lacks(job: Job, arm: Arm, line: ResultLine | None) -> bool:
    """Whether an arm's line lacks something that the job wants: a metric, times, repeats or frames."""
    if line is None:
        return True
    measured = {*ALWAYS, *line.metrics, *line.skipped}
    return (
        any(name not in measured and metric(name).missing() is None for name in job.suite.metrics)
        or (job.timed and not (arm.is_dense or line.is_rival) and line.seconds is None)
        or (job.suite.repeats > 1 and len(line.repeated.get("seconds", ())) < job.suite.repeats)
        or (job.frames is not None and not all((job.out.parent / line.raw.get(key, "")).is_file() for key in KEPT))
    )


@functools.lru_cache(maxsize=1)
def _loaded(name: str, call: str, clips: OwnClips | None, origin: tuple[str, Dtype, Machine] | None) -> SuiteModel:
    """Return a job's model, loaded once a process: an embedded one, or ``given`` by source, number format, machine."""
    if origin is None:
        arguments = json.loads(call)
        return EmbeddedModel(name, arguments) if clips is None else EmbeddedModel(name, arguments, own=clips)
    assert clips is not None  # `checked` refuses it
    source, dtype, machine = origin
    return GivenModel(name, source, json.loads(call), clips, dtype, machine)


@contextlib.contextmanager
def suite_progress(job: Job, clips: Sequence[int], *, quiet: bool = False) -> Iterator[Watch]:
    """Show a bar over the runs of a suite's arms on its clips; gives the `Watch` that moves it."""
    suite, total, said = job.suite, len(clips) * len(job.suite.arms), False
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), console=TALK, disable=quiet or not TALK.is_terminal,
    )  # fmt: skip
    task = bar.add_task(suite.name, total=total)

    def show(lines: Sequence[ResultLine]) -> None:
        nonlocal said
        known = last_lines(lines)
        done = sum((arm.name, clip) in known for arm in suite.arms for clip in clips)
        if not (quiet or said):
            parts = ((len(clips), "clip"), (len(suite.arms), "arm"))
            counts = " x ".join(f"{count} {what}{'s' * (count != 1)}" for count, what in parts)
            more = "" if job.judge else "; the dense runs that they are compared with are added"
            TALK.print(f"{suite.name}: {counts}, {done} of {total} runs are done{more}", markup=False, soft_wrap=True)
        said = True
        bar.update(task, completed=done, description=f"{suite.name}: {len(known)} runs")

    with bar:
        yield show
