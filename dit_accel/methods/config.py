"""Method configs: their common base and the checks of their values' types."""

import dataclasses
import functools
import json
import math
import numbers
import operator
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from ..errors import ConfigError, did_you_mean
from .noise import NeedsNoise
from .options import Rule, find_broken, may_name

Config = typing.TypeVar("Config")


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[Config]) -> type[Config]:
    """Make a class of options a config: a dataclass that is frozen, slotted and keyword-only."""
    return dataclass(frozen=True, slots=True, kw_only=True)(cls)


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodConfig:
    """Base of every method's config: what the user asks for. Frozen, keyword-only, slotted, checked on creation.

    An option's annotation says its type and range, as `dit_accel.methods.options` has it. An option that a model's
    recipe may fill is annotated ``... | None`` and defaults to None; `filled` gives what a config comes to on a model.

    Raises:
        ConfigError: for an option that there is not, a value of another type or range than the option's annotation has,
            a number that is not finite, or options that contradict each other.
    """

    name: ClassVar[str]
    """The method's name on the command line and in TOML, such as ``radial``."""

    defaults: ClassVar[Mapping[str, Any]] = {}
    """What an option is where neither the user nor the model's recipe sets it; no other option may be in a recipe."""

    def __init_subclass__(cls, **options: Any) -> None:
        super(MethodConfig, cls).__init_subclass__(**options)
        if "__init__" in vars(cls):  # the slotted class, which a dataclass makes of the one that was written
            cls.__init__ = _naming_the_unknown(cls.__init__)

    def __post_init__(self) -> None:
        hints, declared = _hints(type(self)), _hints(type(self), rules=True)
        for field in dataclasses.fields(self):
            value, hint, option = getattr(self, field.name), hints[field.name], f"{self.name}.{field.name}"
            plain = _plain(value)
            if not _fits(plain, hint):
                raise ConfigError(
                    f"{option} must be {spell_type(hint)}, got {value!r}{_how_to_list(option, plain, hint)}"
                )
            if broken := find_broken(plain, declared[field.name], _fits):
                must, item, advice = broken
                item = list(item) if isinstance(item, tuple) else item
                raise ConfigError(f"{option} must {must}, got {item!r}{self._advice(field, advice)}")
            if plain is not value:
                object.__setattr__(self, field.name, plain)

    def _advice(self, field: dataclasses.Field[Any], advice: str) -> str:
        """Return what an error says at its end: an option's usual value, if it has one, and its own advice."""
        usual = self.defaults.get(field.name, field.default)
        parts = [f"{usual:g} is usual"] if isinstance(usual, (int, float)) else []
        parts += [advice] if advice else []
        return f"; {', '.join(parts)}" if parts else ""

    @property
    def requested_name(self) -> str:
        """The name of what the user gave to ask for the method."""
        return type(self).__name__

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set, as plain values: tuples become lists, None is left out."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items() if v is not None}

    def outside(self) -> dict[str, Any]:
        """Return the options that may name a file or a model of a hub, with their values."""
        declared = _hints(type(self), rules=True)
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if may_name(value, declared[name], _fits)}

    def require_one_of(self, *options: str, of: str) -> None:
        """Raise `ConfigError` if two of some options are set that say the same, such as ``how much is kept``."""
        if len(names := [name for name in options if getattr(self, name) is not None]) > 1:
            first, second = (f"{self.name}.{name} = {getattr(self, name)!r}" for name in names[:2])
            raise ConfigError(f"{first} and {second} both say {of}; give one of them")

    def recipe_options(self) -> set[str]:
        """Return the options that a model's recipe may set."""
        return set(self.defaults)

    def filled(self, recipe: Mapping[str, Any] | None = None) -> Self:
        """Return the config with every unset option filled in from a model's ``recipe``, then from `defaults`.

        Raises:
            ConfigError: for an option that no recipe may fill, or a value out of range.
        """
        recipe, known = recipe or {}, self.recipe_options()
        for key in recipe:
            if key not in known:
                raise ConfigError(
                    f"a recipe of {self.name} sets {key!r}, which no recipe may set; {did_you_mean(key, sorted(known))}"
                )
        values = {**self.defaults, **recipe}
        return dataclasses.replace(self, **{key: values[key] for key in values if getattr(self, key) is None})

    def noise_needed(self) -> NeedsNoise | None:
        """Return what needs the noise level, where something does; a scheduler that tells none is refused then."""
        return None

    def tile_size(self, recipe: Mapping[str, Any]) -> tuple[int | None, int | None]:
        """Return the tile size that the user sets by ``block_size``, and the one that the method takes otherwise.

        Both are None for a method without such an option. All methods of an attachment share one size.
        """
        return getattr(self, "block_size", None), recipe.get("block_size", self.defaults.get("block_size"))

    def tile_order(self) -> str | None:
        """Return the order of tokens in tiles that the method wants, ``raster`` or ``tiles``; None: any."""
        return None


@functools.cache  # reading annotations takes longer than all checks of their values
def _hints(config_type: type[MethodConfig], rules: bool = False) -> dict[str, Any]:
    """Return option -> its type, with ``rules`` as it was annotated."""
    return typing.get_type_hints(config_type, include_extras=rules)


def _naming_the_unknown(init: Callable[..., None]) -> Callable[..., None]:
    """Return a config's ``__init__`` that says which option was meant, instead of Python's TypeError."""

    @functools.wraps(init)
    def checked(self: MethodConfig, *args: Any, **options: Any) -> None:
        known = [field.name for field in dataclasses.fields(self)]
        for key in options:
            if key not in known:
                raise ConfigError(f"{self.name} has no option {key!r}; {did_you_mean(key, known)}")
        init(self, *args, **options)

    return checked


def _plain(value: Any) -> Any:
    """Return lists as tuples, which can't change, and numbers of other libraries as Python's own; the rest as it is."""
    if isinstance(value, (list, tuple)):
        plain = tuple(_plain(item) for item in value)
        unchanged = isinstance(value, tuple) and all(map(operator.is_, plain, value))
        return value if unchanged else plain  # the same object tells the caller that there is nothing to set
    if type(value) in (bool, int, float):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) and hasattr(value, "dtype") else value


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _fits(value, parts[0])
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is typing.Literal:  # 1 == True == 1.0, and none of them stands for another
        return any(value == choice and type(value) is type(choice) for choice in parts)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, parts[0]) for item in value)
    if hint in (int, float) and isinstance(value, bool):  # which Python takes for an int
        return False
    if hint is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, type(None) if hint is None else hint)


_ONE = {float: "a finite number", int: "an integer", bool: "true or false", str: "a string", type(None): "unset"}
_MANY = {float: "finite numbers", int: "integers", bool: "truth values", str: "strings"}
_EXAMPLES = {float: [0.5, 1.0], int: [1, 2], bool: [True, False], str: ["a", "b"]}


def _how_to_list(option: str, value: Any, hint: Any) -> str:
    """Return how to write an option that takes a list: what was given as one, if it is an entry; empty for others."""
    lists = [part for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is tuple]
    inner = typing.get_args(lists[0])[0] if lists else None
    if inner not in _EXAMPLES:
        return ""
    example = [value] if _fits(value, inner) else _EXAMPLES[inner]
    return f"; write a list, such as --set '{option}={json.dumps(example)}'"


def spell_type(hint: Any) -> str:
    """Put an annotation in words, as error texts and tables show it, with the range that it declares."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        words = " and ".join(rule.words for rule in parts[1:] if isinstance(rule, Rule))
        return words if words.startswith("a ") else f"{spell_type(parts[0])} {words}".rstrip()
    if origin in (typing.Union, types.UnionType):
        return " or ".join(spell_type(part) for part in parts)
    if origin is typing.Literal:
        return " or ".join(repr(choice) for choice in parts)
    if origin is tuple:
        inner = typing.get_args(parts[0])[0] if typing.get_origin(parts[0]) is Annotated else parts[0]
        return f"a list of {_MANY.get(inner, spell_type(inner))}"
    return _ONE.get(hint, getattr(hint, "__name__", str(hint)))
