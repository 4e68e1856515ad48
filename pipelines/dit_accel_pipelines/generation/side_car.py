"""The JSON side-car of a generated file: all that is needed to repeat the run, and what ran."""

import dataclasses
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import dit_accel

from .inputs import inputs_of
from .media import Frames
from .memory import peak_memory
from .options import RunOptions
from .pipeline_call import PICTURES
from .request import EMBEDDED, Request
from .sound import Sound
from .timing import Timings

LIBRARIES = ("dit-accel", "torch", "diffusers", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One generated video."""

    prompt: str  # what it shows
    frames: Frames  # uint8 [F, height, width, 3]
    timings: Timings  # how long it took
    report: dit_accel.Report | None  # the attachment's; None without methods
    sound: Sound | None = None  # what is heard with it
    # the frames before they were rounded, floats in [0, 1], where they are to be compared; else None
    pictures: np.ndarray | None = None


def repeating(request: Request) -> dict[str, Any]:
    """Return the options that repeat a request on any device, beside its methods: what ``--config`` reads as [run]."""
    run: dict[str, Any] = {"prompt": request.prompt, "model": EMBEDDED}
    for field in dataclasses.fields(RunOptions):
        value = getattr(request, field.name)
        if field.default == () and value:
            run[field.name] = [str(text) for text in value]
        elif field.name != "device" and field.default != () and value != field.default:
            run[field.name] = value
    return run


def side_car(
    request: Request, generation: Generation, output: Path, *, loading: float, command: Sequence[str]
) -> dict[str, Any]:
    """Return the content of a side-car as plain values."""
    timings = generation.timings
    frames, height, width = generation.frames.shape[:3]
    return {
        "output": str(output),
        "prompt": generation.prompt,
        **{field.name: getattr(request, field.name) for field in dataclasses.fields(RunOptions)},
        **{option: [str(file) for file in inputs_of(request) if file.option == option] for option in PICTURES},
        "model": request.model or EMBEDDED,
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": len(timings.steps),
        "fps": request.output_fps,
        "sound": generation.sound and generation.sound.to_dict(),
        "methods": {method.name: method.to_dict() for method in request.methods},
        "command": list(command),
        "versions": {**{name: version(name) for name in LIBRARIES}, "python": platform.python_version()},
        "seconds": {
            "loading": loading, "text": timings.text, "denoise": timings.denoise, "decode": timings.decode,
            "steps": timings.steps,
        },
        "peak_memory_bytes": peak_memory(),
        "report": generation.report.to_dict() if generation.report else None,
    }  # fmt: skip
