"""The ladder of rivals: for each number of steps the dense run of the best solver and noise shift on choosing clips."""

import argparse
import dataclasses
import shlex
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from dit_accel_assets import model_names, model_path
from dit_accel_eval.runs.model import shipped_scheduler
from dit_accel_eval.runs.results import Line, read_lines
from dit_accel_eval.suites.arms import Arm, dense_arm
from dit_accel_eval.suites.job import Job
from dit_accel_eval.suites.reference import default_cache
from dit_accel_eval.suites.running import run_arms, suite_progress
from dit_accel_eval.suites.suite import LADDER_VERSION, Ladder, Suite, read_ladder, setting_words
from dit_accel_pipelines.generation.solvers import BEST, SOLVERS, shift_of

from dit_accel import ConfigError
from dit_accel.files import written_whole

RESULTS = Path(__file__).parents[1] / "results"
STEPS = (6, 8, 10, 12, 16, 20)
SHIFTS = (3.0, 8.0, 12.0, 16.0)
FLUX_SHIFTS = (1.0, 3.0, 5.0, 8.0)
"""Noise shifts besides the model's own, of a model whose shift grows with its tokens (1.65 at 256)."""

CONFIRMING = (112, 119)
"""The first and the last clip on which rungs are tried again that others chose."""

FIRST, KEPT = 4, 3
"""Choosing clips on which the whole grid runs, and how many of each number of steps then run on all of them."""


def grid(solvers: Sequence[str], shifts: Sequence[float], steps: Sequence[int], own: float | None) -> tuple[Arm, ...]:
    """Return the dense runs that are tried, at shifts besides the model's own, which is left out of the others."""
    tried = [None, *(shift for shift in shifts if shift != own)]
    return tuple(_arm(solver, shift, count) for solver in solvers for shift in tried for count in steps)


def _arm(solver: str, shift: float | None, count: int) -> Arm:
    name = f"{setting_words(solver, shift)}, {count}"
    arm = Arm(name=name, num_inference_steps=count, solver=solver, flow_shift=shift)
    return dense_arm(count) if arm.is_dense else arm


def means(suite: Suite, lines: Sequence[Line], clips: int) -> dict[str, float]:
    """Return name -> mean PSNR over the suite's first clips, of each arm that ran on all of them."""
    known = {(line["arm"], line["clip"]): line for line in lines}
    wanted = range(suite.first_clip, suite.first_clip + clips)
    ran = [arm.name for arm in suite.arms if all((arm.name, clip) in known for clip in wanted)]
    return {name: float(np.mean([known[name, clip]["psnr"] for clip in wanted])) for name in ran}


def finalists(suite: Suite, lines: Sequence[Line]) -> tuple[Arm, ...]:
    """Return the arms that go on to all choosing clips: of each number of steps the best of the first, and UniPC's."""
    psnrs = means(suite, lines, min(FIRST, suite.clips))
    ranked = sorted((arm for arm in suite.arms if arm.name in psnrs), key=lambda arm: -psnrs[arm.name])
    counts = sorted({arm.num_inference_steps for arm in suite.arms})
    by_count = [[arm for arm in ranked if arm.num_inference_steps == count] for count in counts]
    return tuple(arm for arms in by_count for at, arm in enumerate(arms) if at < KEPT or arm.is_dense)


def ladder_of(suite: Suite, lines: Sequence[Line]) -> dict[str, Any]:
    """Return the best run of each number of steps by mean PSNR over the suite's clips, as `read_ladder` knows it.

    ``tried`` has that of every arm, over the first clips alone where it went no further.
    """
    whole = means(suite, lines, suite.clips)
    psnrs = means(suite, lines, min(FIRST, suite.clips)) | whole
    data = {"version": LADDER_VERSION, "model": suite.model, "first_clip": suite.first_clip, "clips": suite.clips}
    data |= {"reference_steps": suite.reference_steps} if suite.reference_steps else {}
    rungs = []
    for count in sorted({arm.num_inference_steps for arm in suite.arms}):
        arms = [arm for arm in suite.arms if arm.num_inference_steps == count]
        ran = [arm for arm in arms if arm.name in whole]
        if not ran:
            raise ConfigError(f"no run of {count} steps is on every clip yet; run the study to its end")
        best = max(ran, key=lambda arm: whole[arm.name])
        shift = {} if best.flow_shift is None else {"flow_shift": best.flow_shift}
        tried = {
            setting_words(arm.solver, arm.flow_shift): round(psnrs[arm.name], 2) for arm in arms if arm.name in psnrs
        }
        rung = {"num_inference_steps": count, "solver": best.solver, **shift, "psnr": round(whole[best.name], 2)}
        rungs.append({**rung, "tried": tried})
    return {**data, "rung": rungs}


def again(ladder: Ladder, steps: Sequence[int] = ()) -> tuple[Arm, ...]:
    """Return what is tried again of a ladder: of each number of steps, or of these, the best of what was tried."""
    arms = []
    for rung in (rung for rung in ladder.rungs if not steps or rung.num_inference_steps in steps):
        for words in sorted(rung.tried, key=lambda words: -rung.tried[words])[:KEPT]:
            solver, _, shift = words.partition(" shift ")
            arms.append(_arm(solver, float(shift) if shift else None, rung.num_inference_steps))
    return tuple(arms)


def confirmed(path: Path, suite: Suite, lines: Sequence[Line]) -> dict[str, Any]:
    """Return the data of a ladder's file with the mean PSNR of what a suite of `again` ran on its clips."""
    data, psnrs = tomllib.loads(path.read_text(encoding="utf-8")), means(suite, lines, suite.clips)
    data["confirmed_on"] = [suite.first_clip, suite.first_clip + suite.clips - 1]
    rungs = data.pop("rung")
    for rung in rungs:
        rung["confirming"] = {
            setting_words(arm.solver, arm.flow_shift): round(psnrs[arm.name], 2)
            for arm in suite.arms if arm.num_inference_steps == rung["num_inference_steps"]
        }  # fmt: skip
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
    parser.add_argument("--among", type=Path, help="ladder of which the best of each number of steps alone are tried")
    parser.add_argument("--confirm", action="store_true", help="try the rungs of a ladder again on other clips")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each (%(default)s)")
    parser.add_argument("--out", type=Path, help="default: eval/results/rivals-MODEL[-STEPS].toml")
    options = parser.parse_args(arguments)
    try:
        print(_run(options, arguments if arguments is not None else sys.argv[1:]))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> str:
    """Make the runs and write the ladder beside them; returns it in words."""
    shipped = shipped_scheduler(str(model_path(options.model)))
    dynamic = bool(shipped.config.get("use_dynamic_shifting"))
    shifts = options.shifts if options.shifts is not None else FLUX_SHIFTS if dynamic else SHIFTS
    arms = grid(options.solvers, shifts, options.steps, None if dynamic else shift_of(shipped))
    if options.among:
        arms = again(read_ladder(options.among), options.steps)
        arms += tuple(plain for count in options.steps if (plain := dense_arm(count)) not in arms)
    of = f"-{options.reference_steps}" if options.reference_steps else ""
    out = options.out or RESULTS / f"rivals-{options.model}{of}.toml"
    suite = Suite(
        name=out.stem, model=options.model, reference_steps=options.reference_steps, clips=options.clips,
        first_clip=options.first_clip, arms=arms,
    )  # fmt: skip
    if options.confirm:
        low, high = CONFIRMING
        changes = dict(name=f"{out.stem}-confirmed", clips=high - low + 1, first_clip=low)
        other = dataclasses.replace(suite, **changes, arms=again(read_ladder(out)))
        data = confirmed(out, other, _ran(other, out.with_stem(other.name), options.workers))
    else:
        lines = _ran(dataclasses.replace(suite, clips=min(FIRST, suite.clips)), out, options.workers)
        lines = _ran(dataclasses.replace(suite, arms=finalists(suite, lines)), out, options.workers)
        data = ladder_of(suite, lines)
    write_ladder(data, out, f"python eval/studies/best_rival.py {shlex.join(arguments)}")
    ladder = read_ladder(out)
    return f"{out}: {(ladder.loose or 'all rungs are confirmed') if options.confirm else ladder}"


def _ran(suite: Suite, out: Path, workers: int) -> list[Line]:
    """Run what a suite lacks; returns all lines beside a ladder."""
    out = out.with_suffix(".runs.jsonl")
    job = Job(suite=suite, out=out, cache=default_cache(), timed=False, threads=1, talk=False)
    clips = range(suite.first_clip, suite.first_clip + suite.clips)
    with suite_progress(job, clips) as watch:
        run_arms(job, clips, workers=workers, watch=watch)
    return read_lines(out)


if __name__ == "__main__":
    raise SystemExit(main())
