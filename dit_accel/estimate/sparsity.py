"""What sparse methods leave of the self-attention, by arithmetic alone: tiles kept, dense calls, memory of lists."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..adapters.adapter import Adapter, Family
from ..methods.config import MethodConfig
from ..plan.layout import TokenLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsity:
    """What the methods leave of the self-attention.

    Attributes:
        methods: the configs, every recipe value filled in; one that lists tiles, one that routes them, or both.
        kept: tiles kept, visual tokens only; mean over the sparse calls, expected on Gaussian scores where routed.
        total: tiles in all, visual tokens only.
        dense_share: share of the attention calls (steps x layers) that stay dense, w.
        list_entries: int32 numbers of the tile lists and bitmaps on the device.
        advice: what the methods say about this layout, or None.
    """

    methods: tuple[MethodConfig, ...]
    kept: int
    total: int
    dense_share: float
    list_entries: int
    advice: str | None = None

    @property
    def density(self) -> float:
        """Kept share of the tiles in a sparse call."""
        return self.kept / self.total

    @property
    def name(self) -> str:
        """The methods' names, joined."""
        return " + ".join(method.name for method in self.methods)

    @property
    def routes(self) -> bool:
        """Whether a method routes tiles, so that `kept` is an expectation."""
        return any(routes(method) for method in self.methods)

    @property
    def pools(self) -> bool:
        """Whether tiles enter as one key each."""
        return self.routes or any(getattr(method, "rest", "skip") == "pooled" for method in self.methods)


def routes(method: Any) -> bool:
    """Tell whether a method demotes tiles by the data, so that only an expectation of what it keeps is known."""
    return hasattr(method, "routed_count")


def sparsity_of(methods: Sequence[Any], adapter: Adapter, family: Family, layout: TokenLayout, steps: int) -> Sparsity:
    """Return what methods leave together: one that lists tiles, one that routes them, or both.

    Each call is counted by which of them are active in it; `Sparsity.kept` is the mean over the sparse calls.

    Raises:
        ConfigError: for tile sizes that differ, or what a method refuses.
    """
    full = {method.name: method.resolved(adapter.recipe(method.name, family)) for method in methods}
    lister = next((full[method.name] for method in methods if not routes(method)), None)
    router = next((method for method in methods if routes(method)), None)
    if router is not None:
        asked = router.in_tiles_of(lister) if lister is not None else router
        router = full[router.name] = asked.resolved(adapter.recipe(router.name, family))
    kept, total, entries = _counts(lister, router, layout)

    def active(method: Any, step: int, layer: int) -> bool:
        return method is not None and not method.is_dense(step, steps, layer, 0.0)

    calls = Counter(
        (active(lister, step, layer), active(router, step, layer))
        for step in range(steps)
        for layer in range(family.layers)
    )
    dense = calls.pop((False, False), 0)
    sparse = calls.total()
    return Sparsity(
        methods=tuple(full.values()),
        kept=round(sum(count * kept[which] for which, count in calls.items()) / sparse) if sparse else total,
        total=total,
        dense_share=dense / (steps * family.layers),
        list_entries=entries,
        advice="; ".join(filter(None, (text for method in full.values() for text in _remarks(method, layout)))) or None,
    )


def _remarks(method: Any, layout: TokenLayout) -> tuple[str | None, str | None]:
    level, told = getattr(method, "dense_above_sigma", None), None
    if level is not None:
        told = (
            f"plan takes the steps above {method.name}.dense_above_sigma = {level} for sparse: noise levels are known "
            "only while it runs"
        )
    return method.advice(layout), told


def _counts(lister: Any, router: Any, layout: TokenLayout) -> tuple[dict[tuple[bool, bool], int], int, int]:
    """Return (list active, routing active) -> tiles kept; tiles in all; and numbers in lists and bitmaps."""
    kept, total, entries = {}, 0, 0
    if lister is not None:
        kept[True, False], total = lister.tile_counts(layout)
        rows = math.isqrt(total) + 1
        entries = rows + kept[True, False]
        if getattr(lister, "rest", "skip") == "pooled":
            entries += total - kept[True, False] + rows
    if router is not None:
        kept[False, True], total = router.tile_counts(layout)
        rows = math.isqrt(total) + 1
        entries += rows + total + (rows - 1) * -(-(rows - 1) // 32)
    if lister is not None and router is not None:
        from dit_accel_kernels import EXACT  # loads torch

        alone = replace(layout, text_before=0, text_after=0)
        listed = lister.tiles(alone).states()[0] == EXACT
        kept[True, False] = int(listed.sum())
        kept[True, True] = router.routed_count(layout, listed)
    return kept, total, entries
