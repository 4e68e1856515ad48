"""Options by their flags' names, as a TOML table, a line of a prompt file and a grid have them."""

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import typer

from dit_accel.errors import ConfigError
from dit_accel.methods import registry
from dit_accel.methods.config import MethodConfig
from dit_accel.methods.toml import parse_value

from .options import with_option_fields


@dataclass(frozen=True, slots=True)
class Named:
    """What one table or line sets."""

    options: Mapping[str, Any]  # field of the options -> its value
    methods: Mapping[str, Mapping[str, Any] | bool]  # method -> its options, or whether it is attached

    def attached_to(self, methods: Sequence[MethodConfig]) -> tuple[MethodConfig, ...]:
        """Return methods, changed by what is set of them."""
        values = {method.name: method.to_dict() for method in methods}
        for name, options in self.methods.items():
            if options is False:
                values.pop(name, None)
            else:
                values[name] = {**values.get(name, {}), **(options if isinstance(options, Mapping) else {})}
        return tuple(registry.method(name)(**options) for name, options in values.items())


def read_named(cls: type[Any], values: Mapping[str, Any], where: str, *, known: Collection[str] = ()) -> Named:
    """Read options of a dataclass, and of methods as ``radial.decay_factor`` or ``radial``, by their flags' names.

    Args:
        cls: the options' dataclass; its command line reads the values.
        values: name -> value, a string or of its own kind, a list where an option may be repeated; None is left out.
        where: what errors call the place.
        known: the fields that may be set; all where it is empty.

    Raises:
        ConfigError: for a name that is no option, with the nearest, or a value that the option does not take.
    """
    command, params = _command(cls)
    options: dict[str, Any] = {}
    methods: dict[str, Any] = {}
    for key, value in values.items():
        param, (method, dot, option) = params.get(key.strip().replace("-", "_")), key.strip().partition(".")
        if value is None:
            continue
        if param is not None and (not known or param.name in known):
            options[param.name] = _value(command, param, value, where)
        elif dot and method in registry.methods():
            methods[method] = {**(methods.get(method) or {}), option: _plain(value)}
        elif not dot and key in registry.methods():
            methods[key] = _plain(value) is not False
        else:
            taken = [name for name, param in params.items() if param.name in (known or params)]
            near = get_close_matches(key.replace("-", "_"), [*taken, *registry.methods()], 1)
            meant = f"did you mean {near[0].replace('_', '-')!r}? " if near else ""
            raise ConfigError(f"{where} has no option {key!r}; {meant}dit-accel generate --help lists them")
    return Named(options, methods)


def _plain(value: Any) -> Any:
    """Return a value that a method takes: of a text what TOML reads; also ``.5``, which it does not."""
    if not isinstance(value, str):
        return value
    return parse_value(f"0{value}" if re.fullmatch(r"\.\d+", value) else value)


def _value(command: Any, param: Any, value: Any, where: str) -> Any:
    """Return an option's value as the command line reads it."""
    if param.param_type_name == "argument":
        return str(value)
    flag = _flag(param)
    if isinstance(value, dict):
        raise ConfigError(f"{where}: {flag} is one value, got a table; write {flag.lstrip('-')} = ...")
    if param.is_flag:
        if str(value).lower() not in ("true", "false"):
            raise ConfigError(f"{where}: {flag} is true or false, got {value!r}; write one of them")
        return str(value).lower() == "true"
    words = [f"{flag}={text}" for text in (value if isinstance(value, list) else [value])]
    try:
        return getattr(command.main(words, standalone_mode=False), param.name)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except Exception as error:
        if (text := getattr(error, "format_message", None)) is None:  # not Typer's own of usage
            raise
        reason = text().rpartition("': ")[2]
        raise ConfigError(f"{where}: {flag.lstrip('-')} = {value!r} is refused: {reason}") from None


def _flag(param: Any) -> str:
    return next((name for name in param.opts if name.startswith("--")), param.opts[0])


@functools.cache
def _command(cls: type[Any]) -> tuple[Any, Mapping[str, Any]]:
    """Return a command that gives its options, and its parameters by their fields' and their flags' names."""

    def take(options: Any) -> Any:
        return options

    take.__annotations__["options"] = cls
    single = typer.Typer(add_completion=False)
    single.command()(with_option_fields(take))
    command = typer.main.get_command(single)
    params = [(name, param) for param in command.params for name in (param.name, _flag(param).lstrip("-"))]
    return command, {str(name).replace("-", "_"): param for name, param in params}
