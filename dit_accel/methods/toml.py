"""Method configs as TOML, one table per method, with what a run may set besides; and single values of commands."""

import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import ConfigError, did_you_mean
from .config import MethodConfig
from .registry import method

VERSION = 1

RUN = "run"
"""Table of what a run may set besides its methods."""

RUN_KEYS: Mapping[str, Any] = {
    "num_inference_steps": int,
    "solver": str,
    "flow_shift": (int, float),
    "guidance_scale": (int, float),
}


TUNED = "tuned"
"""Table of how a setting was measured, where a search wrote it; `dit_accel.estimate.tuned` says what it holds."""


def to_toml(
    configs: Iterable[MethodConfig], run: Mapping[str, Any] | None = None, tuned: Mapping[str, Any] | None = None
) -> str:
    """Write configs as TOML, one table per method, with the format's version.

    ``run`` stands in it as `run_table` reads it, ``tuned`` as `tuned_table` does.
    """
    import tomli_w

    tables: dict[str, Any] = {"version": VERSION}
    tables |= {name: dict(table) for name, table in ((RUN, run), (TUNED, tuned)) if table}
    for config in configs:
        if not isinstance(config, MethodConfig):
            raise ConfigError(f"{type(config).__name__} has no TOML table; give the object itself to attach")
        if config.name in tables:
            raise ConfigError(f"two {config.name} configs were given; TOML holds one of each method")
        tables[config.name] = config.to_dict()
    return tomli_w.dumps(tables)


def from_toml(text: str, source: str = "the method config") -> list[MethodConfig]:
    """Read configs back from TOML text; the inverse of `to_toml`.

    ``source``: what errors call it, such as the file's name.

    Raises:
        ConfigError: for text that is not TOML, another version, an unknown method or option, or a refused value.
    """
    tables = _tables(text, source)
    for name in (RUN, TUNED):
        tables.pop(name, None)
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
            configs.append(method(name)(**values))
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None
    return configs


def run_table(text: str, source: str = "the method config", *, check: bool = True) -> dict[str, Any]:
    """Read what a run may set besides its methods: ``[run]`` with the keys of `RUN_KEYS`.

    ``check``: refuse other keys, and values of another kind; without, that is the caller's.
    """
    table = _table(text, source, RUN)
    for key, value in table.items() if check else ():
        if key not in RUN_KEYS:
            raise ConfigError(f"{source}: [{RUN}] has no {key!r}; {did_you_mean(key, RUN_KEYS)}")
        if isinstance(value, bool) or not isinstance(value, RUN_KEYS[key]):
            raise ConfigError(f"{source}: [{RUN}] has {key} = {value!r}, which is of the wrong kind")
    return table


def tuned_table(text: str, source: str = "the method config") -> dict[str, Any]:
    """Read how a setting was measured: ``[tuned]``, empty where there is none."""
    return _table(text, source, TUNED)


def _table(text: str, source: str, name: str) -> dict[str, Any]:
    table = _tables(text, source).get(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{source}: {name} = {table!r} is no table; write [{name}]")
    return table


def _tables(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text.removeprefix("\ufeff"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not valid TOML: {error}") from None


def parse_value(text: str) -> Any:
    """Read one option value as TOML reads it, or else as a string; raise `ConfigError` for more than one line."""
    if "\n" in text.strip():
        raise ConfigError(
            f"one value was expected, got several lines: {text!r}; give each option in a --set of its own"
        )
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
