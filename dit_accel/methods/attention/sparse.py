"""Base of sparse methods: recipe values for what is unset, and the steps and layers that stay dense."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

from ...errors import ConfigError, did_you_mean
from ...plan.layout import TokenLayout
from ..base import Handler, Model
from ..config import MethodConfig

Config = TypeVar("Config", bound="SparseConfig")


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseConfig(MethodConfig):
    """What sparse methods share: which steps and layers stay dense, and options that a model's recipe fills.

    Attributes:
        dense_steps: first denoising steps that stay dense; below 1 a share of the run's steps, rounded up.
        dense_last_steps: last denoising steps that stay dense.
        dense_layers: first layers that stay dense.
        dense_above_sigma: steps whose noise level is above it stay dense too; unset: none. Schedules with a large
            shift spend a small share of the steps there, or a large one, so that counting steps misses the point.

    Raises:
        ConfigError: for an option out of range.
    """

    generic: ClassVar[Mapping[str, Any]] = {}
    """What an option is where neither the user nor the model's recipe sets it; no other option may be in a recipe."""

    dense_steps: int | float | None = None
    dense_last_steps: int | None = None
    dense_layers: int | None = None
    dense_above_sigma: float | None = None

    def __post_init__(self) -> None:
        MethodConfig.__post_init__(self)
        for field in ("dense_steps", "dense_last_steps", "dense_layers", "dense_above_sigma"):
            value = getattr(self, field)
            if value is not None and value < 0:
                raise ConfigError(f"{self.name}.{field} must be >= 0, got {value}; 0 keeps none dense")
        if isinstance(self.dense_steps, float) and not self.dense_steps < 1 and not self.dense_steps.is_integer():
            raise ConfigError(
                f"{self.name}.dense_steps must be a whole number of steps or a share below 1, got {self.dense_steps}"
            )

    def resolved(self: Config, recipe: Mapping[str, Any]) -> Config:
        """Return the config with every unset option filled in from ``recipe``, then from `generic`.

        Raises:
            ConfigError: for an option that no recipe may fill, or a value out of range.
        """
        known = {*self.generic, "dense_above_sigma"}
        for key in recipe:
            if key not in known:
                raise ConfigError(
                    f"a recipe of {self.name} sets {key!r}, which it can't; {did_you_mean(key, sorted(known))}"
                )
        filled = {**self.generic, **recipe}
        return dataclasses.replace(self, **{key: filled[key] for key in filled if getattr(self, key) is None})

    def advice(self, layout: TokenLayout) -> str | None:
        """Return what the user should know of the method on this layout, or None where it fits well.

        Raises:
            ConfigError: if the method makes no sense on it.
        """
        return None

    def is_dense(
        self, step_index: int, num_inference_steps: int | None, layer: int, sigma: float | None = None
    ) -> bool:
        """Tell whether a layer stays dense at a step (0-based, over all experts) of noise level ``sigma``.

        Raises:
            ConfigError: if the options count what nothing tells: the run's steps, or the noise level.
        """
        first, last, layers, level = _dense_parts(self)
        if num_inference_steps is None and (last or 0 < first < 1):
            what = f"dense_last_steps = {last}" if last else f"dense_steps = {first}"
            raise ConfigError(
                f"{self.name}.{what} needs the number of steps, which nothing tells here; attach to the pipeline, or "
                "set dense_steps to a whole number and dense_last_steps to 0"
            )
        if level is not None and sigma is None:
            raise ConfigError(
                f"{self.name}.dense_above_sigma = {level} needs the noise level, which the pipeline does not tell; "
                "count dense_steps instead"
            )
        if 0 < first < 1:
            first = math.ceil(first * (num_inference_steps or 0))
        if layer < layers or step_index < first or (level is not None and sigma is not None and sigma > level):
            return True
        return num_inference_steps is not None and step_index >= num_inference_steps - last


@lru_cache(maxsize=64)
def _dense_parts(config: SparseConfig) -> tuple[float, int, int, float | None]:
    full = config.resolved({})
    return full.dense_steps or 0, full.dense_last_steps or 0, full.dense_layers or 0, full.dense_above_sigma


class SparseHandler(Handler):
    """A sparse method on one model: its recipe filled in; active outside the dense steps and layers."""

    config: SparseConfig

    def __init__(self, config: SparseConfig, model: Model) -> None:
        super().__init__(config.resolved(model.adapter.recipe(config.name, model.family)), model)

    def check_layout(self, layout: TokenLayout) -> str | None:
        """Refuse a layout or remark on it, as the config's `advice` does."""
        return self.config.advice(layout)

    def is_active(
        self, depth: int, step_index: int, num_inference_steps: int | None, sigma: float | None = None
    ) -> bool:
        """Active outside the dense steps and layers."""
        return not self.config.is_dense(step_index, num_inference_steps, depth, sigma)
