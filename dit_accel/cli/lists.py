"""`dit-accel methods` and `dit-accel models`: what is there to choose from."""

import dataclasses
import inspect
import re
import typing
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from ..adapters import installed
from ..adapters.adapter import Adapter, Family
from ..adapters.embedded import assets, embedded_names
from ..errors import ConfigError, did_you_mean, install
from ..estimate.sizes import rounded_frames, token_layout
from ..methods import registry as method_registry
from ..methods.config import MethodConfig, spell_type
from ..methods.verdicts import refused_by, spell_refusal
from .console import OUT, plain_table, print_json
from .method_options import first_line

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def methods(
    names: Annotated[
        list[str] | None, typer.Argument(help="Methods whose options are listed; default: all.", metavar="NAME")
    ] = None,
    options: Annotated[bool, typer.Option("--options", help="Every method's options with their defaults.")] = False,
    json: Json = False,
) -> None:
    """List the methods and what each does; with --options, or named, what can be set.

    \b
    Examples:
      dit-accel methods
      dit-accel methods radial sol
      dit-accel methods --options
      dit-accel methods --json
    """
    known = method_registry.methods()
    for name in names or ():
        if name not in known:
            raise ConfigError(f"there is no method {name!r}; {did_you_mean(name, known)}")
    listed = [_method_data(known[name]) for name in names or known]
    if json:
        print_json(listed)
        return
    (_print_options if options or names else _print_summaries)(listed)
    objects = sorted(name for handler in method_registry.handlers().values() for name in handler.objects)
    OUT.print(f"In Python, attach() also takes diffusers' own {', '.join(objects)}.", style="dim")


def _print_summaries(listed: list[dict[str, Any]]) -> None:
    table = plain_table("method", "what it does")
    for method in listed:
        table.add_row(f"--{method['name']}", method["summary"])
    OUT.print(table)
    OUT.print("\nWhich to attach: `dit-accel recommend`. What can be set: `dit-accel methods NAME`.", style="dim")


def _print_options(listed: list[dict[str, Any]]) -> None:
    for method in listed:
        OUT.print(f"[bold]--{method['name']}[/bold]  {method['summary']}", soft_wrap=False)
        table = plain_table("option", "default", "meaning")
        for option in method["options"]:
            default = "recipe" if option["default"] is None else _spell(option["default"])
            table.add_row(option["name"], default, option["meaning"])
        OUT.print(table)
        OUT.print()
    OUT.print(
        "Set one with --set METHOD.OPTION=VALUE, many with --config FILE. "
        "'recipe' means: what the model's family uses, see `dit-accel describe --options`.",
        style="dim",
    )


def models(json: Json = False) -> None:
    """List the models that are known by name, and which methods each family takes.

    Embedded models ship with the project: generate's --model takes their names.

    \b
    Examples:
      dit-accel models
      dit-accel models --json
    """
    refused = {adapter.name: refused_by(adapter) for adapter in installed.adapters().values()}
    rows = [
        _family_data(adapter, family, refused[adapter.name])
        for adapter in installed.adapters().values()
        for family in adapter.families
    ]
    if json:
        print_json(rows)
        return
    right = ("layers", "heads", "dim", "tokens")
    table = plain_table("model", "family", "layers", "heads", "dim", "default size", "tokens", right=right)
    for row in rows:
        size = f"{row['width']}x{row['height']}x{row['num_frames']}"
        sizes = [str(row[name]) for name in ("layers", "heads", "head_dim")]
        table.add_row(row["name"], row["adapter"], *sizes, size, f"{row['tokens']:,}")
    OUT.print(table)
    OUT.print()
    for name in embedded_names():
        call = ", ".join(f"{key} {value}" for key, value in assets().model_defaults(name).items() if value != "")
        OUT.print(f"embedded: --model {name}  ({call})", highlight=False)
    if not embedded_names():
        OUT.print(f"embedded: none are installed; {install('assets')} brings them", highlight=False)
    _print_verdicts(refused)


def _print_verdicts(verdicts: Mapping[str, Mapping[str, str]]) -> None:
    """Print what each family does not take, then every reason once."""
    reasons: dict[str, int] = {}
    table = plain_table("family", "takes all methods but")
    for adapter in installed.adapters().values():
        refused = verdicts[adapter.name] if adapter.transformers else {}
        table.add_row(adapter.name, (", ".join(refused) or "-") if adapter.transformers else "all: it is planned alone")
        for name, why in refused.items():
            text = f"{name} is {spell_refusal(why, adapter)}"
            reasons[text] = reasons.get(text, 0) + 1
    OUT.print()
    OUT.print(table)
    OUT.print()
    for reason, count in reasons.items():
        OUT.print(f"{reason} ({count} {'family' if count == 1 else 'families'})", markup=False, highlight=False)
    OUT.print("\nWhat one model takes, with its scheduler: `dit-accel describe --model MODEL`.", style="dim")


def _method_data(config_type: type[MethodConfig]) -> dict[str, Any]:
    meanings, hints = attribute_docs(config_type), typing.get_type_hints(config_type, include_extras=True)
    return {
        "name": config_type.name,
        "config": config_type.__name__,
        "summary": first_line(config_type),
        "options": [
            {
                "name": field.name,
                "type": spell_type(hints[field.name]).removesuffix(" or unset"),
                "default": field.default,
                "meaning": meanings.get(field.name, "").replace("``", ""),
            }
            for field in dataclasses.fields(config_type)
        ],
    }


def attribute_docs(documented: type) -> dict[str, str]:
    """Return attribute -> text of the ``Attributes:`` sections of a class and its bases, on one line, as written."""
    docs: dict[str, str] = {}
    for part in reversed(documented.__mro__):
        section = re.search(r"^Attributes:\n((?:[ ]+.*\n?|\n)*)", inspect.cleandoc(part.__doc__ or ""), re.MULTILINE)
        entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section.group(1), re.MULTILINE) if section else []
        docs |= {name: " ".join(meaning.split()) for name, meaning in entries}
    return docs


def _family_data(adapter: Adapter, family: Family, refused: Mapping[str, str]) -> dict[str, Any]:
    frames = rounded_frames(family, family.num_frames)
    layout = token_layout(family, height=family.height, width=family.width, num_frames=frames)
    attachable = bool(adapter.transformers)
    sizes = ("layers", "heads", "head_dim", "experts", "height", "width", "num_frames", "num_inference_steps")
    return {
        "name": family.name,
        "repo": family.repo,
        "adapter": adapter.name,
        **{name: getattr(family, name) for name in sizes},
        "tokens": layout.visual_tokens,
        "text_tokens": family.text_tokens,
        "embedded": family.name in embedded_names(),
        "attachable": attachable,
        "methods": [name for name in method_registry.methods() if attachable and name not in refused],
        "refused": dict(refused),
    }


def _spell(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
