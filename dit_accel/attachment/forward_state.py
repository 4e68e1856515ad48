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
from ..plan.layout import TokenLayout, layout_of, length_of
from .layers import AttentionLayer
from .shards import SequenceShards

NO_GRID: Grid = (-1, -1, -1, -1, -1)
"""The grid of a forward whose adapter gives none."""


class ForwardState:
    """All that is known of the forward that runs now; an attachment has one, since it runs one forward at a time.

    A forward that a method runs inside another one takes its place, and leaves it as it was (`nested`).
    """

    def __init__(self) -> None:
        self.expected = False  # the forward may begin inside a compiled graph, where nobody sees it
        # the attention processor that runs; it holds its layer's number (a 0-d int64 CPU tensor, so that all layers
        # share one compiled graph) and whether the layer follows a plan
        self.processor: Any = None
        self.not_a_step = False  # the forward stays dense
        self.min_keys = 0  # attention calls over fewer keys stay dense (`Adapter.separate_text_attention`); 0: none do
        self.shards: SequenceShards | None = None  # how tokens and heads are shared between processes
        self.layout: TokenLayout | None = None
        self.sizes, self.grid = NO_GRID, as_tensors(NO_GRID)
        self.begin(None)

    def lay(self, sizes: Grid) -> None:
        """Lay the forward's tokens on a grid; `ConfigError` for sizes that are none."""
        if sizes != self.sizes:
            self.layout = None if sizes == NO_GRID else layout_of(sizes)
            self.sizes, self.grid = sizes, as_tensors(sizes)  # as tensors all grids share one compiled graph

    def begin(self, batch: int | None) -> None:
        """Begin a forward of ``batch`` rows, None where they are not known yet: no layer has been called."""
        self.batch = batch
        self.noted: Grid | None = None  # the sizes that the methods have seen in this forward
        if not self.expected:  # else who acts was asked already
            self.step: StepContext | None = None
            self.values: dict[str, Any] = {}  # the same, field by field
            # the methods that change a layer's attention, over `layout`; collected once a layer
            self.acting: dict[AttentionLayer, tuple[AttentionHandler, ...]] = {}
        self.expected = False
        self.calls: Counter[AttentionLayer] = Counter()  # attention calls that each has made
        self.reached: set[int] = set()  # numbers of the layers that ran, but for those of compiled blocks

    def rows(self, batch: int) -> int:
        """Return the rows of the forward; where they are not known, a call's ``batch``."""
        return batch if self.batch is None else self.batch

    def stand(self, step: StepContext) -> None:
        """Note where the denoising stands."""
        self.step, self.values = step, step.values

    def switch(self) -> None:
        """Switch the processors between dense attention and the plan, by who acts in their layers."""
        for layer, handlers in self.acting.items():
            layer.processor._dit_accel_sparse = bool(handlers)

    @contextmanager
    def nested(self) -> Iterator[None]:
        """Let other forwards run inside the block, and restore this one's state afterwards."""
        outer = dict(vars(self))
        self.step, self.acting, self.calls, self.reached = None, {}, self.calls.copy(), set(self.reached)
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
    return length_of(sizes) if adapter.separate_text_attention else 0
