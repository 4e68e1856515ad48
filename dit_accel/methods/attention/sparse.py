"""Base of sparse methods: tiles, recipe values for what is unset, and the steps and layers that stay dense."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from ...errors import ConfigError
from ...plan.context import StepContext
from ...plan.layout import TokenLayout
from ...plan.tiling import Tiling
from ..base import AttentionHandler, Model
from ..config import MethodConfig, plain_fields
from ..options import BlockSize, Steps, ge
from ..steps import end_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseSettings:
    """What a sparse method came to on one model: every option has its value. For the options see the method's config.

    Attributes:
        tiling: how all methods of the attachment cut a sequence into tiles.
    """

    name: ClassVar[str]

    tiling: Tiling
    dense_steps: int | float
    dense_last_steps: int | float
    dense_layers: int
    dense_above_sigma: float | None

    @property
    def block_size(self) -> int:
        """Tokens of a tile."""
        return self.tiling.block_size

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values, ``block_size`` in place of the tiling."""
        values = plain_fields(self)
        del values["tiling"]
        return {**values, "block_size": self.block_size}

    def is_dense(
        self, step_index: int, num_inference_steps: int | None, layer: int, sigma: float | None = None
    ) -> bool:
        """Tell whether a layer stays dense at a step (0-based, of this run) of noise level ``sigma``.

        Raises:
            ConfigError: if the options need what is not known here: the run's steps, or the noise level.
        """
        first, last = self.dense_ends(num_inference_steps)
        level = self.dense_above_sigma
        if level is not None and sigma is None:
            raise ConfigError(
                f"{self.name}.dense_above_sigma = {level} needs the noise level, which the pipeline does not tell; "
                "count dense_steps instead"
            )
        if layer < self.dense_layers or step_index < first or (level is not None and (sigma or 0.0) > level):
            return True
        return num_inference_steps is not None and step_index >= num_inference_steps - last

    def dense_ends(self, num_inference_steps: int | None) -> tuple[int, int]:
        """Return how many first and last steps of a run stay dense.

        Raises:
            ConfigError: if the options need the number of steps, which is not known.
        """
        return end_steps(self, "dense_steps", "dense_last_steps", num_inference_steps)

    def advice(self, layout: TokenLayout) -> str | None:
        """Return what the user should know about the method on this layout, or None where it fits well.

        Raises:
            ConfigError: if the method makes no sense on it.
        """
        return None

    def notes(self) -> tuple[str, ...]:
        """Return what an estimate can't know of these options."""
        if self.dense_above_sigma is None:
            return ()
        return (
            f"plan counts the steps above {self.name}.dense_above_sigma = {self.dense_above_sigma} as sparse: noise "
            "levels are known only while it runs",
        )

    def active_layers(self, layers: int, steps: int) -> int:
        """Return in how many of the first ``layers`` the method is active at some step of a run."""
        return sum(any(not self.is_dense(step, steps, layer, 0.0) for step in range(steps)) for layer in range(layers))


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseConfig(MethodConfig):
    """What sparse methods share: tile size, and which steps and layers stay dense; a model's recipe may fill them.

    Attributes:
        dense_steps: first denoising steps that stay dense; below 1 a share of the run's steps, rounded up.
        dense_last_steps: last denoising steps that stay dense, likewise.
        dense_layers: first layers that stay dense.
        dense_above_sigma: steps whose noise level is above it stay dense too; unset: none. Schedules with a large
            shift spend a small share of the steps there, or a large one, so that counting steps misses the point.
        block_size: tokens of a tile; a power of two, 16 to 512. All methods that are attached together share their
            tiles: what is unset follows what is set.
    """

    settings_type: ClassVar[type[SparseSettings]]

    dense_steps: Steps | None = None
    dense_last_steps: Steps | None = None
    dense_layers: Annotated[int, ge(0), "0 keeps none dense"] | None = None
    dense_above_sigma: Annotated[float, ge(0)] | None = None
    block_size: BlockSize | None = None

    def tile_size(self, recipe: Mapping[str, Any]) -> tuple[int | None, int | None]:
        """Return the tile size that is set, and the recipe's or the method's usual one."""
        return self.block_size, recipe.get("block_size", self.defaults["block_size"])

    def recipe_options(self) -> set[str]:
        """Return the options that a model's recipe may set."""
        return {*self.defaults, "dense_above_sigma"}

    def resolve(self, recipe: Mapping[str, Any] | None = None, tiling: Tiling | None = None) -> Any:
        """Return the settings that the config comes to, of the method's own settings type.

        Args:
            recipe: option -> value of the model; None: of no model.
            tiling: the attachment's tiles; None: of this method alone.

        Raises:
            ConfigError: as `filled`.
        """
        full = self.filled(recipe or {})
        if tiling is None:
            tiling = Tiling(full.block_size or Tiling.block_size, full.tile_order() or "raster")  # type: ignore[arg-type]
        names = {field.name for field in dataclasses.fields(self.settings_type)} - {"tiling"}
        return self.settings_type(tiling=tiling, **full.settled(names))

    def settled(self, names: set[str]) -> dict[str, Any]:
        """Return the values of the settings' fields, of a config with every option filled in."""
        return {name: getattr(self, name) for name in names}


class SparseHandler(AttentionHandler):
    """A sparse method on one model: its recipe filled in; active outside the dense steps and layers."""

    settings: SparseSettings

    def __init__(self, config: SparseConfig, model: Model) -> None:
        recipe = model.adapter.recipe(config.name, model.family)
        super().__init__(config.resolve(recipe, model.tiling), model)

    def check_layout(self, layout: TokenLayout) -> str | None:
        """Refuse a layout or remark on it, as the settings' `advice` does."""
        return self.settings.advice(layout)

    def is_active(self, step: StepContext, depth: int) -> bool:
        """Active outside the dense steps and layers; in training, where no step is told, outside the layers alone."""
        if step.training:
            return depth >= self.settings.dense_layers
        return not self.settings.is_dense(step.step_index, step.num_inference_steps, depth, step.sigma)
