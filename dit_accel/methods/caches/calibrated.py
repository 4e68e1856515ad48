"""What caches share that need numbers measured on the model: published ones by family, or the user's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...adapters.registry import families
from ...errors import ConfigError, did_you_mean
from ..base import Model
from .config import MeasuredCacheConfig
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

    family: str | None = None
    measured_on: str | None = None

    def __post_init__(self) -> None:
        MeasuredCacheConfig.__post_init__(self)
        if self.measured_on is not None and getattr(self, self.numbers) is None:
            raise ConfigError(
                f"{self.name}.measured_on = {self.measured_on!r} says what {self.numbers} were measured on, and none "
                f"are given; set {self.name}.family to use those of a released model"
            )

    def recipe_on(self, model: Model) -> Mapping[str, Any]:
        """Return what fills the unset options on a model, the numbers included.

        Raises:
            ConfigError: where there are no numbers for the model, or the given ones are another model's, or a family is
                named besides.
        """
        recipe = model.adapter.recipe(self.name, model.family)
        if getattr(self, self.numbers) is not None:
            here = model.name
            if self.family is not None:
                raise ConfigError(
                    f"{self.name}.{self.numbers} and {self.name}.family = {self.family!r} both say what numbers are "
                    "used; give one of them"
                )
            if self.measured_on not in (None, here):
                raise ConfigError(
                    f"{self.name}.{self.numbers} were measured on {self.measured_on!r}, this model is {here!r}; "
                    f"measure them on it: dit-accel tune {self.name}"
                )
            return {key: value for key, value in recipe.items() if not key.startswith(self.numbers)}
        known = {name: found for name, one in families().items() if (found := one.recipes.get(self.name))}
        if self.family is not None:
            if self.family not in known:
                raise ConfigError(
                    f"{self.name}.family = {self.family!r} has no published {self.numbers}; "
                    f"{did_you_mean(self.family, sorted(known))}"
                )
            return known[self.family]
        if self.numbers not in recipe:
            raise ConfigError(
                f"{self.name} has no {self.numbers} for {model.name!r}, only for {', '.join(sorted(known))}; "
                f"measure them with dit-accel tune {self.name}, or take those of a model that is like it: "
                f"{self.name}.family"
            )
        return recipe


class CalibratedHandler(StepCacheHandler):
    """A cache that needs numbers measured on the model, on one model."""

    @classmethod
    def recipe(cls, config: CalibratedConfig, model: Model) -> Mapping[str, Any]:
        """Return what fills the unset options of the config on a model."""
        return config.recipe_on(model)
