"""What a server or a modular pipeline attaches: a preset's name or a file of settings, as one short text."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigError
from ..files import read_text

if TYPE_CHECKING:  # a plugin that nobody asks for loads nothing
    from ..methods.config import MethodConfig
    from ..methods.presets import Level

VARIABLE = "DIT_ACCEL"
"""The environment variable that servers' plugins read."""


@dataclass(frozen=True, slots=True)
class ServerSetting:
    """What is attached."""

    methods: "tuple[MethodConfig, ...]" = ()  # the configs of a file; empty for a preset
    preset: "Level | Literal['none']" = "none"  # as `attach` takes it
    # what the file says of a run besides, such as its steps, which each request says for itself
    run: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether nothing is to be attached."""
        return not self.methods and self.preset == "none"


def requested(environ: Mapping[str, str] = os.environ) -> str:
    """Return the text of `VARIABLE`; empty where it is unset."""
    return environ.get(VARIABLE, "").strip()


def read_setting(text: str) -> ServerSetting:
    """Read a preset's name, such as ``balanced`` or ``none``, or the path of a TOML file that ends in ``.toml``."""
    from ..methods.presets import NAMES, NONE
    from ..methods.toml import from_toml, run_table

    if text in NAMES:
        level: Any = text
        return ServerSetting(preset=level)
    if not text.endswith(".toml"):
        raise ConfigError(f"{text!r} is no setting; give one of {', '.join(NAMES)}, or the path of a .toml file")
    try:
        read = read_text(Path(text).expanduser())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the settings {text} can't be read: {error}; give the path of a TOML file") from None
    methods = tuple(from_toml(read, text))
    if not methods:
        raise ConfigError(f"{text} names no method; write a table such as [easycache], or use the setting {NONE!r}")
    return ServerSetting(methods, run=tuple(run_table(read, text)))
