"""What a result line says of one run: how it compares with the converged one or is judged, what it cost, what ran."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch
from dit_accel_pipelines.generation.request import EMBEDDED_FPS, OTHER_FPS

from dit_accel import ConfigError
from dit_accel.adapters.embedded import assets

from ..metrics.metric import Clip, Sample
from ..metrics.registered import FLOOR, dynamics, scores
from ..protocol import PROTOCOL
from ..runs.clip_files import Encoder
from ..runs.counting import Counts, work, works
from ..runs.loaded import card_state, device_name, processor_name
from ..runs.model import ModelRun, SuiteModel
from ..runs.results import Line, frames_hash, keep_beside
from .arms import Arm
from .job import Job
from .reference import Reference

ALWAYS = ("psnr", "ssim")  # what every line of an arm that is held against a converged run holds by itself
DIGITS = 4  # digits behind the point of values by frame and by step


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One arm on one clip of a job, as it ran."""

    job: Job
    arm: Arm
    clip: int
    model: SuiteModel
    reference: Reference | None
    runs: Sequence[ModelRun]
    beside: Sequence[ModelRun] = ()


def line_of(sampled: Sampled) -> Line:
    """Return the line of one clip of one arm, held against the converged run or judged by itself.

    ``steps_in_time`` is how many dense steps take as long: by processor time on a CPU, or, of a timed one, by the
    seconds of its denoising loop beside those of the dense run right after it. Repeated ones tell the median's seconds.
    """
    job, reference = sampled.job, sampled.reference
    run = sorted(sampled.runs, key=lambda run: run.seconds)[len(sampled.runs) // 2]
    line = _about(sampled)
    if reference is None:
        assert job.judge is not None
        line |= {**job.judge.measures(sampled.model, sampled.clip, run), **_cost(run, None, 0.0)}
    else:
        share = sampled.model.own_share
        line |= {"reference_steps": reference.steps, "reference_agreement": reference.agreement}
        line |= _measured(sampled, run, reference)
        if run.encoder:
            line |= encoding_alone(run.encoder, reference.frames, line)
        if not sampled.arm.is_served:
            line |= works(run.counts, reference.step, run.attended, share)
            line |= {"forwards": run.counts.blocks / reference.step.blocks, **_cost(run, reference.step, share)}
        on_cpu = sampled.model.device.type == "cpu" and job.suite.timed is not False
        if on_cpu and reference.seconds and run.times:
            plain = not (sampled.arm.methods or sampled.arm.guider or sampled.arm.rival)
            steps = sampled.arm.num_inference_steps if plain else run.times.processor / reference.seconds
            line["steps_in_time"] = float(steps)
        if job.frames is not None:
            line |= keep_beside(job.frames, job.out.parent, line, run.frames, reference.frames)
    if len(sampled.runs) > 1:
        taken = [run.seconds for run in sampled.runs]
        low, middle, high = (round(float(value), DIGITS) for value in np.percentile(taken, [25, 50, 75]))
        every = [round(value, DIGITS) for value in taken]
        line["repeated"] = {"seconds": every, "median": middle, "quartiles": [low, high]}
    if sampled.beside:
        whole = sampled.arm.is_served  # a server's seconds are those of the whole call
        dense = float(np.median([run.times.total if whole and run.times else run.seconds for run in sampled.beside]))
        seconds = float(np.median([run.seconds for run in sampled.runs]))
        line |= {"seconds": seconds, "dense_seconds": dense, "threads": torch.get_num_threads()}
        line |= {"processor": processor_name(), "steps_in_time": sampled.arm.num_inference_steps * seconds / dense}
    if (len(sampled.runs) > 1 or sampled.beside) and (card := card_state(sampled.model.device)):
        line["card"] = card
    return line


def encoding_alone(encoder: Encoder, frames: Clip, line: Line) -> Line:
    """Return a line's metrics with how near its reference stays to itself once encoded, and by what."""
    encoded = np.divide(encoder(np.rint(255 * frames).astype(np.uint8)), 255, dtype=np.float32)
    floor = scores(ALWAYS[:1], Sample(frames=encoded, reference=frames)).values()["psnr"]
    return {"metrics": {**line.get("metrics", {}), FLOOR: floor}, "encoder": str(encoder)}


def _about(sampled: Sampled) -> Line:
    """Return what shapes a run, and what it was made with."""
    job, arm, clip, model = sampled.job, sampled.arm, sampled.clip, sampled.model
    embedded = job.suite.embedded
    return {
        "arm": arm.name, "clip": clip, "suite": job.suite.name, "prompt": model.prompt(clip),
        **({"seed": model.seed(clip)} if job.suite.own else {}), **({} if embedded else {"tokens": model.tokens}),
        **job.setting, **job.arm_setting(arm), "torch": torch.__version__, "diffusers": version("diffusers"),
        "dit_accel": version("dit-accel"), "python": platform.python_version(),
        "device": processor_name() if embedded else device_name(model.device), "protocol": PROTOCOL,
    }  # fmt: skip


def _cost(run: ModelRun, dense_step: Counts | None, share: float) -> Line:
    """Return what a run took, as far as it is known: by stage, by step and in memory, beside whatever else ran."""
    line: Line = {"attended": run.attended}
    if run.times is not None:
        line["times"] = run.times.to_dict()
    if run.by_step and dense_step is not None:
        line["step_work"] = [round(work(counts, dense_step, part, share), DIGITS) for counts, part in run.by_step]
    if run.density:
        line["density"] = [[None if part is None else round(part, DIGITS) for part in step] for step in run.density]
    if run.memory is not None:
        line["peak_memory_bytes"] = dict(run.memory)
    return line


def _measured(sampled: Sampled, run: ModelRun, reference: Reference) -> Line:
    """Return PSNR, SSIM, the judge's score and what the suite names, and hashes of both clips."""
    suite, clip, model = sampled.job.suite, sampled.clip, sampled.model
    held_out, trained = suite.embedded and not suite.own, model.family.trained_frames if not suite.embedded else None
    if suite.embedded and (frames := assets().model_defaults(suite.model).get("num_frames")) is not None:
        trained = int(frames)
    # a reference of the model's own steps is kept in float16: what equals it is to equal it
    made_frames = run.frames.astype(np.float16).astype(np.float32) if suite.reference_steps else run.frames
    try:
        sample = Sample(
            frames=made_frames, reference=reference.frames, prompt=model.prompt(clip), trained_frames=trained,
            fps=EMBEDDED_FPS if suite.embedded else OTHER_FPS,
        )  # fmt: skip
    except ConfigError as error:
        raise ConfigError(f"clip {clip} of arm {sampled.arm.name!r}: {error}") from None
    unjudged = "the judge knows what held-out prompts ask for, and these are not among them"
    unjudged = unjudged if suite.embedded else f"{suite.model} has no judge of its own"
    line = measured_line(sample, suite.metrics, skipped={} if held_out else {"score": unjudged})
    if held_out:
        line["score"] = assets().model_score(suite.model, clip, run.frames)
    return line | {"frames_hash": frames_hash(run.frames), "reference_hash": frames_hash(reference.frames)}


def measured_line(sample: Sample, metrics: Sequence[str], skipped: Mapping[str, str] | None = None) -> Line:
    """Return what a line says of a clip held against its reference: values, by frame, and why some are missing."""
    results = scores(dict.fromkeys((*ALWAYS, *metrics)), sample)
    results.skipped.update(skipped or {})
    values = results.values()
    line: Line = {name: values.pop(name) for name in ALWAYS}
    if metrics:
        by_frame = {name: result.by_frame for name, result in results.measured.items() if name in metrics}
        line["metrics"] = values
        line["by_frame"] = {name: [round(x, DIGITS) for x in row] for name, row in by_frame.items() if row is not None}
    line |= {"dynamics": moved} if (moved := dynamics(sample)) else {}
    return line | {key: why for key in ("skipped", "unavailable") if (why := getattr(results, key))}
