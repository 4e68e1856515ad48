"""Generates videos or images with methods attached, and writes each with all that is needed to repeat it."""

import contextlib
import dataclasses
import inspect
import json
import platform
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import dit_accel
from dit_accel.cli.console import note
from dit_accel.errors import ConfigError
from dit_accel.methods.config import MethodConfig

from .loading import compile_blocks, load_pipeline, quiet_diffusers
from .media import Frames, to_uint8, upscale, write_media, written_whole
from .progress import Stages
from .request import EMBEDDED, Request, settle

LIBRARIES = ("dit-accel", "torch", "diffusers", "transformers")


@dataclass(slots=True)
class Timings:
    """Seconds that the stages of one generation took.

    Attributes:
        steps: seconds of each denoising step; the first includes encoding the prompt.
        denoise: all steps.
        decode: from the last step to the frames.
    """

    steps: list[float] = field(default_factory=list)
    denoise: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One generated video: frames uint8 [F, height, width, 3], how long it took, and the attachment's report."""

    prompt: str
    frames: Frames
    timings: Timings
    report: dit_accel.Report | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What `generate` wrote: the side-car's content, and the attachment's report (None without methods)."""

    record: dict[str, Any]
    report: dit_accel.Report | None


def generate(request: Request, *, stages: Stages | None = None, command: Sequence[str] = ()) -> list[Written]:
    """Generate and write what a request asks for, one file and one JSON side-car a prompt, each whole or not at all.

    Args:
        request: what to generate.
        stages: progress bars; None shows none.
        command: the command line, for the side-car.

    Returns:
        What was written, in the order of the prompts.

    Raises:
        DitAccelError: for a request that can't be met; nothing is written then.
    """
    request, _, notes = settle(request)
    for text in notes:
        note(text)
    stages = stages or Stages(quiet=True)
    stages.stage("loading")
    started = time.perf_counter()
    pipe = load_pipeline(request)
    loading = time.perf_counter() - started
    request = _resolved(request, pipe)
    written = []
    with attached(pipe, request.methods, request.backend) as attachment:
        if request.compile:
            compile_blocks(pipe)
        for prompt, output in zip(request.prompts, request.outputs(), strict=True):
            made = run(pipe, prompt, request, attachment=attachment, stages=stages)
            record = _record(request, made, output, loading, command)
            _write(output, made.frames, record, request)
            written.append(Written(record=record, report=made.report))
    return written


@contextlib.contextmanager
def attached(pipe: Any, methods: Sequence[MethodConfig], backend: str) -> Iterator[Any]:
    """Attach methods for the block; yields the attachment, or None where no method is asked for."""
    if not methods:
        yield None
        return
    with dit_accel.attach(pipe, *methods, backend=backend) as attachment:
        yield attachment


def run(
    pipe: Any, prompt: str, request: Request, *, attachment: Any = None, stages: Stages | None = None
) -> Generation:
    """Run a loaded pipeline on one prompt of a (settled) request.

    Raises:
        ConfigError: if the pipeline takes not what the request asks for.
    """
    import torch

    stages = stages or Stages(quiet=True)
    timings = Timings()
    steps = request.num_inference_steps or _default(pipe, "num_inference_steps")
    stages.stage("denoising", steps)
    clock = [time.perf_counter()]

    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        now = time.perf_counter()
        timings.steps.append(now - clock[-1])
        clock.append(now)
        stages.advance()
        if len(timings.steps) == steps:
            stages.stage("decoding")
        return tensors

    arguments = _call_arguments(pipe, prompt, request)
    generator = torch.Generator("cpu").manual_seed(request.seed)
    with quiet_diffusers():
        output = pipe(**arguments, generator=generator, output_type="np", callback_on_step_end=after_step)
    timings.denoise, timings.decode = clock[-1] - clock[0], time.perf_counter() - clock[-1]
    return Generation(
        prompt=prompt,
        frames=_frames(output),
        timings=timings,
        report=attachment.report() if attachment is not None else None,
    )


def _call_arguments(pipe: Any, prompt: str, request: Request) -> dict[str, Any]:
    asked = {
        "prompt": prompt,
        "negative_prompt": request.negative_prompt,
        "height": request.height,
        "width": request.width,
        "num_frames": request.num_frames,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
    }
    takes = inspect.signature(type(pipe).__call__).parameters
    name = type(pipe).__name__
    if "image" in takes:
        raise ConfigError(f"generate makes videos from text, and {name} starts from an image; call it from Python")
    given = {key: value for key, value in asked.items() if value is not None}
    for key, value in given.items():
        if key not in takes:
            raise ConfigError(f"{name} takes no {key}, got {value!r}; leave it out")
    return given


def _resolved(request: Request, pipe: Any) -> Request:
    """Return the request with what the pipeline chose where nothing was asked, for the side-car."""
    guidance = request.guidance_scale
    if guidance is None:
        guidance = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default
    chosen = {"guidance_scale": guidance, "dtype": str(pipe.transformer.dtype).removeprefix("torch.")}
    return dataclasses.replace(request, device=str(pipe._execution_device), **chosen)


def _default(pipe: Any, name: str) -> int:
    return int(inspect.signature(type(pipe).__call__).parameters[name].default)


def _frames(output: Any) -> Frames:
    """Return the frames of a pipeline's output, uint8 [F, height, width, 3]; an image is one frame."""
    video = output.frames[0] if hasattr(output, "frames") else output.images[:1]
    return to_uint8(np.asarray(video))


def _write(output: Path, frames: Frames, record: dict[str, Any], request: Request) -> None:
    side_car = sidecar_path(output)
    with written_whole(output) as media, written_whole(side_car) as text:
        write_media(media, upscale(frames, request.scale), fps=request.output_fps)
        text.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def sidecar_path(output: Path) -> Path:
    """Return the path of an output's JSON side-car."""
    return output.with_name(output.name + ".json")


def _record(request: Request, made: Generation, output: Path, loading: float, command: Sequence[str]) -> dict[str, Any]:
    seconds = {
        "loading": loading,
        "denoise": made.timings.denoise,
        "decode": made.timings.decode,
        "steps": made.timings.steps,
    }
    frames, height, width = made.frames.shape[:3]
    return {
        "output": str(output),
        "prompt": made.prompt,
        "negative_prompt": request.negative_prompt,
        "model": request.model or EMBEDDED,
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": len(made.timings.steps),
        "guidance_scale": request.guidance_scale,
        "seed": request.seed,
        "dtype": request.dtype,
        "device": request.device,
        "offload": request.offload,
        "compile": request.compile,
        "fps": request.output_fps,
        "scale": request.scale,
        "methods": {method.name: method.to_dict() for method in request.methods},
        "backend": request.backend,
        "command": list(command),
        "versions": {**{name: version(name) for name in LIBRARIES}, "python": platform.python_version()},
        "seconds": seconds,
        "peak_memory_bytes": _peak_memory(),
        "report": made.report.to_dict() if made.report else None,
    }


def _peak_memory() -> dict[str, int]:
    import torch

    unit = 1 if platform.system() == "Darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak
