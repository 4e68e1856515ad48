"""The registry of methods: handlers that installed packages give by entry point, found by name or by config."""

from collections.abc import Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ..errors import ConfigError, did_you_mean
from .base import Handler
from .config import MethodConfig

METHOD_GROUP = "dit_accel.methods"


@cache
def handlers() -> dict[str, type[Handler]]:
    """Return the handler type of every installed method by the method's name, in the order in which they run.

    An entry point of ``dit_accel.methods`` has the method's name and names a handler type.

    Raises:
        ConfigError: if two packages register one name or one config, or an entry point gives something else.
    """
    known: dict[str, type[Handler]] = {}
    for entry in entry_points(group=METHOD_GROUP):
        handler = _load(entry)
        if entry.name in known or any(handler.config_type is other.config_type for other in known.values()):
            raise ConfigError(f"a method {entry.name!r} is registered twice, last by {entry.value}; uninstall one")
        known[entry.name] = handler
    return dict(sorted(known.items(), key=lambda item: (item[1].phase, item[0])))


def _load(entry: EntryPoint) -> type[Handler]:
    """Return the handler type that an entry point gives."""
    what = f"the entry point {entry.name} = {entry.value!r} of {METHOD_GROUP}"
    try:
        handler = entry.load()
    except (AttributeError, ModuleNotFoundError) as error:
        raise ConfigError(
            f"{what} can't be loaded: {error}; name a handler type in pyproject.toml and install it again"
        ) from error
    if not (isinstance(handler, type) and issubclass(handler, Handler)):
        raise ConfigError(f"{what} must give a handler type, got {handler!r}; derive it from dit_accel.methods.Handler")
    if getattr(handler, "config_type", None) is None or handler.config_type.name != entry.name:
        raise ConfigError(
            f"{what} gives {handler.__name__}, whose config_type must be a config with name = {entry.name!r}"
        )
    return handler


def methods() -> dict[str, type[MethodConfig]]:
    """Return the config type of every method by its name, but for those that objects of other libraries ask for."""
    return {name: handler.config_type for name, handler in handlers().items() if not handler.objects}


def method(name: str) -> type[MethodConfig]:
    """Return the config type of one method; raise `ConfigError` for an unknown name, with the nearest known one."""
    known = methods()
    if name not in known:
        raise ConfigError(f"no method is called {name!r}; {did_you_mean(name, known)}")
    return known[name]


def handler_of(config: Any) -> type[Handler]:
    """Return the handler type of a config or an object that asks for a method; refuse others, with what was meant."""
    for handler in handlers().values():
        if handler.config_for(config) is not None:
            return handler
    known = [config_type.__name__ for config_type in methods().values()]
    objects = [name for handler in handlers().values() for name in handler.objects]
    hint = f"known: {', '.join(sorted(known))}; of diffusers: {', '.join(sorted(objects))}"
    if isinstance(config, type) and issubclass(config, MethodConfig):
        hint = f"give an instance of it, {config.__name__}()"
    elif isinstance(config, Sequence) and not isinstance(config, str):
        hint = "give the configs one by one, attach(pipe, *configs)"
    elif isinstance(config, MethodConfig):
        hint = f"{type(config).__name__} is registered by no installed package's entry point of {METHOD_GROUP}"
    raise ConfigError(f"attach takes method configs, got {config!r}; {hint}")
