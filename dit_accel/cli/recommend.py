"""`dit-accel recommend`: what to attach to a model at a size, without weights."""

from typing import Annotated

import typer

from ..adapters import installed
from ..estimate.recommend import recommend as recommendation
from .console import OUT, print_json
from .model_options import FamilyName, ModelName, Quantize, one_model
from .run_options import Frames, InferenceSteps, Pixels


def recommend(
    family: FamilyName = None,
    model: ModelName = None,
    height: Pixels = None,
    width: Pixels = None,
    num_frames: Frames = None,
    num_inference_steps: InferenceSteps = None,
    hardware: Annotated[
        str | None, typer.Option(help="A card, such as h100 or rtx-4090, or its memory, such as 24GB.", metavar="NAME")
    ] = None,
    quantize: Quantize = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List what could be attached to a model at a size: speed-up, loss, memory.

    Settings that `dit-accel tune pipeline` found for this model come first,
    then the presets and the dense run, the fastest first. Loads no weights.

    \b
    Examples:
      dit-accel recommend --family wan2.1-14b --height 720 --hardware 24GB
      dit-accel recommend --family wan2.1-14b --quantize int8-weights --hardware 24GB
      dit-accel recommend --model FOLDER --json
    """
    if family and not model:
        installed.family(family)
    advice = recommendation(
        one_model("recommend", family, model),
        height=height, width=width, num_frames=num_frames, num_inference_steps=num_inference_steps, hardware=hardware,
        quantize=quantize,
    )  # fmt: skip
    if json:
        print_json(advice.to_dict())
    else:
        OUT.print(advice)
