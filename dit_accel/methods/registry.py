"""The registry of methods: handlers that installed packages give by entry point, found by name or by config."""

from collections.abc import Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from ..adapters.installed import describe_entry, load_entry
from ..errors import ConfigError, did_you_mean
from .base import Handler
from .config import MethodConfig

METHOD_GROUP = "dit_accel.methods"

_registered: dict[str, type[Handler]] = {}
"""What `register` was given in this process, by the method's name."""

Registered = TypeVar("Registered", bound=type[Handler])


@cache
def handlers() -> dict[str, type[Handler]]:
    """Return the handler type of every installed method by the method's name, in the order in which they run.

    An entry point of ``dit_accel.methods`` has the method's name and names a handler type.

    Raises:
        ConfigError: if two packages register one name or one config, or an entry point gives something else.
    """
    known: dict[str, type[Handler]] = {}
    for entry in entry_points(group=METHOD_GROUP):
        handler = _checked(load_entry(entry, "a handler type"), describe_entry(entry), entry.name)
        if entry.name in known or any(handler.config_type is other.config_type for other in known.values()):
            raise ConfigError(f"a method {entry.name!r} is registered twice, last by {entry.value}; uninstall one")
        known[entry.name] = handler
    known |= _registered
    return dict(sorted(known.items(), key=lambda item: (item[1].phase, item[0])))


def register(handler: Registered) -> Registered:
    """Make a method of a script or a notebook known to this process, without a package: a decorator of the handler.

    A method that was registered so before is replaced by one of its name, as where a notebook's cell runs again. A
    package names its handler by an entry point of ``dit_accel.methods`` instead.

    Raises:
        ConfigError: for what is no handler type with a config of its own, or the name of an installed method.
    """
    config = getattr(handler, "config_type", None)
    if (name := getattr(config, "name", None)) is None:
        raise ConfigError(
            f"register takes a handler type whose config_type is a config with a name, got {handler!r}; name the config"
        )
    _checked(handler, "register", name)
    for known, other in handlers().items():
        if known not in _registered and (known == name or other.config_type is config):
            raise ConfigError(f"a method {known!r} is installed already, got {handler.__name__}; give it another name")
    _registered[name] = handler
    handlers.cache_clear()
    return handler


def _checked(handler: Any, what: str, name: str) -> type[Handler]:
    """Return a handler type; raise `ConfigError` for anything else, or one whose config has another name."""
    if not (isinstance(handler, type) and issubclass(handler, Handler)):
        raise ConfigError(f"{what} must give a handler type, got {handler!r}; derive it from dit_accel.methods.Handler")
    config = getattr(handler, "config_type", None)
    if config is None or getattr(config, "name", None) != name:
        raise ConfigError(f"{what} gives {handler.__name__}, whose config_type must be a config with name = {name!r}")
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
