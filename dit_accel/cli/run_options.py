"""The options of a run that every command which plans or makes one has; it loads no torch."""

from typing import Annotated

import typer

Pixels = Annotated[int | None, typer.Option(help="In pixels; default: the model's.", metavar="PIXELS")]
Frames = Annotated[int | None, typer.Option(help="Output frames; 1 makes an image; default: the model's.")]
InferenceSteps = Annotated[int | None, typer.Option(help="Denoising steps; default: the model's.")]
