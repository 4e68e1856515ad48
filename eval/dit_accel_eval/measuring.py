"""What a result line says of one run: how it compares with the converged one or is judged, what it cost, what ran."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from dit_accel_assets import model_defaults, model_score
from dit_accel_pipelines.request import EMBEDDED_FPS
from dit_accel_pipelines.solvers import BEST

from dit_accel import ConfigError

from .counting import REAL_SHARE, Counts, work
from .embedded import EmbeddedModel, Run
from .job import Job, arm_setting, setting_of
from .judges import JUDGES
from .kept import REFERENCE, keep, kept_path, read_kept, reference_of, run_of
from .machine import processor
from .metrics.metric import Clip, Sample
from .metrics.registry import metric, scores
from .reference import Reference, dense_run
from .results import Line
from .suite import Arm, Suite

ALWAYS = ("psnr", "ssim")
"""What every line of an arm that is held against a converged run holds by itself."""

DIGITS = 4
"""Digits behind the point of values by frame and by step."""


def converged_line(model: EmbeddedModel, arm: Arm, clip: int, reference: Reference, job: Job) -> Line:
    """Return the line of one clip of one arm, held against the converged run.

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
        **_about(model, arm, clip, job),
        "reference_steps": reference.steps,
        "reference_agreement": reference.agreement,
        **measures(job.suite, arm.name, clip, made.frames, reference.frames, model.prompt(clip)),
        "score": model_score(model.name, clip, made.frames),
        **{key: round(work(made.counts, reference.step, made.attended, share), 6) for key, share in shares.items()},
        "forwards": made.counts.blocks / reference.step.blocks,
        **_cost(made, reference.step, model.own_share),
    }
    if job.frames is not None:
        line |= _kept(job.frames, job.out.parent, line, made.frames, reference)
    if job.timed and not arm.is_dense:
        dense_seconds = model.run(clip, steps=steps, solver=BEST).seconds
        line |= {"seconds": made.seconds, "dense_seconds": dense_seconds, "threads": job.threads}
        line["processor"] = processor()
        line["steps_in_time"] = steps * made.seconds / dense_seconds
    return line


def judged_line(model: EmbeddedModel, arm: Arm, clip: int, job: Job) -> Line:
    """Return the line of one clip of one arm, judged by itself."""
    made = model.run(
        clip, steps=arm.num_inference_steps, solver=arm.solver, flow_shift=arm.flow_shift, methods=arm.methods,
        call=arm.call,
    )  # fmt: skip
    found = JUDGES[job.suite.judge].measures(model, clip, made)
    return {**_about(model, arm, clip, job), **found, **_cost(made, None, 0.0)}


def _about(model: EmbeddedModel, arm: Arm, clip: int, job: Job) -> Line:
    """Return what shapes a run, and what it was made with."""
    return {
        "arm": arm.name,
        "clip": clip,
        "suite": job.suite.name,
        "prompt": model.prompt(clip),
        **setting_of(job.suite),
        **arm_setting(job.suite, arm),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "dit_accel": version("dit-accel"),
        "python": platform.python_version(),
        "device": processor(),
    }


def _cost(made: Run, dense_step: Counts | None, share: float) -> Line:
    """Return what a run took, as far as it is known: by stage, by step and in memory, beside whatever else ran.

    ``step_work`` is each step's work in dense steps, 0 where it was skipped; ``density`` the exact share of tiles by
    step and layer, None where no attention call followed a plan.
    """
    line: Line = {"attended": made.attended}
    if made.times is not None:
        line["times"] = made.times.to_dict()
    if made.by_step and dense_step is not None:
        line["step_work"] = [round(work(counts, dense_step, part, share), DIGITS) for counts, part in made.by_step]
    if made.density:
        line["density"] = [[None if one is None else round(one, DIGITS) for one in step] for step in made.density]
    if made.memory is not None:
        line["peak_memory_bytes"] = dict(made.memory)
    return line


def measures(suite: Suite, arm: str, clip: int, frames: Clip, reference: Clip, prompt: str) -> Line:
    """Return what is measured against the reference: PSNR and SSIM, and what the suite names besides.

    ``metrics`` holds values by name, ``by_frame`` those of single frames, ``skipped`` why a metric says nothing about
    this clip, and ``unavailable`` why it could not be measured on this machine.

    Raises:
        ConfigError: for frames that are not finite, with the arm and clip that made them.
    """
    defaults = model_defaults(suite.model)
    trained = int(defaults["num_frames"]) if "num_frames" in defaults else None
    try:
        sample = Sample(frames=frames, reference=reference, prompt=prompt, fps=EMBEDDED_FPS, trained_frames=trained)
    except ConfigError as error:
        raise ConfigError(f"clip {clip} of arm {arm!r}: {error}") from None
    found = scores(dict.fromkeys((*ALWAYS, *suite.metrics)), sample)
    values = found.values()
    line: dict[str, Any] = {name: values.pop(name) for name in ALWAYS}
    if not suite.metrics:
        return line
    by_frame = {name: one.by_frame for name, one in found.measured.items() if name in suite.metrics}
    line["metrics"] = values
    line["by_frame"] = {name: [round(x, DIGITS) for x in one] for name, one in by_frame.items() if one is not None}
    line |= {key: told for key in ("skipped", "unavailable") if (told := getattr(found, key))}
    return line


def lacks_metrics(suite: Suite, line: Line) -> bool:
    """Whether a line lacks a metric that the suite names and that can be measured here now."""
    known = {*line.get("metrics", ()), *line.get("skipped", ()), *ALWAYS}
    return any(name not in known and metric(name).missing() is None for name in suite.metrics)


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
