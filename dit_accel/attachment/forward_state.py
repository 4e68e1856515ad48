"""The state of the transformer forward that runs now: all that its attention calls and the methods ask about it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter, Grid
from ..methods.base import AttentionHandler
from ..plan.context import StepContext
from ..plan.layout import TokenLayout, layout_of
from .layers import AttentionLayer
from .shards import SequenceShards

NO_GRID: Grid = (-1, -1, -1, 0, 0)
"""The grid of a forward whose adapter gives none."""


class ForwardState:
    """All that is known of the forward that runs now; an attachment has one, since it runs one forward at a time.

    A forward that a method runs inside another one takes its place, and leaves it as it was (`nested`).

    Attributes:
        processor: the attention processor that runs; it holds its layer's number (a 0-d int64 CPU tensor, so that all
            layers share one compiled graph) and whether the layer follows a plan.
        grid: (frames, height, width, text before, text after), 0-d int64 CPU tensors, so that all latent grids share
            one compiled graph.
        sizes: the same as numbers.
        layout: the same, checked; None where it is not known.
        noted: the sizes that the methods have seen in this forward; None: none yet.
        not_a_step: the forward is not a denoising step; it stays dense.
        min_keys: attention calls over fewer keys stay dense (`Adapter.separate_text_attention`); 0: none do.
        shards: how tokens and heads are shared between processes; None: they are not.
        batch: rows of the forward; None where they are not known.
        expected: the forward may begin inside a compiled graph, where nobody sees it.
        step: where the denoising stands; None: not read yet.
        values: the same, field by field.
        acting: layer -> the methods that change its attention, over `layout`; collected once a layer.
        calls: layer -> attention calls that it has made.
        reached: numbers of the layers that ran, but for those of compiled blocks.
    """

    def __init__(self) -> None:
        self.expected = False
        self.processor: Any = None
        self.sizes: Grid = NO_GRID
        self.not_a_step = False
        self.min_keys = 0
        self.shards: SequenceShards | None = None
        self.lay((1, 1, 1, 0, 0))
        self.begin(None)

    def lay(self, sizes: Grid) -> None:
        """Lay the forward's tokens on a grid; `ConfigError` for sizes that are none."""
        if sizes != self.sizes:
            self.layout: TokenLayout | None = None if sizes == NO_GRID else layout_of(sizes)
            self.sizes, self.grid = sizes, as_tensors(sizes)

    def begin(self, batch: int | None) -> None:
        """Note that a forward of so many rows (None: not known yet) begins: no layer has been called."""
        self.batch = batch
        self.noted: Grid | None = None
        if not self.expected:  # else who acts was asked already
            self.step: StepContext | None = None
            self.values: dict[str, Any] = {}
            self.acting: dict[AttentionLayer, tuple[AttentionHandler, ...]] = {}
        self.expected = False
        self.calls: Counter[AttentionLayer] = Counter()
        self.reached: set[int] = set()

    def stand(self, step: StepContext) -> None:
        """Note where the denoising stands."""
        self.step, self.values = step, step.values

    def switch(self) -> None:
        """Switch the processors between dense attention and the plan, by who acts in their layers."""
        for layer, handlers in self.acting.items():
            layer.processor._dit_accel_sparse = bool(handlers)

    @contextmanager
    def nested(self) -> Iterator[None]:
        """Leave the running forward whole as it is, whatever forwards run inside the block."""
        outer = dict(vars(self))
        self.step, self.acting, self.calls, self.reached = None, {}, self.calls.copy(), set(self.reached)
        self.expected = False
        try:
            yield
        finally:
            vars(self).update(outer)
            self.switch()


def as_tensors(sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Return each size as a 0-d int64 CPU tensor."""
    return tuple(torch.tensor(size) for size in sizes)


def fewest_keys(adapter: Adapter, sizes: Grid) -> int:
    """Return the sequence length below which a call is text-only and stays dense."""
    return sum(sizes[3:]) + sizes[0] * sizes[1] * sizes[2] if adapter.separate_text_attention else 0
