"""The registry of adapters: those that installed packages give by entry point, and the model families they describe."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ..errors import ConfigError, UnsupportedModel, did_you_mean
from .adapter import Adapter, Family

ADAPTER_GROUP = "dit_accel.adapters"
REASON_GROUP = "dit_accel.not_supported"

_registered: dict[str, Adapter] = {}
"""What `register` was given in this process, by name."""


@cache
def adapters() -> dict[str, Adapter]:
    """Return every installed adapter by name; an entry point of ``dit_accel.adapters`` names a tuple of them.

    Raises:
        ConfigError: if two packages register the same adapter name or the same transformer class, or an entry point
            gives something else.
    """
    by_name: dict[str, Adapter] = {}
    classes: dict[str, str] = {}
    for entry in entry_points(group=ADAPTER_GROUP):
        for adapter in _adapters(entry):
            if adapter.name in by_name:
                raise ConfigError(f"adapter {adapter.name!r} is registered twice, last by {entry.value}; uninstall one")
            for name in adapter.transformers:
                if name in classes:
                    raise ConfigError(
                        f"{name} is claimed by the adapters {classes[name]!r} and {adapter.name!r}; uninstall one"
                    )
                classes[name] = adapter.name
            by_name[adapter.name] = adapter
    unregistered = {name: adapter for name, adapter in by_name.items() if name not in _registered}
    return unregistered | _registered


def register(adapter: Adapter, *, override: bool = False) -> Adapter:
    """Make an adapter of a script or a notebook known to this process, without a package, and return it.

    One that was registered so before under its name is replaced. A package names its adapters by an entry point of
    ``dit_accel.adapters`` instead.

    ``override``: it may stand in the place of installed ones of its name or its transformer classes.

    Raises:
        ConfigError: for what is no adapter, or a name or class that is taken, without ``override``.
    """
    if not isinstance(adapter, Adapter):
        raise ConfigError(f"register takes an Adapter, got {adapter!r}; make one of it")
    for name, other in adapters().items():
        taken = [name for name in adapter.transformers if name in other.transformers]
        if (name != adapter.name and not taken) or name in _registered or override:
            continue
        raise ConfigError(
            f"{', '.join(taken) or name} is what the adapter {name!r} covers, which is installed, got another, "
            f"{adapter.name!r}; give override=True to put it in the place of that one"
        )
    _registered[adapter.name] = adapter
    adapters.cache_clear()
    return adapter


def _adapters(entry: EntryPoint) -> Sequence[Adapter]:
    listed, entry_point = load_entry(entry, "a tuple of adapters"), describe_entry(entry)
    if not isinstance(listed, (tuple, list)) or not all(isinstance(adapter, Adapter) for adapter in listed):
        raise ConfigError(
            f"{entry_point} must give adapters, got {type(listed).__name__}; name a tuple, ADAPTERS = (MY_ADAPTER,)"
        )
    return listed


def load_entry(entry: EntryPoint, what: str) -> Any:
    """Return the object that an entry point names; ``what`` should have been named, if it can't be loaded."""
    try:
        return entry.load()
    except (AttributeError, ModuleNotFoundError) as error:
        raise ConfigError(
            f"{describe_entry(entry)} can't be loaded: {error}; name {what} in pyproject.toml and install it again"
        ) from error


def describe_entry(entry: EntryPoint) -> str:
    """Spell an entry point for errors."""
    return f"the entry point {entry.name} = {entry.value!r} of {entry.group}"


@cache
def not_supported() -> dict[str, str]:
    """Return why classes of models have no adapter, as entry points of ``dit_accel.not_supported`` say."""
    reasons: dict[str, str] = {}
    for entry in entry_points(group=REASON_GROUP):
        added, entry_point = load_entry(entry, "a dict of reasons"), describe_entry(entry)
        if not isinstance(added, Mapping) or not all(isinstance(text, str) for pair in added.items() for text in pair):
            raise ConfigError(
                f"{entry_point} must give reasons, got {type(added).__name__}; name a dict, class name -> why not"
            )
        reasons |= added
    return reasons


def why_no_adapter(class_names: Iterable[str]) -> str:
    """Return in words why no adapter covers any of these classes: the reason if one is known, else where to look."""
    known = [f"{name} is not supported: {not_supported()[name]}" for name in class_names if name in not_supported()]
    return known[0] if known else "`dit-accel models` lists those that are covered"


def adapter_for(class_name: str) -> Adapter:
    """Return the adapter of a transformer class; `UnsupportedModel` where none is installed, with the reason."""
    by_class = {name: adapter for adapter in adapters().values() for name in adapter.transformers}
    if class_name not in by_class:
        why = why_no_adapter([class_name])
        raise UnsupportedModel(f"no adapter covers the transformer class {class_name}; {why}")
    return by_class[class_name]


def families() -> dict[str, Family]:
    """Return every model family that an installed adapter describes, by name."""
    return {family.name: family for adapter in adapters().values() for family in adapter.families}


def family(name: str) -> Family:
    """Return one model family; an unknown name is refused with the nearest known one."""
    known = families()
    if name not in known:
        raise UnsupportedModel(f"no model family is called {name!r}; {did_you_mean(name, known)}")
    return known[name]


def described(name: str) -> tuple[Adapter, Family]:
    """Return a model family and the adapter that describes it; an unknown name is refused with the nearest one."""
    sizes = family(name)
    return next(adapter for adapter in adapters().values() if sizes in adapter.families), sizes
