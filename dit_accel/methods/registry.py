"""The registry of methods: config types by name."""

from ..errors import ConfigError, did_you_mean
from .config import MethodConfig


def methods() -> dict[str, type[MethodConfig]]:
    """Return the config type of every method by its name."""
    from . import METHODS

    return {config_type.name: config_type for config_type in METHODS}


def method(name: str) -> type[MethodConfig]:
    """Return the config type of one method.

    Raises:
        ConfigError: for an unknown name, with the nearest known one.
    """
    known = methods()
    if name not in known:
        raise ConfigError(f"no method is called {name!r}; {did_you_mean(name, known)}")
    return known[name]
