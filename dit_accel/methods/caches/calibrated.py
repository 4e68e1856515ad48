"""What caches share that need numbers measured on the model: published ones by family, or the user's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from ...adapters.installed import families
from ...errors import ConfigError, MissingOption, did_you_mean
from ..base import Model
from ..options import NO_FILE
from .cache_config import MeasuredCacheConfig
from .engine import StepCacheHandler


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedConfig(MeasuredCacheConfig):
    """What caches share that need numbers measured on the model.

    Attributes:
        family: the released model whose published numbers are taken, where sizes don't tell it from another; unset: the
            model it is attached to.
        measured_on: what the numbers given here were measured on, as ``dit-accel tune`` writes it; another model is
            refused.
    """

    numbers: ClassVar[str]
    """The option that holds the numbers; ``_2`` is added for those of a second transformer."""

    family: Annotated[str, NO_FILE] | None = None
    measured_on: Annotated[str, NO_FILE] | None = None

    def __post_init__(self) -> None:
        MeasuredCacheConfig.__post_init__(self)
        if self.measured_on is not None and getattr(self, self.numbers) is None:
            raise ConfigError(
                f"{self.name}.measured_on = {self.measured_on!r} says what {self.numbers} were measured on, and none "
                f"are given; set {self.name}.family to use those of a released model"
            )


class CalibratedHandler(StepCacheHandler):
    """A cache that needs numbers measured on the model, on one model."""

    settings: CalibratedConfig

    def first_expert(self) -> float | None:
        """Return the share of a run's steps that the first of two transformers makes, in the model that is named."""
        named = families().get(self.settings.family or "")
        return named.first_expert if named else super().first_expert()

    @classmethod
    def recipe_name(cls, config: Any) -> str:
        """Return the name under which families keep the values for a config."""
        return config.name

    @classmethod
    def recipe(cls, config: CalibratedConfig, model: Model) -> Mapping[str, Any]:
        name, numbers, family, kept_as = config.name, config.numbers, config.family, cls.recipe_name(config)
        recipe = model.adapter.recipe(kept_as, model.family)
        if getattr(config, numbers) is not None:
            if family is not None:
                raise ConfigError(
                    f"{name}.{numbers} and {name}.family = {family!r} both say what numbers are used; give one of them"
                )
            if config.measured_on not in (None, model.name):
                raise ConfigError(
                    f"{name}.{numbers} were measured on {config.measured_on!r}, this model is {model.name!r}; measure "
                    f"them on it: dit-accel tune {name}"
                )
            return {key: value for key, value in recipe.items() if not key.startswith(numbers)}
        known = {of: table for of, released in families().items() if (table := released.recipes.get(kept_as))}
        if family is not None:
            if family not in known:
                raise ConfigError(
                    f"{name}.family = {family!r} has no published {numbers}; {did_you_mean(family, sorted(known))}"
                )
            return known[family]
        if numbers not in recipe:
            raise MissingOption(
                f"{name} has no {numbers} for {model.name!r}, only for {', '.join(sorted(known))}; measure them with "
                f"dit-accel tune {name}, or take those of a model that is like it: {name}.family",
                needs=f"{numbers} or family",
            )
        return recipe
