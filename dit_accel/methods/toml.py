"""Method configs as TOML, one table per method; and single values of the command line."""

import sys
from collections.abc import Iterable
from typing import Any

from ..errors import ConfigError
from .config import MethodConfig, from_dict
from .registry import method

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VERSION = 1


def to_toml(configs: Iterable[MethodConfig]) -> str:
    """Write configs as TOML, one table per method, with the format's version.

    Raises:
        ConfigError: for two configs of one method.
    """
    import tomli_w

    tables: dict[str, Any] = {"version": VERSION}
    for config in configs:
        if not isinstance(config, MethodConfig):
            raise ConfigError(f"{type(config).__name__} has no TOML table; give the object itself to attach")
        if config.name in tables:
            raise ConfigError(f"two {config.name} configs were given; TOML holds one of each method")
        tables[config.name] = config.to_dict()
    return tomli_w.dumps(tables)


def from_toml(text: str, source: str = "the method config") -> list[MethodConfig]:
    """Read configs back from TOML text; the inverse of `to_toml`.

    Args:
        text: the TOML, with or without a byte-order mark.
        source: what errors call it, such as the file's name.

    Raises:
        ConfigError: for text that is not TOML, another version, an unknown method or option, or a refused value.
    """
    try:
        tables = tomllib.loads(text.removeprefix("\ufeff"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not valid TOML: {error}") from None
    version = tables.pop("version", VERSION)
    if version != VERSION:
        raise ConfigError(
            f"{source} has version {version!r}, this release reads version {VERSION}; update dit-accel, or write the "
            "file for that version"
        )
    configs = []
    for name, values in tables.items():
        if not isinstance(values, dict):
            raise ConfigError(
                f"{source}: {name} = {values!r} stands outside a method's table; write, say, [radial] above it"
            )
        try:
            configs.append(from_dict(method(name), values))
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None
    return configs


def parse_value(text: str) -> Any:
    """Read one option value as TOML reads it; text that is not a TOML value is taken as a string.

    Raises:
        ConfigError: for more than one line, of which only the first would count.
    """
    if "\n" in text.strip():
        raise ConfigError(
            f"one value was expected, got several lines: {text!r}; give each option in a --set of its own"
        )
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
