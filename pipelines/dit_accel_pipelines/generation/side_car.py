"""The JSON side-car of a generated file: all that is needed to repeat the run, and what ran."""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .generation import Generation
from .memory import peak_memory
from .request import EMBEDDED, Request

LIBRARIES = ("dit-accel", "torch", "diffusers", "transformers")


def side_car(
    request: Request, made: Generation, output: Path, *, loading: float, command: Sequence[str]
) -> dict[str, Any]:
    """Return the content of a side-car as plain values.

    Args:
        request: the settled request, with what the pipeline chose where nothing was asked for.
        made: the generation.
        output: the file beside which the side-car lies.
        loading: seconds that loading the pipeline took.
        command: the command line.
    """
    timings = made.timings
    frames, height, width = made.frames.shape[:3]
    return {
        "output": str(output),
        "prompt": made.prompt,
        "negative_prompt": request.negative_prompt,
        "image": str(request.image) if request.image else None,
        "video": str(request.video) if request.video else None,
        "model": request.model or EMBEDDED,
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": len(timings.steps),
        "solver": request.solver,
        "flow_shift": request.flow_shift,
        "guidance_scale": request.guidance_scale,
        "seed": request.seed,
        "dtype": request.dtype,
        "device": request.device,
        "offload": request.offload,
        "compile": request.compile,
        "fps": request.output_fps,
        "scale": request.scale,
        "lora": request.lora,
        "methods": {method.name: method.to_dict() for method in request.methods},
        "backend": request.backend,
        "command": list(command),
        "versions": {**{name: version(name) for name in LIBRARIES}, "python": platform.python_version()},
        "seconds": {
            "loading": loading, "text": timings.text, "denoise": timings.denoise, "decode": timings.decode,
            "steps": timings.steps,
        },
        "peak_memory_bytes": peak_memory(),
        "report": made.report.to_dict() if made.report else None,
    }  # fmt: skip
