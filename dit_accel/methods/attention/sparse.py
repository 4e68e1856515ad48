"""Base of sparse methods: tiles, recipe values for what is unset, and the steps and layers that stay dense."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np

from ...errors import ConfigError
from ...plan.context import StepContext
from ...plan.layout import TokenLayout
from ...plan.tiling import TILE, Tiling, visual_lists_bytes
from ..base import AttentionHandler, Model
from ..config import MethodConfig
from ..options import BlockSize, Steps, ge
from ..saving import Saving, TileSaving
from ..steps import end_steps

DEFAULTS: Mapping[str, Any] = {"block_size": TILE, "dense_steps": 0, "dense_last_steps": 0, "dense_layers": 0}
"""What an option is where neither the user nor the model's recipe sets it: sparse from the start."""


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

    defaults: ClassVar[Mapping[str, Any]] = DEFAULTS

    dense_steps: Steps | None = None
    dense_last_steps: Steps | None = None
    dense_layers: Annotated[int, ge(0), "0 keeps none dense"] | None = None
    dense_above_sigma: Annotated[float, ge(0)] | None = None
    block_size: BlockSize | None = None

    @property
    def tiling(self) -> Tiling:
        """How the method alone cuts a sequence into tiles."""
        return Tiling(self.block_size or TILE, self.tile_order() or "raster")  # type: ignore[arg-type]

    def recipe_options(self) -> set[str]:
        """Return the options that a model's recipe may set."""
        return {*self.defaults, "dense_above_sigma"}

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
        if layer < (self.dense_layers or 0) or step_index < first or (level is not None and (sigma or 0.0) > level):
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


class SparseHandler(AttentionHandler):
    """A sparse method on one model: its recipe filled in; active outside the dense steps and layers."""

    settings: SparseConfig

    def __init__(self, config: SparseConfig, model: Model) -> None:
        super().__init__(config, model)
        self.settings = replace(self.settings, block_size=model.tiling.block_size)

    def check_layout(self, layout: TokenLayout) -> str | None:
        """Refuse a layout or remark on it, as the config's `advice` does."""
        return self.settings.advice(layout)

    def is_active(self, step: StepContext, depth: int) -> bool:
        """Active outside the dense steps and layers; in training, where no step is known, outside the layers alone."""
        if step.training:
            return depth >= (self.settings.dense_layers or 0)
        return not self.settings.is_dense(step.step_index, step.num_inference_steps, depth, step.sigma)

    def saving(self, kept: np.ndarray, lists: Sequence[np.ndarray], layout: TokenLayout, steps: int) -> Saving:
        """Return what a mask saves that is known before it runs.

        Args:
            kept: share of the steps in which each visual tile is exact, [N, N].
            lists: the masks that are held at once, bool [N, N] each.
            layout: the sequence.
            steps: of the run.
        """
        settings, pools = self.settings, getattr(self.settings, "rest", "skip") == "pooled"
        tiles = TileSaving(
            tiles=len(kept),
            active=lambda step, layer: not settings.is_dense(step, steps, layer, 0.0),
            keep=lambda share: share * kept,
            pools=pools,
        )
        size = sum(visual_lists_bytes(one, pools, layout, settings.tiling.block_size) for one in lists)
        return Saving(tiles=tiles, list_bytes=size, notes=settings.notes())
