"""The ladder of rivals: for each number of steps the dense run of the best solver and noise shift on choosing clips."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from dit_accel_assets import model_names, model_path
from dit_accel_eval.runs.model import shipped_scheduler
from dit_accel_eval.runs.results import Line, latest, read_lines
from dit_accel_eval.suites.arms import Arm, dense_arm
from dit_accel_eval.suites.compare import run
from dit_accel_eval.suites.cost import SuiteProgress
from dit_accel_eval.suites.job import Job
from dit_accel_eval.suites.ladder import VERSION, read_ladder, setting_words
from dit_accel_eval.suites.reference import default_cache
from dit_accel_eval.suites.suite import Suite
from dit_accel_pipelines.generation.solvers import BEST, SOLVERS, shift_of
from study import RESULTS

from dit_accel import ConfigError
from dit_accel.files import written_whole

STEPS = (4, 6, 8, 10, 12, 14, 16, 20, 24, 30)
SHIFTS = (3.0, 8.0, 12.0)
FLUX_SHIFTS = (1.0, 3.0)
"""Noise shifts besides the model's own, of a model whose shift grows with its tokens (1.65 at 256)."""


def grid(solvers: Sequence[str], shifts: Sequence[float], steps: Sequence[int], own: float | None) -> tuple[Arm, ...]:
    """Return the dense runs that are tried, those of the best solver at the model's own shift among them.

    Args:
        shifts: besides the model's own.
        own: the model's own shift, by which it is left out of the others.
    """
    others = [None, *(shift for shift in shifts if shift != own)]
    arms = []
    for solver in solvers:
        for shift in others:
            for count in steps:
                arm = Arm(
                    name=f"{setting_words(solver, shift)}, {count}", num_inference_steps=count, solver=solver,
                    flow_shift=shift,
                )  # fmt: skip
                arms.append(dense_arm(count) if arm.is_dense else arm)
    return tuple(arms)


def ladder_of(suite: Suite, lines: Sequence[Line]) -> dict[str, Any]:
    """Return the best run of each number of steps by mean PSNR over the suite's clips, as `read_ladder` knows it.

    Raises:
        ConfigError: where an arm has not run on every clip.
    """
    known = latest(lines)
    clips = range(suite.first_clip, suite.first_clip + suite.clips)
    means = list[tuple[Arm, float]]()
    for arm in suite.arms:
        missing = [clip for clip in clips if (arm.name, clip) not in known]
        if missing:
            raise ConfigError(f"{arm.name} has not run on clips {missing}; run the study to its end")
        means.append((arm, float(np.mean([known[arm.name, clip]["psnr"] for clip in clips]))))
    data = {"version": VERSION, "model": suite.model, "first_clip": suite.first_clip, "clips": suite.clips}
    data |= {"reference_steps": suite.reference_steps} if suite.reference_steps else {}
    rungs = []
    for count in sorted({arm.num_inference_steps for arm in suite.arms}):
        own = [(arm, mean) for arm, mean in means if arm.num_inference_steps == count]
        best, psnr = max(own, key=lambda one: one[1])
        shift = {} if best.flow_shift is None else {"flow_shift": best.flow_shift}
        tried = {setting_words(arm.solver, arm.flow_shift): round(mean, 2) for arm, mean in own}
        rung = {"num_inference_steps": count, "solver": best.solver, **shift, "psnr": round(psnr, 2)}
        rungs.append({**rung, "tried": tried})
    return {**data, "rung": rungs}


def write_ladder(data: Mapping[str, Any], path: Path, command: str) -> None:
    """Write a ladder, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(f"# {command}\n{tomli_w.dumps(data)}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not run yet, and write the ladder; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=model_names(), required=True)
    parser.add_argument("--clips", type=int, default=16, help="held-out clips that choose (%(default)s)")
    parser.add_argument("--first-clip", type=int, default=0, help="the first of them (%(default)s)")
    parser.add_argument("--solvers", nargs="+", choices=tuple(SOLVERS), default=[BEST, "dpm++"], help="(%(default)s)")
    parser.add_argument("--shifts", nargs="*", type=float, help="besides the model's own")
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS, help="(%(default)s)")
    parser.add_argument("--reference-steps", type=int, help="of the model's own run; default: the converged one")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each (%(default)s)")
    parser.add_argument("--out", type=Path, help="default: eval/results/rivals-MODEL[-STEPS].toml")
    options = parser.parse_args(arguments)
    try:
        print(_run(options))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> str:
    """Make the runs and write the ladder beside them; returns it in words."""
    shipped = shipped_scheduler(str(model_path(options.model)))
    dynamic = bool(shipped.config.get("use_dynamic_shifting"))
    shifts = options.shifts if options.shifts is not None else FLUX_SHIFTS if dynamic else SHIFTS
    arms = grid(options.solvers, shifts, options.steps, None if dynamic else shift_of(shipped))
    of = f"-{options.reference_steps}" if options.reference_steps else ""
    out = options.out or RESULTS / f"rivals-{options.model}{of}.toml"
    suite = Suite(
        name=out.stem, model=options.model, clips=options.clips, first_clip=options.first_clip, arms=arms,
        reference_steps=options.reference_steps,
    )  # fmt: skip
    job = Job(
        suite=suite, out=out.with_suffix(".runs.jsonl"), cache=default_cache(), timed=False, threads=1, talk=False
    )
    clips = range(suite.first_clip, suite.first_clip + suite.clips)
    with SuiteProgress(job, clips, workers=options.workers) as watch:
        run(job, clips, workers=options.workers, watch=watch)
    command = f"python eval/studies/best_rival.py --model {options.model}"
    command += f" --reference-steps {options.reference_steps}" if options.reference_steps else ""
    write_ladder(ladder_of(suite, read_lines(job.out)), out, command)
    return f"{out}: {read_ladder(out)}"


if __name__ == "__main__":
    raise SystemExit(main())
