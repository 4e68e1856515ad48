"""The registry of commands that installed packages add to `dit-accel` by entry point."""

from functools import cache
from importlib.metadata import entry_points
from typing import Any

from ..errors import ConfigError

COMMAND_GROUP = "dit_accel.commands"


@cache
def commands() -> dict[str, Any]:
    """Return the commands, or groups of commands (`typer.Typer`), that entry points of ``dit_accel.commands`` add."""
    added: dict[str, Any] = {}
    for entry in entry_points(group=COMMAND_GROUP):
        for name, command in entry.load().items():
            if name in added:
                raise ConfigError(f"the command {name!r} is registered twice, last by {entry.value}; uninstall one")
            added[name] = command
    return added
