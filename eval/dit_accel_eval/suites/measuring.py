"""What a result line says of one run: how it compares with the converged one or is judged, what it cost, what ran."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dit_accel_assets import model_defaults, model_score
from dit_accel_pipelines.generation.request import EMBEDDED_FPS, OTHER_FPS

from dit_accel import ConfigError

from ..metrics.metric import Clip, Sample
from ..metrics.registered import metric, scores
from ..runs.counting import Counts, tokens_of, work, works
from ..runs.kept import REFERENCE, keep, kept_path, read_kept, reference_of, run_of
from ..runs.machine import device_name, processor
from ..runs.model import Run
from ..runs.results import Line
from .arms import Arm
from .job import Job, arm_setting, setting_of
from .judges import JUDGES
from .reference import Reference, dense_run
from .runner import Runner, median_run, repeated
from .suite import Suite

ALWAYS = ("psnr", "ssim")
"""What every line of an arm that is held against a converged run holds by itself."""

UNJUDGED = "the judge knows what held-out prompts ask for, and these are not among them"
"""Why clips of one's own prompts have no score."""

DIGITS = 4
"""Digits behind the point of values by frame and by step."""


def converged_line(model: Runner, arm: Arm, clip: int, reference: Reference, job: Job) -> Line:
    """Return the line of one clip of one arm, held against the converged run.

    A timed one has the seconds of its denoising loop, those of the dense run of as many steps right after it, and
    ``steps_in_time``, how many dense steps take as long. Where samples are repeated, seconds are the median's, and
    ``repeated`` has all with their quartiles.
    """
    beside: list[Run] = []
    if job.timed and not arm.is_dense:
        runs, beside = model.beside(arm, clip)
    elif arm.is_dense and model.repeats == 1:
        runs = [dense_run(model, clip, arm.num_inference_steps, job.cache)]
    else:
        runs = model.sample(arm, clip)
    made = median_run(runs)
    line: Line = {
        **_about(model, arm, clip, job),
        "reference_steps": reference.steps,
        "reference_agreement": reference.agreement,
        **measures(job.suite, arm.name, clip, made.frames, reference.frames, model),
        **works(made.counts, reference.step, made.attended, model.own_share),
        "forwards": made.counts.blocks / reference.step.blocks,
        **_cost(made, reference.step, model.own_share),
    }
    if model.repeats > 1:
        line["repeated"] = repeated(runs)
    if job.frames is not None:
        line |= _kept(job.frames, job.out.parent, line, made.frames, reference)
    if beside:
        dense_seconds = float(np.median([run.seconds for run in beside]))
        seconds = float(np.median([run.seconds for run in runs]))
        line |= {"seconds": seconds, "dense_seconds": dense_seconds, "threads": torch.get_num_threads()}
        line["processor"] = processor()
        line["steps_in_time"] = arm.num_inference_steps * seconds / dense_seconds
    return line


def judged_line(model: Runner, arm: Arm, clip: int, job: Job) -> Line:
    """Return the line of one clip of one arm, judged by itself."""
    runs = model.sample(arm, clip)
    made = median_run(runs)
    found = JUDGES[job.suite.judge].measures(model.loaded, clip, made)
    line = {**_about(model, arm, clip, job), **found, **_cost(made, None, 0.0)}
    return {**line, "repeated": repeated(runs)} if model.repeats > 1 else line


def _about(model: Runner, arm: Arm, clip: int, job: Job) -> Line:
    """Return what shapes a run, and what it was made with."""
    return {
        "arm": arm.name,
        "clip": clip,
        "suite": job.suite.name,
        "prompt": model.prompt(clip),
        **({"seed": model.seed(clip)} if job.suite.own else {}),
        **({} if job.suite.embedded else {"tokens": tokens_of(model.adapter, model.family, model.call)}),
        **setting_of(job.suite, job.machine),
        **arm_setting(job.suite, arm),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "dit_accel": version("dit-accel"),
        "python": platform.python_version(),
        "device": processor() if job.suite.embedded else device_name(model.device),
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


def measures(suite: Suite, arm: str, clip: int, frames: Clip, reference: Clip, model: Runner) -> Line:
    """Return what is measured against the reference: PSNR, SSIM and the judge's score, and what the suite names.

    ``metrics`` holds values by name, ``by_frame`` those of single frames, ``skipped`` why a metric says nothing about
    this clip, and ``unavailable`` why it could not be measured on this machine.

    Raises:
        ConfigError: for frames that are not finite, with the arm and clip that made them.
    """
    held_out = suite.embedded and not suite.own
    try:
        sample = Sample(
            frames=frames, reference=reference, prompt=model.prompt(clip), trained_frames=_trained(suite, model),
            fps=EMBEDDED_FPS if suite.embedded else OTHER_FPS, held_out=(suite.model, clip) if held_out else None,
        )  # fmt: skip
    except ConfigError as error:
        raise ConfigError(f"clip {clip} of arm {arm!r}: {error}") from None
    found = scores(dict.fromkeys((*ALWAYS, *suite.metrics)), sample)
    values = found.values()
    line: dict[str, Any] = {name: values.pop(name) for name in ALWAYS}
    if held_out:
        line["score"] = model_score(suite.model, clip, frames)
    else:
        found.skipped["score"] = UNJUDGED if suite.embedded else f"{suite.model} has no judge of its own"
    if suite.metrics:
        by_frame = {name: one.by_frame for name, one in found.measured.items() if name in suite.metrics}
        line["metrics"] = values
        line["by_frame"] = {name: [round(x, DIGITS) for x in one] for name, one in by_frame.items() if one is not None}
    line |= {key: told for key in ("skipped", "unavailable") if (told := getattr(found, key))}
    return line


def _trained(suite: Suite, model: Runner) -> int | None:
    """Return the frames that a suite's model was trained on, None where that is not known or it makes pictures."""
    if suite.embedded:
        defaults = model_defaults(suite.model)
        return int(defaults["num_frames"]) if "num_frames" in defaults else None
    return model.family.trained_frames


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
