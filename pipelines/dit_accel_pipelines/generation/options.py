"""Options shared by the commands that run a model: what to run, and where."""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer

from dit_accel.errors import ConfigError

RUN = "Running"
_MODEL: dict[str, Any] = {
    "help": "A hub id, a folder, or an embedded model that `dit-accel models` lists; default: wan-tiny.",
    "metavar": "MODEL",
}
Model = Annotated[str | None, typer.Option("--model", "-m", **_MODEL)]
ModelBesideMetrics = Annotated[str | None, typer.Option("--model", **_MODEL)]
"""Of commands whose -m is a metric."""
Pixels = Annotated[int | None, typer.Option(help="In pixels; default: the model's.", metavar="PIXELS")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; 1 switches guidance off.")]
Frames = Annotated[int | None, typer.Option(help="Output frames; 1 makes an image.")]
Solver = Annotated[
    str | None,
    typer.Option(help="unipc, euler or dpm++ in place of the model's own.", metavar="NAME", rich_help_panel=RUN),
]
NegativePrompt = Annotated[str | None, typer.Option(help="What guidance should lead away from.", metavar="TEXT")]
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
Dense = Annotated[
    str | None,
    typer.Option(
        help="Dense attention: user (yours) or auto (the faster on a CPU).", rich_help_panel=RUN, metavar="HOW"
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, notes or report.", rich_help_panel=RUN)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def with_option_fields(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command whose first parameter is a dataclass of options as one that has an option for each field."""
    signature = inspect.signature(command, eval_str=True)
    taken, *others = signature.parameters.values()
    hints, fields = typing.get_type_hints(taken.annotation, include_extras=True), dataclasses.fields(taken.annotation)

    @functools.wraps(command)
    def run(**arguments: Any) -> Any:
        options = taken.annotation(**{field.name: arguments.pop(field.name) for field in fields})
        return command(options, **arguments)

    kind = inspect.Parameter.KEYWORD_ONLY
    options = [inspect.Parameter(one.name, kind, default=one.default, annotation=hints[one.name]) for one in fields]
    run.__signature__ = signature.replace(parameters=[*options, *others])  # type: ignore[attr-defined]
    return run


def require_one_document(json: bool, count: int) -> None:
    """Raise `ConfigError` if several processes would print JSON."""
    if json and count > 1:
        raise ConfigError(
            f"--json prints one document, and {count} processes would print as many; leave it out, and read what lies "
            "beside the outputs"
        )


def fields_of(target: type[Any], options: Any) -> dict[str, Any]:
    """Return the options of whose names a dataclass has fields."""
    return {one.name: getattr(options, one.name) for one in dataclasses.fields(target) if hasattr(options, one.name)}
