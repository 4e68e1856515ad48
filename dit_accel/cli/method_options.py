"""Method switches, --config and --set, shared by every command and made into a list of method configs.

A command asks for them with one parameter annotated `MethodList`, and for a preset with one annotated `Preset`. The
switches come from the registry, so a new method needs no edit here. Later settings win: the config file's tables, then
the switches, then each --set in order. A --set for a method that is not switched on switches it on. A command that
compares asks with `SettingList`: each --config is a setting then, and the switches with --set are one more.
"""

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, did_you_mean
from ..files import read_text
from .console import note

if TYPE_CHECKING:
    from ..methods.config import MethodConfig

    MethodList = Annotated[list[MethodConfig], "from the method switches"]
else:  # the methods load torch, and a list of commands need not wait for it
    MethodList = Annotated[list, "from the method switches"]
"""Annotation of the parameter through which a command receives its method configs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedSetting:
    """Methods that are attached together."""

    name: str  # the config file's, or the methods that were switched on, with what was set of them
    methods: "tuple[MethodConfig, ...]"
    run: Mapping[str, Any]  # what the config file says of the run besides


SettingList = Annotated[list[NamedSetting], "from the method switches and each config"]
"""Annotation of the parameter through which a command receives settings to compare."""

RunTable = Annotated[dict, "from the config's [run] table"]
"""Annotation of the parameter through which a command receives what the config file says of the run."""

PANEL = "Methods (dit-accel methods NAME: what each does, and its options)"

Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="careful, balanced, fast, few-steps or none: methods for the model; named ones win.",
        metavar="LEVEL",
        rich_help_panel=PANEL,
    ),
]
"""Annotation of a command's parameter for a preset; `dit_accel.methods.presets.choices` takes and checks its value."""

CONFIG_HELP = "TOML file with one table per method, such as \\[radial]; \\[run] may set what generate has options for."
SET_HELP = "One option of a method, such as radial.decay_factor=0.5; may be repeated; switches the method on."


def first_line(documented: object) -> str:
    """Return the first line of a docstring, or an empty string."""
    return (inspect.getdoc(documented) or "").partition("\n")[0]


def brief(documented: object) -> str:
    """Cut a docstring's first line at its first sign, without what stands in brackets."""
    return re.split(r"[;:,.](?= |$)", re.sub(r" \([^)]*\)", "", first_line(documented)))[0]


def with_method_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``command`` with its `MethodList` parameter replaced by method options; unchanged if it has none."""
    signature = inspect.signature(command, eval_str=True)
    kinds = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    place = next((name for name, kind in kinds.items() if kind in (MethodList, SettingList)), None)
    if place is None:
        return command
    several = kinds[place] is SettingList
    asking = [name for name, kind in kinds.items() if kind is RunTable]
    from ..methods import registry

    names = list(registry.methods())

    @functools.wraps(command)
    def run(**arguments: Any) -> Any:
        switched = [name for name in names if arguments.pop(name)]
        config, settings = arguments.pop("method_config"), arguments.pop("method_set") or ()
        if several:
            return command(**arguments, **{place: _settings(switched, config or (), settings)})
        methods, table = select_methods(switched, config, settings), _run_table(config, check=False)
        if table and not asking:
            note(f"the [run] table of {config} is for generate, and is left out here")
        return command(**arguments, **{place: methods}, **dict.fromkeys(asking, table))

    parameters = [parameter for name, parameter in signature.parameters.items() if name not in (place, *asking)]
    run.__signature__ = signature.replace(parameters=[*parameters, *_parameters(names, several)])  # type: ignore[attr-defined]
    return run


def _run_table(config: Path | None, *, check: bool = True) -> dict[str, Any]:
    """Read the run's options in a config file; which there are is for the command to say."""
    from ..methods.toml import run_table

    return dict(run_table(_text(config), f"--config {config}", check=check)) if config else {}


def select_methods(switched: Sequence[str], config: Path | None, settings: Sequence[str]) -> "list[MethodConfig]":
    """Turn switches, a config file and ``method.option=value`` settings into configs; `ConfigError` for wrong ones."""
    from ..methods import registry
    from ..methods.toml import from_toml

    values: dict[str, dict[str, Any]] = {}
    for method in from_toml(_text(config), f"--config {config}") if config else []:
        values[method.name] = method.to_dict()
    for name in switched:
        values.setdefault(name, {})
    for setting in settings:
        name, option, value = _parse_setting(setting)
        values.setdefault(name, {})[option] = value
    return [registry.method(name)(**options) for name, options in values.items()]


def _settings(switched: Sequence[str], configs: Sequence[Path], settings: Sequence[str]) -> list[NamedSetting]:
    """Return a setting of each config file, then one of the switches and what was set, if there are any."""
    named = [
        NamedSetting(name=path.stem, methods=tuple(select_methods((), path, ())), run=_run_table(path))
        for path in configs
    ]
    methods = select_methods(switched, None, settings)
    if methods:
        options = [setting.strip().partition(".") for setting in settings]
        parts = [
            " ".join([method.name, *(rest for name, _, rest in options if name == method.name)]) for method in methods
        ]
        named.append(NamedSetting(name=" + ".join(parts), methods=tuple(methods), run={}))
    return named


def _text(path: Path) -> str:
    """Return a config file's TOML, or that of the JSON side-car of an output."""
    try:
        text = read_text(path, "utf-8-sig")  # editors on Windows begin a file with a byte-order mark
        return _side_car_as_toml(text, path) if path.suffix == ".json" else text
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--config {path} can't be read ({reason}); give a TOML file") from None


def _side_car_as_toml(text: str, path: Path) -> str:
    import tomli_w

    from ..methods.toml import RUN

    try:
        record = json.loads(text)
        return tomli_w.dumps({RUN: record["run"], **record["methods"]})
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"--config {path} is no side-car that says how to repeat its output; give a TOML file, or FILE.json that "
            "this release of generate wrote"
        ) from None


def _parse_setting(setting: str) -> tuple[str, str, Any]:
    from ..methods import registry
    from ..methods.toml import parse_value

    if len(setting.splitlines()) > 1:
        raise ConfigError(f"--set {setting!r} has more than one line; give one --set for each option")
    key, equals, value = setting.partition("=")
    name, dot, option = key.strip().partition(".")
    if not (equals and dot and name and option):
        raise ConfigError(f"--set {setting!r} is not METHOD.OPTION=VALUE; write, say, --set radial.decay_factor=0.5")
    known = registry.methods()
    if name not in known:
        raise ConfigError(f"--set {setting!r} names no method; {did_you_mean(name, known)}")
    return name, option, parse_value(value.strip())


def _parameters(names: Sequence[str], several: bool = False) -> list[inspect.Parameter]:
    from ..methods import registry

    def option(name: str, kind: Any, default: Any, flag: str, **info: Any) -> inspect.Parameter:
        hint = Annotated[kind, typer.Option(flag, **info)]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)

    methods = registry.methods()
    config: Any = list[Path] | None if several else Path | None
    more = " A setting of its own; may be repeated." if several else ""
    settings = {"rich_help_panel": PANEL}
    return [
        option("method_config", config, None, "--config", help=CONFIG_HELP + more, metavar="FILE", **settings),
        option("method_set", list[str] | None, None, "--set", help=SET_HELP, metavar="NAME.OPTION=VALUE", **settings),
        *(
            option(name, bool, False, f"--{name.replace('_', '-')}", help=brief(methods[name]), rich_help_panel=PANEL)
            for name in names
        ),
    ]
