"""The options of `dit-accel eval vbench`, by panel."""

from pathlib import Path
from typing import Annotated, Any

import typer

VIDEOS, MAKING = "Videos", "Making videos"


def _one(panel: str | None, words: str, metavar: str | None = None, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=words, rich_help_panel=panel, metavar=metavar, **more)


Totals = Annotated[Path | None, _one(None, "JSON of all sixteen raw scores, to print their totals.", "SCORES.json")]
Name = Annotated[str | None, _one(None, "What result files begin with; default: the videos' folder.", "NAME")]
Device = Annotated[str | None, _one(None, "Default: the accelerator for --generate, cuda for --official.", "DEVICE")]

Videos = Annotated[Path | None, _one(VIDEOS, "Folder of videos {prompt}-{i}.mp4.", "DIR")]
_EACH = "May be repeated. Default: all that can be measured."
Dimensions = Annotated[list[str] | None, _one(VIDEOS, _EACH, None, "--dimension", "-d")]
FullInfo = Annotated[Path | None, _one(VIDEOS, "Official prompts; default: the vbench package's.", "JSON")]
Samples = Annotated[int | None, _one(VIDEOS, "Videos of each prompt; default: 5.", min=1)]
Subset = Annotated[int | None, _one(VIDEOS, "Only the first so many prompts of each dimension.", min=1)]
Filtered = Annotated[bool, _one(VIDEOS, "temporal_flickering's videos passed its filter.", None, "--filtered")]
Custom = Annotated[bool, _one(VIDEOS, "Any videos, of prompts of one's own.", None, "--custom")]
_OWN = "JSON {file name: prompt}; default: the files' names. With --generate: a prompt a line."
Prompts = Annotated[Path | None, _one(VIDEOS, _OWN, "FILE")]
_BY = "Measure by the vbench package itself, in this virtual environment, made if missing."
Official = Annotated[Path | None, _one(VIDEOS, _BY, "ENV")]
Folder = Annotated[Path | None, _one(VIDEOS, "The package's folder of weights; default: its own.", "DIR")]
Output = Annotated[Path, _one(VIDEOS, "Folder of the results.", "DIR", "--output", "-o")]

Generate = Annotated[bool, _one(MAKING, "Make the videos instead of measuring them.", None, "--generate")]
_WORDED = "VBench's prompts in other words, a line each, as the model is to get them; seeds 100000 i + j."
Augmented = Annotated[Path | None, _one(MAKING, _WORDED, "FILE")]
Model = Annotated[str | None, _one(MAKING, "Hub id, folder or embedded model.", "ID|FOLDER|NAME")]
Pixels = Annotated[int | None, _one(MAKING, "In pixels.", "PIXELS")]
Frames = Annotated[int | None, _one(MAKING, "Frames of each.")]
Steps = Annotated[int | None, _one(MAKING, "Denoising steps.")]
Guidance = Annotated[float | None, _one(MAKING, "Guidance scale.")]
Fps = Annotated[float | None, _one(MAKING, "Frames per second of the files; default: as generate.")]
Dtype = Annotated[str | None, _one(MAKING, "Of the model's weights.", "DTYPE")]
Offload = Annotated[str, _one(MAKING, "none, model, sequential or group.", "HOW")]
Seed = Annotated[int, _one(MAKING, "Of the first prompt's first video.")]
Shard = Annotated[str | None, _one(MAKING, "The i-th of n shares of the work, i from 0.", "i/n")]
