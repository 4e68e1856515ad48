"""Compares a suite's arms with converged runs: `python -m dit_accel_eval.compare eval/suites/sparse-wan-tiny.toml`.

Every clip of every arm is one JSON line, written as it is made; a run that was stopped goes on where it stopped. The
protocol is in eval/README.md.
"""

import argparse
import functools
import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

import torch
from dit_accel_assets import model_score

from dit_accel import ConfigError, DitAccelError

from .comparison import rival_steps, table
from .counting import REAL_SHARE, work
from .embedded import EmbeddedModel, check_name, settled_call, weights_hash
from .fidelity import psnr, ssim
from .reference import AGREE, Reference, converged, default_cache, dense_run
from .results import Line, append_line, check_lines, latest, read_lines, write_lines
from .solvers import BEST
from .suite import Arm, Suite, dense_arm, read_suite


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a process needs to run the clips of a suite: the files, and whether runs are timed."""

    suite: Suite
    out: Path
    cache: Path
    timed: bool
    threads: int


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
        if options.time and options.workers > 1:
            raise ConfigError(f"timed runs need the machine to themselves, got --workers {options.workers}")
        suite = read_suite(options.suite)
        out = options.out or options.suite.parent.parent / "results" / f"{suite.name}.jsonl"
        if not options.table:
            threads = options.threads if options.time else 1
            job = Job(suite=suite, out=out, cache=options.cache, timed=options.time, threads=threads)
            clips = range(suite.clips if options.clips is None else min(options.clips, suite.clips))
            run(job, clips, workers=options.workers)
        print(table(suite, read_lines(out)))
    except DitAccelError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def run(job: Job, clips: Sequence[int], *, workers: int = 1) -> None:
    """Make what the job's file does not hold yet, and append one JSON line per clip and arm.

    Raises:
        ConfigError: if the file holds results of another model, call, reference or arm.
    """
    check_name(job.suite.model)
    for arm in job.suite.arms:
        if arm.call:
            raise ConfigError(f"compare runs all arms at one size, got {dict(arm.call)} for {arm.name!r}; leave it out")
    known = read_lines(job.out)
    check_lines(job.out, known, setting_of(job.suite), {arm.name: arm.to_dict() for arm in job.suite.arms})
    job.out.parent.mkdir(parents=True, exist_ok=True)
    write_lines(job.out, known)  # without a last line that was cut off
    if workers <= 1 or len(clips) <= 1:
        for clip in clips:
            run_clip(job, clip)
    else:
        context = get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(clips)), mp_context=context, initializer=end_with_parent) as pool:
            for done in as_completed([pool.submit(run_clip, job, clip) for clip in clips]):
                done.result()
    write_lines(job.out, _sorted(job.suite, latest(read_lines(job.out)).values()))


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


def run_clip(job: Job, clip: int) -> None:
    """Run what one clip lacks: arms first, then the dense runs between which each is held."""
    known = {name: line for (name, at), line in latest(read_lines(job.out)).items() if at == clip}
    if not any(_lacking(job, known)):
        return
    torch.set_num_threads(job.threads)
    model = _loaded(job.suite.model, json.dumps(job.suite.call, sort_keys=True))
    if job.timed:
        model.run(clip, steps=1, solver=BEST)  # warms up
    reference = converged(model, clip, job.cache)
    if reference.agreement < AGREE:
        print(f"clip {clip}: {reference.steps} steps agree with half as many to {reference.agreement:.1f} dB only; "
              "the search for the converged run ends there", file=sys.stderr)  # fmt: skip
    while arm := next(_lacking(job, known), None):
        line = measured(model, arm, clip, reference, job)
        append_line(job.out, line)
        known[arm.name] = line
        print(f"clip {clip} {arm.name}: {line['psnr']:.1f} dB at {line['work_real']:.1f} steps' work", file=sys.stderr)


def _lacking(job: Job, known: Mapping[str, Line]) -> Iterator[Arm]:
    """Give the arms that a clip lacks; the dense ones to hold others against last, since these tell which."""
    for arm in job.suite.arms:
        if arm.name not in known or (job.timed and not arm.is_dense and "seconds" not in known[arm.name]):
            yield arm
    for steps in sorted(set().union(*map(rival_steps, known.values()))):
        if dense_arm(steps).name not in known:
            yield dense_arm(steps)


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
        "prompt": model.prompt(clip),
        **setting_of(job.suite),
        "reference_steps": reference.steps,
        "reference_agreement": reference.agreement,
        **arm.to_dict(),
        "psnr": psnr(made.frames, reference.frames),
        "ssim": ssim(made.frames, reference.frames),
        "score": model_score(model.name, clip, made.frames),
        **{key: round(work(made.counts, reference.step, made.attended, share), 6) for key, share in shares.items()},
        "attended": made.attended,
        "forwards": made.counts.blocks / reference.step.blocks,
        "torch": torch.__version__,
    }
    if job.timed and not arm.is_dense:
        dense_seconds = model.run(clip, steps=steps, solver=BEST).seconds
        line |= {"seconds": made.seconds, "dense_seconds": dense_seconds, "threads": job.threads}
        line["steps_in_time"] = steps * made.seconds / dense_seconds
    return line


def _sorted(suite: Suite, lines: Iterable[Line]) -> list[Line]:
    """Return lines by clip, then in the order of the suite's arms, the added dense runs last."""
    places = {arm.name: place for place, arm in enumerate(suite.arms)}

    def place(line: Line) -> tuple[int, int, int]:
        return line["clip"], places.get(line["arm"], len(places)), line["num_inference_steps"]

    return sorted(lines, key=place)


if __name__ == "__main__":
    raise SystemExit(main())
