"""Runs a suite, as `dit-accel eval run` does: every arm on every clip, each a JSON line, written as it is made.

Arms are held against converged runs, or judged by themselves where the suite names a judge. A run that was stopped goes
on where it stopped. What it costs in denoising steps is said before, foretold in minutes after its first run: how many
dense runs an arm is held against is known once it ran, and how far the search for a converged run goes once that was
found; before there are bounds, as two numbers, the fewest and the most. The protocol is in eval/README.md.
"""

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from dit_accel_pipelines.generation.request import Dtype
from dit_accel_pipelines.generation.solvers import BEST
from dit_accel_pipelines.generation.threads import threads
from dit_accel_pipelines.processes.ranks import Ranks
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dit_accel import ConfigError
from dit_accel.cli.console import TALK, warn
from dit_accel.cli.stopping import keeps

from ..metrics.registered import metric, unavailable
from ..runs.conditions import Machine, OwnClips
from ..runs.loaded import EmbeddedModel, GivenModel
from ..runs.model import Run, SuiteModel
from ..runs.pool import run_beside
from ..runs.results import Line, append_line, latest, read_lines, write_lines
from .arms import Arm, is_rival
from .comparison import TIMED, WORKS, rival_steps
from .job import Job, checked
from .measuring import ALWAYS, Sampled, line_of
from .reference import AGREE, FIRST, MOST, dense_run, reference_run

KEPT = ("kept", "kept_reference")
EXTRA = ("seconds", "dense_seconds", "threads", "processor", "steps_in_time", "repeated", *KEPT)
"""What a line keeps if its run is made anew for something else that it lacked."""

Bounds = np.ndarray[Any, Any]


def run_job(job: Job, clips: Sequence[int], workers: int, *, quiet: bool) -> None:
    """Run what a job's file does not hold yet, with its cost and progress."""
    ranks = Ranks()
    quiet |= not ranks.first
    for name, reason in unavailable(job.suite.metrics).items() if ranks.first else ():
        warn(f"{name} is left out: {reason}")
    keeps(f"what has run stands in {job.out}, and the same command goes on there")
    job = dataclasses.replace(job, talk=not quiet and not TALK.is_terminal)
    with SuiteProgress(job, clips, quiet=quiet, workers=workers * ranks.count) as watch:
        run(job, clips, workers=workers, watch=watch)


def run(
    job: Job, clips: Sequence[int], *, workers: int = 1, watch: Callable[[Sequence[Line]], None] = lambda lines: None
) -> None:
    """Make what the job's file does not hold yet, and append one JSON line per clip and arm.

    Of processes that `accelerate launch` started together each makes its part of the clips; all append to one file, on
    a disk where appending a line is atomic, and the first checks it before and sorts it after.

    Args:
        watch: is given the lines so far, now and then; for progress.

    Raises:
        ConfigError: if the file can't be written, or holds results of another model, call, reference or arm.
        Busy: if another run writes to it.
    """
    if job.timed and workers > 1:
        raise ConfigError(f"timed runs need the machine to themselves, got --workers {workers}")
    ranks = Ranks()
    if ranks.count > 1 and (workers > 1 or job.timed):
        requested = "--time" if job.timed else f"--workers {workers}"
        raise ConfigError(f"accelerate launch started {ranks.count} processes, got {requested} besides; leave one out")
    with checked(job, clips) if ranks.first else contextlib.nullcontext():
        ranks.wait()
        _run(job, ranks.own(clips), workers, lambda: watch(read_lines(job.out)))
        ranks.wait()
        if ranks.first:
            places = {arm.name: place for place, arm in enumerate(job.suite.arms)}
            lines = latest(read_lines(job.out)).values()  # dense runs that were added stand last
            key = lambda line: (line["clip"], places.get(line["arm"], len(places)), line["num_inference_steps"])  # noqa: E731
            write_lines(job.out, sorted(lines, key=key))


def _run(job: Job, clips: Sequence[int], workers: int, look: Callable[[], None]) -> None:
    """Run clips here or in worker processes."""
    look()
    workers = max(1, min(workers, len(clips)))
    if workers > 1:
        return run_beside(_run_there, clips, workers, lambda _: None, begin=_begin, given=(job,), look=look)
    runner = Runner(job)
    for clip in clips:
        runner.run_clip(clip, look)


_there: "list[Runner]" = []
"""What a process of a pool runs; set when it begins."""


def _begin(job: Job) -> None:
    _there.append(Runner(job))


def _run_there(clip: int) -> None:
    _there[-1].run_clip(clip)


class Runner:
    """Runs clips of a job in one process: the model, loaded when it is first needed."""

    def __init__(self, job: Job) -> None:
        self.job, self._warm = job, set[str]()

    @functools.cached_property
    def model(self) -> SuiteModel:
        """The model, whose own runs are not counted."""
        suite, machine = self.job.suite, self.job.machine
        given = None if suite.embedded else (suite.source, machine.dtype(suite.dtype), machine)
        return _loaded(suite.model, json.dumps(suite.call, sort_keys=True), suite.own, given)

    def run_clip(self, clip: int, look: Callable[[], None] = lambda: None) -> None:
        """Run what one clip lacks: arms, then the dense runs between which each is held; ``look`` follows each."""
        job = self.job
        known = {name: line for (name, at), line in latest(read_lines(job.out)).items() if at == clip}
        if not any(_missing_arms(job, known)):
            return
        with threads(job.threads):
            if job.timed:
                self.model.run(clip, steps=1, solver=BEST)  # warms up
            own = {"steps": job.suite.reference_steps, "solver": job.suite.reference_solver}
            reference = None if job.judge else reference_run(self.model, clip, job.cache, **own)
            if reference and reference.agreement < AGREE and job.talk:
                print(f"clip {clip}: {reference.steps} steps agree with half as many to "
                      f"{reference.agreement:.1f} dB only; the search for the converged run ends there",
                      file=sys.stderr)  # fmt: skip
            while arm := next(_missing_arms(job, known), None):
                runs, beside = self.sample(arm, clip)
                line = line_of(Sampled(job=job, arm=arm, clip=clip, model=self.model, reference=reference,
                                       runs=runs, beside=beside))  # fmt: skip
                earlier = {key: value for key, value in known.get(arm.name, {}).items() if key in EXTRA}
                known[arm.name] = line = {**earlier, **line}
                append_line(job.out, line)
                look()
                if job.talk:
                    figures = "{psnr:.1f} dB at {work:.1f} steps' work" if reference else "score {score:.0%}"
                    print(f"clip {clip} {arm.name}: {figures.format(**line)}", file=sys.stderr)

    def sample(self, arm: Arm, clip: int) -> tuple[list[Run], list[Run]]:
        """Return the runs of an arm, as many as each is repeated, and where timed after each a dense one of its steps.

        A dense arm's single run is kept on disk; warm-up runs precede an arm's first in this process.
        """
        suite = self.job.suite
        plain = arm.is_dense or (not suite.ladder and arm == suite.rival(arm.num_inference_steps))
        dense = plain and not self.job.judge
        if dense and suite.repeats == 1:
            return [dense_run(self.model, clip, arm.num_inference_steps, self.job.cache, solver=arm.solver)], []
        if arm.name not in self._warm:
            for _ in range(suite.warmup):
                self.model.run(clip, **arm.run_options())
            self._warm.add(arm.name)
        runs, beside = list[Run](), list[Run]()
        for _ in range(suite.repeats):
            runs.append(self.model.run(clip, **arm.run_options()))
            if self.job.timed and not dense and arm != suite.rival(arm.num_inference_steps):
                beside.append(self.model.run(clip, steps=arm.num_inference_steps, solver=BEST))
        return runs, beside


def _missing_arms(job: Job, known: Mapping[str, Line]) -> Iterator[Arm]:
    """Give the arms that a clip lacks; the dense ones to hold others against last, since these tell which."""
    arms = [] if job.judge else [line for line in known.values() if not is_rival(line)]
    rivals = set[int]().union(*map(rival_steps, arms))
    for arm in (*job.suite.arms, *map(job.suite.rival, sorted(rivals))):
        line = known.get(arm.name)
        measured = {*ALWAYS, *line.get("metrics", ()), *line.get("skipped", ())} if line else set[str]()
        if (
            line is None
            or any(name not in measured and metric(name).missing() is None for name in job.suite.metrics)
            or (job.timed and not (arm.is_dense or is_rival(line)) and "seconds" not in line)
            or (job.suite.repeats > 1 and len(line.get("repeated", {}).get("seconds", ())) < job.suite.repeats)
            or (job.frames and not all((job.out.parent / line.get(key, "")).is_file() for key in KEPT))
        ):
            yield arm


@functools.lru_cache(maxsize=1)
def _loaded(name: str, call: str, own: OwnClips | None, given: tuple[str, Dtype, Machine] | None) -> SuiteModel:
    """Return a job's model, loaded once a process: an embedded one, or ``given`` by source, number format, machine."""
    if given is None:
        arguments = json.loads(call)
        return EmbeddedModel(name, arguments) if own is None else EmbeddedModel(name, arguments, own=own)
    assert own is not None  # `checked` refuses it
    source, dtype, machine = given
    return GivenModel(name, source, json.loads(call), own, dtype, machine)


def clip_steps(job: Job, lines: Sequence[Line]) -> dict[str, Bounds]:
    """Return the denoising steps that a clip takes, by what they are for, as far as the lines of the clip tell."""
    suite = job.suite
    arms = [arm for arm in suite.arms if job.judge or not (arm.is_dense or arm == suite.rival(arm.num_inference_steps))]
    own = suite.repeats * (1 + job.timed) * sum(arm.num_inference_steps for arm in arms)
    if job.judge:
        return {"arms": np.array([own, own])}
    known = {line["arm"] for line in lines}
    missing = [arm.num_inference_steps for arm in arms if arm.name not in known]
    dense = {arm.name: arm.num_inference_steps for arm in suite.arms if arm not in arms}
    held = set[int]().union(*(rival_steps(line) for line in lines if not is_rival(line)))
    dense |= {suite.rival(one).name: one for one in held}
    dense = {name: steps for name, steps in dense.items() if steps != _again(job)}
    past = {_again(job), *dense.values()}
    possible = [one for one in range(max(missing, default=0) + 1, 0, -1) if one not in past]
    more = possible[: 2 * len(missing) * len({**WORKS, **TIMED})]
    low = suite.repeats * sum(dense.values())
    return {
        "references": _references(job, lines),
        "arms": np.array([own, own]),
        "dense runs of as much work": np.array([low, low + suite.repeats * sum(more)]),
    }


def _again(job: Job) -> int | None:
    """Return the steps of the dense run that is the reference, and is not made twice; None where there is none."""
    return job.suite.reference_steps if job.suite.repeats == 1 and not job.suite.ladder else None


def _references(job: Job, lines: Sequence[Line]) -> Bounds:
    """Return the steps of a clip's reference, those of the search for it among them, and of the warm-up to be timed."""
    own, found = job.suite.reference_steps, next((line["reference_steps"] for line in lines), None)
    ends = (own, own) if own else (2 * end - FIRST for end in (found or 2 * FIRST, found or MOST))
    return np.array([*ends]) + job.timed


def steps_of(job: Job, lines: Sequence[Line]) -> int:
    """Return the denoising steps behind the lines of one clip: its runs, and the search for its reference."""
    searched = int(_references(job, lines)[0]) if lines and not job.judge else 0
    made = [line for line in lines if not (is_rival(line) and line["num_inference_steps"] == _again(job))]
    runs = (len(line.get("repeated", {}).get("seconds", (0,))) * (1 + ("seconds" in line)) for line in made)
    return searched + sum(line["num_inference_steps"] * count for line, count in zip(made, runs, strict=True))


def progress_of(job: Job, clips: Sequence[int], lines: Sequence[Line]) -> tuple[int, tuple[int, int]]:
    """Return the denoising steps that are done, and the fewest and the most that the clips take in all.

    What clips that are whole took is what others are taken to need.
    """
    by_clip = {clip: [line for (_, at), line in latest(lines).items() if at == clip] for clip in clips}
    done = {clip: steps_of(job, own) for clip, own in by_clip.items()}
    ends = {clip: np.sum([*clip_steps(job, own).values()], axis=0) for clip, own in by_clip.items()}
    whole = [low for clip, (low, high) in ends.items() if by_clip[clip] and low == high]
    typical = round(sum(whole) / len(whole)) if whole else None
    needs = [(typical, typical) if typical and one[0] < one[1] else one for one in ends.values()]
    low, high = (sum(max(one[end], made) for one, made in zip(needs, done.values(), strict=True)) for end in (0, 1))
    return sum(done.values()), (int(low), int(high))


def cost_of(job: Job, clips: Sequence[int], lines: Sequence[Line]) -> str:
    """Return in words what is still to be run."""
    suite, (done, needed) = job.suite, progress_of(job, clips, lines)
    warm = suite.warmup * sum(arm.num_inference_steps for arm in suite.arms)
    text = f"{suite.name}: {len(clips)} clip{'s' * (len(clips) != 1)}, "
    text += f"{_span(end + warm - done for end in needed)} denoising steps to run"
    parts = ", ".join(f"{what} {_span(len(clips) * ends)}" for what, ends in clip_steps(job, ()).items())
    return text + (f", {done:,} are done" if done else f" ({parts})")


def _span(ends: Any) -> str:
    return " to ".join(dict.fromkeys(f"{end:,}" for end in ends))


class SuiteProgress:
    """A bar over the clips of a suite; a context manager, and what `compare.run` calls with the lines so far.

    Args:
        workers: how many processes share the clips.
    """

    def __init__(self, job: Job, clips: Sequence[int], *, quiet: bool = False, workers: int = 1) -> None:
        self._job, self._clips, self._quiet, self._workers = job, clips, quiet, workers
        self._before = -1
        self._foretold: bool | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=TALK,
            disable=quiet or not TALK.is_terminal,
        )
        self._task = self._progress.add_task(job.suite.name, total=None)

    def __enter__(self) -> Callable[[Sequence[Line]], None]:
        self._progress.__enter__()
        return self.show

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def show(self, lines: Sequence[Line]) -> None:
        """Move the bar to what these lines say, and say what is still to be run: in steps, then in minutes."""
        if self._before < 0:
            self._before = len(lines)
            self._say(cost_of(self._job, self._clips, lines))
        done, (low, high) = progress_of(self._job, self._clips, lines)
        timed = [line for line in lines[self._before :] if "times" in line]
        if timed and done < high and (self._foretold is None or (low == high) > self._foretold):
            self._foretold = low == high  # after the first run, and once more where that left a range
            self._say(_time_left(timed, (low - done, high - done), self._workers))
        text = f"{self._job.suite.name}: {len({*latest(lines)})} runs"
        self._progress.update(self._task, completed=done, total=high, description=text)

    def _say(self, text: str) -> None:
        if not self._quiet:
            TALK.print(text, markup=False, soft_wrap=True)


def _time_left(lines: Sequence[Line], left: tuple[int, int], workers: int) -> str:
    """Return in words how long so many steps take, by the runs so far, each step as long as a dense one."""
    seconds = sum(line["times"][stage] for line in lines for stage in ("text", "denoise", "decode"))
    rate = seconds / sum(line.get("work") or line["num_inference_steps"] for line in lines)
    times = [steps * rate / workers for steps in left]
    unit, name = next((one, name) for one, name in ((3600, "hours"), (60, "minutes"), (1, "seconds"))
                      if times[1] >= 2 * one or one == 1)  # fmt: skip
    return f"a dense step takes {rate:.2g} s: about {_span(max(1, round(one / unit)) for one in times)} {name} are left"
