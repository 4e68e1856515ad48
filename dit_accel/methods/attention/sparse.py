"""Base of sparse methods: tiles, recipe values for what is unset, and the steps and layers that stay dense."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from ...errors import ConfigError
from ...plan.context import StepContext
from ...plan.layout import TokenLayout
from ...plan.rests import USUAL_TURN, Rests, RestType
from ...plan.tiling import (
    TILE,
    Tiling,
    bitmap_bytes,
    full_lists_bytes,
    pinned_bytes,
    tiles_without_text,
    visual_lists_bytes,
)
from ...report.errors import error_section
from ...report.sections import Section
from ..base import AttentionHandler, Handler, Model
from ..config import MethodConfig
from ..noise import NeedsNoise
from ..options import BlockSize, Count, Steps, ge, gt
from ..saving import Saving, TileSaving
from ..steps import end_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseConfig(MethodConfig):
    """What sparse methods share: tile size, and which steps and layers stay dense; a model's recipe may fill them.

    Attributes:
        dense_steps: first denoising steps that stay dense; below 1 a share of the run's steps, rounded up.
        dense_last_steps: last denoising steps that stay dense, likewise.
        dense_layers: first layers that stay dense.
        dense_above_sigma: steps whose noise level is above it stay dense; unset: none. Schedules with a large shift
            spend a small share of the steps there, or a large one, so that counting steps misses the point: set, it
            stands in place of ``dense_steps``, where that is unset.
        min_tokens: visual tokens below which all calls stay dense; unset: the method acts at any size.
        block_size: tokens of a tile; a power of two, 16 to 512. All methods that are attached together share their
            tiles: what is unset follows what is set.
        precision: ``int8`` or ``fp8`` multiplies queries and keys in eight bits wherever the method acts, on GPUs whose
            tensor cores do (int8 all that our Triton kernels run on, fp8 from compute capability 8.9 and gfx942 on),
            and has no gradient. Unset: their own dtype.
        refresh: calls of a layer from one that is dense, in which its tiles are chosen anew, to the next; layers take
            turns, so that each step has about as many. Calls, not steps: what a cache skips does not count. Unset: 3
            with ``rest = "cached"``, which the dense calls are for, else no layer is dense again.
        rest_dtype: with ``rest = "cached"``: keep it in ``int8`` or ``int4`` with a scale a row, in half or a quarter
            of the memory. Unset: in the output's own.
        rest_memory: with ``rest = "cached"``: GB that it may take on a device. Where that is too little, the layers
            of whose output it is the smallest part leave it out. Unset: as much as it needs.
        rest_offload: with ``rest = "cached"``: let it wait in the memory of the ``cpu``. While a call computes, that of
            the next is copied back, so that the device holds two; without CUDA's or XPU's streams each copies its own.
    """

    # sparse from the start
    defaults: ClassVar[Mapping[str, Any]] = {
        "block_size": TILE, "dense_steps": 0, "dense_last_steps": 0, "dense_layers": 0,
    }  # fmt: skip

    worthwhile_tokens: ClassVar[int] = 0
    """Visual tokens below which the method seldom pays: the rest of the network costs more than attention does."""

    dense_steps: Steps | None = None
    dense_last_steps: Steps | None = None
    dense_layers: Annotated[int, ge(0), "0 keeps none dense"] | None = None
    dense_above_sigma: Annotated[float, ge(0)] | None = None
    min_tokens: Count | None = None
    block_size: BlockSize | None = None
    precision: Literal["int8", "fp8"] | None = None
    refresh: Annotated[int, ge(2), "3 is usual with rest = 'cached'"] | None = None
    rest_dtype: RestType | None = None
    rest_memory: Annotated[float, gt(0)] | None = None
    rest_offload: Literal["cpu"] | None = None

    def __post_init__(self) -> None:
        MethodConfig.__post_init__(self)
        if self.dense_above_sigma is not None and self.dense_steps is None:
            object.__setattr__(self, "dense_steps", 0)
        for name in ("rest_dtype", "rest_memory", "rest_offload"):
            if (value := getattr(self, name)) is not None and not self.caches_rest:
                raise ConfigError(
                    f"{self.name}.{name} = {value!r} says how rest = 'cached' is kept, got {self.name}.rest = "
                    f"{getattr(self, 'rest', 'skip')!r}; set both, or leave {name} out"
                )

    @property
    def caches_rest(self) -> bool:
        """Whether the tiles that are left out enter as they did in the layer's last dense call."""
        return getattr(self, "rest", "skip") == "cached"

    @property
    def tiling(self) -> Tiling:
        """How the method alone cuts a sequence into tiles."""
        return Tiling(self.block_size or TILE, self.tile_order() or "raster")  # type: ignore[arg-type]

    def recipe_options(self) -> set[str]:
        return {*self.defaults, "dense_above_sigma"}

    def noise_needed(self) -> NeedsNoise | None:
        """Return the option that needs the noise level, where it is set."""
        asks = f"{self.name}.dense_above_sigma = {self.dense_above_sigma}"
        return None if self.dense_above_sigma is None else NeedsNoise(asks=asks, instead="count dense_steps instead")

    def is_dense(
        self, step_index: int, num_inference_steps: int | None, layer: int, sigma: float | None = None
    ) -> bool:
        """Tell whether a layer stays dense at a step (0-based, of this run) of noise level ``sigma``."""
        first, last = end_steps(self, "dense_steps", "dense_last_steps", num_inference_steps)
        level, needs = self.dense_above_sigma, self.noise_needed()
        if needs is not None and sigma is None:
            raise needs.untold()
        if layer < (self.dense_layers or 0) or step_index < first or (level is not None and (sigma or 0.0) > level):
            return True
        return num_inference_steps is not None and step_index >= num_inference_steps - last

    def advice(self, layout: TokenLayout) -> str | None:
        """Return advice to the user about a layout, or None; raise `ConfigError` to refuse it."""
        return self.advice_on_size(layout)

    def advice_on_size(self, layout: TokenLayout, keeps_all: int = 0) -> str | None:
        """Say why it can't be faster on a layout, or seldom is; else None. ``keeps_all``: its tiles if it keeps all."""
        tokens, least = layout.visual_tokens, self.worthwhile_tokens
        if keeps_all:
            return f"{self.name} keeps all {keeps_all} tiles of {tokens} visual tokens, so it can't be faster here"
        if tokens < least:
            return f"{self.name} seldom pays below {least} visual tokens, and there are {tokens} here"
        return None

    def notes(self) -> tuple[str, ...]:
        """Return notes on the options that an estimate can't count."""
        level, precision, notes = self.dense_above_sigma, self.precision, []
        if level is not None:
            notes.append(
                f"plan counts the steps above {self.name}.dense_above_sigma = {level} as sparse: noise levels are "
                "known only while it runs"
            )
        if precision is not None:
            notes.append(
                f"{self.name}.precision = {precision!r} multiplies queries and keys in eight bits, which plan counts "
                "as if in their own dtype"
            )
        return tuple(notes)


class SparseHandler(AttentionHandler):
    """A sparse method on one model: its recipe filled in; active outside the dense steps and layers."""

    settings: SparseConfig

    def __init__(self, config: SparseConfig, model: Model) -> None:
        super().__init__(config, model)
        settings = self.settings = replace(self.settings, block_size=model.tiling.block_size)
        if (every := settings.refresh or (USUAL_TURN if settings.caches_rest else None)) is not None:
            offload = settings.rest_offload is not None
            self.rests = Rests(every, settings.caches_rest, settings.rest_dtype, settings.rest_memory, offload)
            self.by_place = False  # what a row gets follows from the calls before

    @property
    def pools(self) -> bool:
        """Whether tiles that are not exact enter as one key each, as an option ``rest`` says."""
        return getattr(self.settings, "rest", "skip") == "pooled"

    def check_with(self, others: Sequence[Handler]) -> None:
        """Refuse turns of dense layers beside a method that leaves rows out."""
        partial = next((handler for handler in others if "reused rows" in handler.exclusive), None)
        if self.rests is not None and partial is not None:
            raise ConfigError(
                f"{self.name}.refresh = {self.rests.every} has layers compute all rows in turn, and {partial.name} "
                "leaves rows out; attach one of the two"
            )

    def begin_run(self) -> None:
        if self.rests is not None:
            self.rests.measured.clear()

    def report(self) -> Section | None:
        """Return the errors of its lists, as the layers that were dense in turn show them."""
        measured = [] if self.rests is None else self.rests.measured
        return error_section(self.name, measured) if measured else None

    def state_bytes(self) -> int:
        return super().state_bytes() + (0 if self.rests is None else self.rests.most_held)

    @property
    def precision(self) -> str | None:
        return self.settings.precision

    def applies(self, layout: TokenLayout) -> bool:
        return layout.visual_tokens >= (self.settings.min_tokens or 0)

    def check_layout(self, layout: TokenLayout) -> str | None:
        """Refuse a layout or remark on it, as the config's `advice` does."""
        if not SparseHandler.applies(self, layout):
            least = self.settings.min_tokens
            return f"{self.name} stays dense over {layout.visual_tokens} visual tokens, min_tokens = {least}"
        return self.settings.advice(layout)

    def is_active(self, step: StepContext, depth: int) -> bool:
        """Active outside the dense steps and layers; in training, where no step is known, outside the layers alone."""
        if step.training:
            return depth >= (self.settings.dense_layers or 0)
        return not self.settings.is_dense(step.step_index, step.num_inference_steps, depth, step.sigma)

    def saving(self, kept: np.ndarray, layout: TokenLayout, steps: int) -> Saving:
        """Return the saving of lists that are known before they run; visual tiles are exact where ``kept``, [N, N]."""
        block = self.settings.tiling.block_size
        text = tiles_without_text(layout, block)
        size = visual_lists_bytes(int((~kept[:text, :text]).sum()), self.pools, layout, block)
        return self.saving_of(lambda share, rows: share * kept[rows], layout, steps, tiles=len(kept), list_bytes=size)

    def saving_of(
        self,
        keep: Callable[[np.ndarray, slice], np.ndarray],
        layout: TokenLayout,
        steps: int,
        *,
        tiles: int | None = None,
        expected: bool = False,
        **options: Any,
    ) -> Saving:
        """Return the saving of a method that leaves a known part of the tiles; for the options see `TileSaving`.

        Where they are not given, ``tiles`` are those of all visual tokens, and the lists a full one and a bitmap;
        ``others`` are further fields of `Saving`.
        """
        settings, advice, applies = self.settings, self.check_layout(layout), SparseHandler.applies(self, layout)
        lists = full_lists_bytes(layout, settings.tiling.block_size) + pinned_bytes(layout, settings.tiling.block_size)
        dense = self.dense_share(steps)
        saving = TileSaving(
            tiles=settings.tiling.tiles(layout.visual_tokens) if tiles is None else tiles,
            active=lambda step, layer: applies and not settings.is_dense(step, steps, layer, 0.0),
            keep=lambda share, rows: dense * share + (1 - dense) * keep(share, rows),
            pools=self.pools,
            expected=expected,
        )
        notes = (*options.pop("notes", ()), *settings.notes())
        warnings = (advice,) if advice else ()
        carried = options.pop("carried_bytes", 0) + self.rest_bytes(layout, steps)
        return Saving(
            tiles=saving, notes=notes, warnings=warnings, carried_bytes=carried, **{"list_bytes": lists, **options}
        )

    def dense_share(self, steps: int) -> float:
        """Return the share of the calls in a run that are dense since it is their layer's turn."""
        if self.rests is None:
            return 0.0
        layers = range(self.settings.dense_layers or 0, max(1, self.model.layers))
        calls = sum(not self.settings.is_dense(step, steps, layers.stop, 0.0) for step in range(steps))
        return self.rests.dense_share(calls, layers)

    def rest_bytes(self, layout: TokenLayout, steps: int) -> int:
        """Return the bytes that are kept of dense calls, and their tiles' bits, of a model of known sizes."""
        rests, family = self.rests, self.model.family
        if rests is None or not rests.cached or family is None:
            return 0
        each = rests.bytes_of(layout.tokens * self.model.heads, family.head_dim)
        size = 0 if rests.offload else self._active_calls(steps) * each
        limit = size if rests.memory is None else int(rests.memory * 1e9)
        return min(size, limit) + self.carried_bits(layout, steps)

    def carried_bits(self, layout: TokenLayout, steps: int) -> int:
        """Return the bytes of a bit for each tile, head, active layer and branch of a model of known sizes."""
        each = bitmap_bytes(self.settings.tiling.tiles(layout.tokens), self.model.heads, 1)
        return self._active_calls(steps) * each

    def _active_calls(self, steps: int) -> int:
        """Count the layers in which the method acts, over all experts and branches of a model of known sizes."""
        settings, family = self.settings, self.model.family
        if family is None:
            return 0
        active = [
            layer
            for layer in range(family.layers)
            if not all(settings.is_dense(step, steps, layer, 0.0) for step in range(steps))
        ]
        return len(active) * family.experts * family.forwards_per_step
