"""The registry of adapters: those that installed packages give by entry point, and the model families they describe."""

from collections.abc import Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from ..errors import ConfigError, UnsupportedModel, did_you_mean
from .adapter import Adapter, Family

ADAPTER_GROUP = "dit_accel.adapters"


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
        for adapter in _load(entry):
            if adapter.name in by_name:
                raise ConfigError(f"adapter {adapter.name!r} is registered twice, last by {entry.value}; uninstall one")
            for name in adapter.transformers:
                if name in classes:
                    raise ConfigError(
                        f"{name} is claimed by the adapters {classes[name]!r} and {adapter.name!r}; uninstall one"
                    )
                classes[name] = adapter.name
            by_name[adapter.name] = adapter
    return by_name


def _load(entry: EntryPoint) -> Sequence[Adapter]:
    """Return the adapters that an entry point gives."""
    entry_point = f"the entry point {entry.value!r} of {ADAPTER_GROUP}"
    try:
        given = entry.load()
    except (AttributeError, ModuleNotFoundError) as error:
        raise ConfigError(
            f"{entry_point} can't be loaded: {error}; name a tuple of adapters in pyproject.toml and install it again"
        ) from error
    if not isinstance(given, (tuple, list)) or not all(isinstance(adapter, Adapter) for adapter in given):
        raise ConfigError(
            f"{entry_point} must give adapters, got {type(given).__name__}; name a tuple, ADAPTERS = (MY_ADAPTER,)"
        )
    return given


def adapter_for(class_name: str) -> Adapter:
    """Return the adapter of a transformer class.

    Raises:
        UnsupportedModel: if no installed adapter covers it; lists what is supported.
    """
    by_class = {name: adapter for adapter in adapters().values() for name in adapter.transformers}
    if class_name not in by_class:
        raise UnsupportedModel(
            f"no adapter covers the transformer class {class_name}; {did_you_mean(class_name, by_class)}"
        )
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
