"""Options shared by the commands that run a model: what to run, and where."""

from typing import Annotated

import typer

RUN = "Running"
Model = Annotated[
    str | None,
    typer.Option(
        help="A hub id, a folder, or an embedded model that `dit-accel models` lists; default: wan-tiny.",
        metavar="ID|FOLDER|NAME",
    ),
]
Pixels = Annotated[int | None, typer.Option(help="In pixels; default: the model's.", metavar="PIXELS")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; 1 switches guidance off.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float16; default: float32 on a CPU and for embedded models, else bfloat16.",
        rich_help_panel=RUN,
        metavar="DTYPE",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda, cuda:1, mps ...; default: the accelerator if there is one.",
        rich_help_panel=RUN,
        metavar="DEVICE",
    ),
]
Offload = Annotated[
    str,
    typer.Option(
        help="What waits in main memory: none, model, sequential or group.", rich_help_panel=RUN, metavar="HOW"
    ),
]
Backend = Annotated[str, typer.Option(help="Kernel backend of the methods.", rich_help_panel=RUN, metavar="NAME")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, notes or report.", rich_help_panel=RUN)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
