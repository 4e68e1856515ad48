"""The options by which `plan` and `recommend` name a model without its weights."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from ..adapters import installed
from ..adapters.adapter import Adapter, Family
from ..adapters.model_files import model_source, read_model_files
from ..errors import ConfigError

FamilyName = Annotated[
    str | None, typer.Option("--family", help="A model family that `dit-accel models` lists.", metavar="NAME")
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A hub id, a folder or an embedded model; only its configs are read.",
        metavar="ID|FOLDER|NAME",
    ),
]

Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize", help="Linear layers in fewer bits, as generate: fp8, int8, fp8-weights, int8-weights, int4, nf4.",
        metavar="KIND",
    ),
]  # fmt: skip


def one_model(command: str, family: str | None, model: str | None) -> str:
    """Return the family or the model that a command got; raise `ConfigError` if it got both or neither."""
    if family and model:
        raise ConfigError(f"{command} takes --family or --model, got both ({family} and {model}); leave one out")
    if not (family or model):
        raise ConfigError(
            f"{command} needs a model, got none; give --family (`dit-accel models` lists them) or --model"
        )
    return family or model or ""


def named_model(command: str, family: str | None, model: str | None) -> tuple[Adapter, Family, Mapping[str, Any]]:
    """Return a command's model as its adapter, its sizes and its transformer's config."""
    name = one_model(command, family, model)
    if model:
        files = read_model_files(model_source(model))
        return *files.identify(), files.transformer
    adapter, sizes = installed.described(name)
    return adapter, sizes, sizes.config
