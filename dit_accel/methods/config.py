"""Method configs: their common base, their type checks, and one pair of functions between them and TOML."""

import dataclasses
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import ConfigError, did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TOML_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodConfig:
    """Base of every method's config: frozen, keyword-only, slotted, checked on creation, never written to.

    A field that a model's recipe may fill is annotated ``... | None`` and defaults to None.

    Raises:
        ConfigError: for a value of another type than the field's annotation.
    """

    name: ClassVar[str]
    """The method's name on the command line and in TOML, such as ``radial``."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            _check_type(f"{self.name}.{field.name}", getattr(self, field.name), hints[field.name])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set, as plain values: tuples become lists, None is left out."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items() if v is not None}


def from_dict(config_type: type[MethodConfig], values: Mapping[str, Any]) -> MethodConfig:
    """Build a config of ``config_type`` from plain values, as read from TOML or the command line.

    Raises:
        ConfigError: for an unknown key (naming the nearest known one) or a value that the config refuses.
    """
    known = [field.name for field in dataclasses.fields(config_type)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{config_type.name} has no option {key!r}; {did_you_mean(key, known)}")
    return config_type(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


def to_toml(configs: Iterable[MethodConfig]) -> str:
    """Write configs as TOML, one table a method, with the format's version."""
    import tomli_w

    tables: dict[str, Any] = {"version": TOML_VERSION}
    for config in configs:
        if config.name in tables:
            raise ConfigError(f"two {config.name} configs were given; TOML holds one of each method")
        tables[config.name] = config.to_dict()
    return tomli_w.dumps(tables)


def from_toml(text: str) -> list[MethodConfig]:
    """Read configs back from TOML text; the inverse of `to_toml`.

    Raises:
        ConfigError: for text that is no TOML, another version, an unknown method or option, or a refused value.
    """
    from .registry import method

    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the method config is no valid TOML: {error}") from None
    version = tables.pop("version", TOML_VERSION)
    if version != TOML_VERSION:
        raise ConfigError(f"the method config has version {version!r}, this release reads version {TOML_VERSION}")
    configs = []
    for name, values in tables.items():
        if not isinstance(values, dict):
            raise ConfigError(f"{name} = {values!r} stands outside a method's table; write [radial] above it, say")
        configs.append(from_dict(method(name), values))
    return configs


def parse_value(text: str) -> Any:
    """Read one option value as TOML reads it; text that is no TOML value is taken as a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _check_type(name: str, value: Any, hint: Any) -> None:
    if not _fits(value, hint):
        raise ConfigError(f"{name} must be {spell_type(hint)}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if origin is typing.Literal:
        return any(
            value is choice or (value == choice and type(value) is type(choice)) for choice in typing.get_args(hint)
        )
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is None or hint is type(None):
        return value is None
    return isinstance(value, hint)


def spell_type(hint: Any) -> str:
    """Put an annotation in words, as error texts and tables show it."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(spell_type(part) for part in typing.get_args(hint))
    if origin is typing.Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(hint))
    if origin is tuple:
        return f"a list of {spell_type(typing.get_args(hint)[0])}"
    words = {float: "a number", int: "an integer", bool: "true or false", str: "a string", type(None): "unset"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))
