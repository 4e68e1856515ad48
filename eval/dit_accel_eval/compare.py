"""Compares a suite's arms with converged runs, the runner of `dit-accel eval run`; also as a module, with --table.

Every clip of every arm is one JSON line, written as it is made; a run that was stopped goes on where it stopped. The
protocol is in eval/README.md.
"""

import argparse
import functools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path

import torch
from dit_accel_assets import model_score
from dit_accel_pipelines.ranks import Ranks

from dit_accel import ConfigError, DitAccelError
from dit_accel.files import check_writable

from .comparison import rival_steps, table
from .counting import REAL_SHARE, work
from .denoising_time import processor
from .embedded import EmbeddedModel, check_name, settled_call, weights_hash
from .fidelity import Clip
from .kept import REFERENCE, keep, kept_path, read_kept, reference_of, run_of
from .measuring import lacks_metrics, measures
from .reference import AGREE, Reference, converged, default_cache, dense_run
from .results import Line, append_line, check_lines, latest, read_lines, write_lines
from .solvers import BEST
from .suite import Arm, Suite, dense_arm, read_suite

LOOK = 1.0
"""Seconds between two looks at what the processes have made."""

EXTRA = ("seconds", "dense_seconds", "threads", "processor", "steps_in_time", "kept", "kept_reference")
"""What a line keeps if its run is made anew for something else that it lacked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a process needs to run the clips of a suite.

    Attributes:
        suite: what runs.
        out: the result lines' file.
        cache: folder of dense runs.
        timed: whether each arm is timed beside the dense run of as many steps.
        threads: of torch.
        frames: folder in which the frames of every run are kept; None: nowhere.
        talk: whether each run is told on stderr.
    """

    suite: Suite
    out: Path
    cache: Path
    timed: bool
    threads: int
    frames: Path | None = None
    talk: bool = True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite, or only print the table of what has run; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suite", type=Path)
    parser.add_argument("--out", type=Path, help="JSON lines; default: results/<suite>.jsonl beside the suite's folder")
    parser.add_argument("--table", action="store_true", help="print the table of an earlier run, generate nothing")
    parser.add_argument("--clips", type=int, help="run only the first so many clips")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--time", action="store_true", help="time each arm beside the dense run of as many steps")
    parser.add_argument("--threads", type=int, default=2, help="threads of a timed run")
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), help="folder of dense runs; default: %(default)s"
    )
    options = parser.parse_args(arguments)
    try:
        check_timing(options.time, options.workers)
        suite = read_suite(options.suite)
        out = options.out or default_out(options.suite, suite)
        if not options.table:
            threads = options.threads if options.time else 1
            job = Job(suite=suite, out=out, cache=options.cache, timed=options.time, threads=threads)
            run(job, clips_of(suite, options.clips), workers=options.workers)
        print(table(suite, read_lines(out)))
    except DitAccelError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def check_timing(timed: bool, workers: int) -> None:
    """Refuse timed runs beside each other.

    Raises:
        ConfigError: for several workers.
    """
    if timed and workers > 1:
        raise ConfigError(f"timed runs need the machine to themselves, got --workers {workers}")


def default_out(path: Path, suite: Suite) -> Path:
    """Return where a suite's result lines go if no file is named: ``results/`` beside the suite's folder."""
    return path.parent.parent / "results" / f"{suite.name}.jsonl"


def clips_of(suite: Suite, most: int | None) -> range:
    """Return the clips to run: a suite's first ``most``, None: all."""
    return range(suite.clips if most is None else min(most, suite.clips))


def run(
    job: Job, clips: Sequence[int], *, workers: int = 1, watch: Callable[[Sequence[Line]], None] | None = None
) -> None:
    """Make what the job's file does not hold yet, and append one JSON line per clip and arm.

    Of processes that `accelerate launch` started together each makes its part of the clips; all append to one file, on
    a disk where appending a line is atomic, and the first checks it before and sorts it after.

    Args:
        job: what runs.
        clips: their numbers.
        workers: processes.
        watch: is given the lines so far, now and then; for progress.

    Raises:
        ConfigError: if the file can't be written, or holds results of another model, call, reference or arm.
    """
    ranks = Ranks()
    if ranks.count > 1 and (workers > 1 or job.timed):
        asked = "--time" if job.timed else f"--workers {workers}"
        raise ConfigError(f"accelerate launch started {ranks.count} processes, got {asked} besides; leave one out")
    if ranks.first:
        _prepare(job)
    ranks.wait()

    def look() -> None:
        if watch is not None:
            watch(read_lines(job.out))

    look()
    own = ranks.own(clips)
    if workers <= 1 or len(own) <= 1:
        for clip in own:
            run_clip(job, clip, look)
    else:
        _run_beside(job, own, min(workers, len(own)), look)
    ranks.wait()
    if ranks.first:
        write_lines(job.out, _sorted(job.suite, latest(read_lines(job.out)).values()))


def _prepare(job: Job) -> None:
    """Check what can be checked beforehand, and leave the file without a last line that was cut off."""
    check_name(job.suite.model)
    for arm in job.suite.arms:
        if arm.call:
            raise ConfigError(f"compare runs all arms at one size, got {dict(arm.call)} for {arm.name!r}; leave it out")
    for folder, what in ((job.out.parent, "results"), (job.frames, "frames")):
        if folder is not None:
            _make_folder(folder, what)
    check_writable(job.out, "results")
    known = read_lines(job.out)
    check_lines(job.out, known, setting_of(job.suite), {arm.name: arm.to_dict() for arm in job.suite.arms})
    write_lines(job.out, known)


def _make_folder(folder: Path, what: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{what} can't be written to {folder}: {error.strerror}; choose another folder") from None


def _run_beside(job: Job, clips: Sequence[int], workers: int, look: Callable[[], None]) -> None:
    """Run clips in processes; what stops this one, Ctrl-C among it, ends them at once."""
    others = set(active_children())
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        try:
            pending = {pool.submit(run_clip, job, clip) for clip in clips}
            while pending:
                done, pending = wait(pending, timeout=LOOK, return_when=FIRST_COMPLETED)
                for one in done:
                    one.result()
                look()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(active_children()) - others:
                process.terminate()
            raise


def end_with_parent() -> None:
    """End this process when the one that started it ends, however that does; else it would go on with its clip."""
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def setting_of(suite: Suite) -> Line:
    """Return what every line of a suite's results must say: the model, the call, and how references are made."""
    return {
        "model": suite.model,
        "weights": weights_hash(suite.model),
        "call": settled_call(suite.model, suite.call),
        "reference": f"{BEST}, agreeing to {AGREE:g} dB",
    }


def run_clip(job: Job, clip: int, look: Callable[[], None] = lambda: None) -> None:
    """Run what one clip lacks: arms first, then the dense runs between which each is held; ``look`` follows each."""
    known = {name: line for (name, at), line in latest(read_lines(job.out)).items() if at == clip}
    if not any(_lacking(job, known)):
        return
    torch.set_num_threads(job.threads)
    model = _loaded(job.suite.model, json.dumps(job.suite.call, sort_keys=True))
    if job.timed:
        model.run(clip, steps=1, solver=BEST)  # warms up
    reference = converged(model, clip, job.cache)
    if reference.agreement < AGREE and job.talk:
        print(f"clip {clip}: {reference.steps} steps agree with half as many to {reference.agreement:.1f} dB only; "
              "the search for the converged run ends there", file=sys.stderr)  # fmt: skip
    while arm := next(_lacking(job, known), None):
        earlier = {key: value for key, value in known.get(arm.name, {}).items() if key in EXTRA}
        line = {**earlier, **measured(model, arm, clip, reference, job)}
        append_line(job.out, line)
        known[arm.name] = line
        look()
        if job.talk:
            told = f"{line['psnr']:.1f} dB at {line['work_real']:.1f} steps' work"
            print(f"clip {clip} {arm.name}: {told}", file=sys.stderr)


def _lacking(job: Job, known: Mapping[str, Line]) -> Iterator[Arm]:
    """Give the arms that a clip lacks; the dense ones to hold others against last, since these tell which."""
    rivals = sorted(set().union(*map(rival_steps, known.values())))
    for arm in (*job.suite.arms, *map(dense_arm, rivals)):
        line = known.get(arm.name)
        if (
            line is None
            or lacks_metrics(job.suite, line)
            or (job.timed and not arm.is_dense and "seconds" not in line)
            or (job.frames is not None and not _has_frames(job, line))
        ):
            yield arm


def _has_frames(job: Job, line: Line) -> bool:
    return all(key in line and (job.out.parent / line[key]).is_file() for key in ("kept", "kept_reference"))


@functools.lru_cache(maxsize=1)
def _loaded(name: str, call: str) -> EmbeddedModel:
    """Return a model, which a process loads once."""
    return EmbeddedModel(name, json.loads(call))


def measured(model: EmbeddedModel, arm: Arm, clip: int, reference: Reference, job: Job) -> Line:
    """Return the line of one clip of one arm.

    A timed one has the seconds of its denoising loop, those of the dense run of as many steps right after it, and
    ``steps_in_time``, how many dense steps take as long.
    """
    steps = arm.num_inference_steps
    if arm.is_dense:
        made = dense_run(model, clip, steps, job.cache)
    else:
        made = model.run(clip, steps=steps, solver=arm.solver, flow_shift=arm.flow_shift, methods=arm.methods)
    shares = {"work": model.own_share, "work_real": REAL_SHARE}
    line: Line = {
        "arm": arm.name,
        "clip": clip,
        "suite": job.suite.name,
        "prompt": model.prompt(clip),
        **setting_of(job.suite),
        "reference_steps": reference.steps,
        "reference_agreement": reference.agreement,
        **arm.to_dict(),
        **measures(job.suite, arm.name, clip, made.frames, reference.frames, model.prompt(clip)),
        "score": model_score(model.name, clip, made.frames),
        **{key: round(work(made.counts, reference.step, made.attended, share), 6) for key, share in shares.items()},
        "attended": made.attended,
        "forwards": made.counts.blocks / reference.step.blocks,
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "dit_accel": version("dit-accel"),
    }
    if job.frames is not None:
        line |= _kept(job.frames, job.out.parent, line, made.frames, reference)
    if job.timed and not arm.is_dense:
        dense_seconds = model.run(clip, steps=steps, solver=BEST).seconds
        line |= {
            "seconds": made.seconds,
            "dense_seconds": dense_seconds,
            "threads": job.threads,
            "processor": processor(),
        }
        line["steps_in_time"] = steps * made.seconds / dense_seconds
    return line


def _kept(folder: Path, beside: Path, line: Line, clip: Clip, reference: Reference) -> Line:
    """Keep the frames of a run, and the reference's once; returns their paths, from the result lines' folder."""
    own, other = (kept_path(folder, name, line["clip"]) for name in (line["arm"], REFERENCE))
    keep(own, clip, run_of(line))
    try:
        read_kept(other, reference_of(line))
    except ConfigError:  # there is none, or one of earlier weights
        keep(other, reference.frames, reference_of(line))
    paths = {"kept": own, "kept_reference": other}
    return {key: Path(os.path.relpath(path, beside)).as_posix() for key, path in paths.items()}


def _sorted(suite: Suite, lines: Iterable[Line]) -> list[Line]:
    """Return lines by clip, then in the order of the suite's arms, the added dense runs last."""
    places = {arm.name: place for place, arm in enumerate(suite.arms)}

    def place(line: Line) -> tuple[int, int, int]:
        return line["clip"], places.get(line["arm"], len(places)), line["num_inference_steps"]

    return sorted(lines, key=place)


if __name__ == "__main__":
    raise SystemExit(main())
