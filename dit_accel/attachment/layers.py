"""The transformers and attention modules of one attachment: what they are, and where in a forward they stand."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

from ..adapters.adapter import Adapter
from ..plan.layout import TokenLayout


class AttentionLayer:
    """One attention module that methods may change: where it stands and the processor put on it."""

    def __init__(self, target: "TransformerState", layer: int, depth: int) -> None:
        self.target = target
        self.layer = layer
        self.depth = depth
        self.processor: Any = None
        self.calls = 0  # of this forward


class TransformerState:
    """One transformer of the attachment and where its denoising stands.

    Attributes:
        name: the pipeline's component name.
        places: its attention modules, in the adapter's order.
    """

    def __init__(self, name: str, adapter: Adapter) -> None:
        self.name = name
        self.adapter = adapter
        self.places: list[AttentionLayer] = []
        self.branch = "default"
        self.in_context = False
        self.told_step = False
        self.step_index: int | None = None
        self.sigma: float | None = None
        self.shapes: dict[str, tuple[tuple[int, ...], int]] = {}
        self.timestep = -math.inf
        self.calls_at_timestep = 0
        self.batch: int | None = None  # of this forward, where it is observed
        self.dense = 0  # layers of this forward that were counted as dense
        self.weights: Hashable = None


def layout_of(grid: Sequence[int]) -> TokenLayout:
    """Return a grid as a layout."""
    frames, height, width, before, after = (int(size) for size in grid)
    return TokenLayout(frames=frames, height=height, width=width, text_before=before, text_after=after)


def with_valid_text(tokens: TokenLayout, length: int) -> TokenLayout:
    """Return the layout of a sequence that left out padded text, or all text; or the layout if that can't be."""
    if length == tokens.visual_tokens:
        return replace(tokens, text_before=0, text_after=0)
    dropped = tokens.tokens - length
    if not 0 <= dropped <= tokens.text_after:
        return tokens
    return replace(tokens, text_after=tokens.text_after - dropped)


def begin_forward(target: TransformerState, batch: int | None) -> None:
    """Note that a forward of ``batch`` rows (None: not known yet) begins: no place has been called."""
    target.batch = batch
    for place in target.places:
        place.calls = 0


def which_call(place: AttentionLayer, batch: int) -> tuple[int, bool]:
    """Count a call of ``batch`` rows; return its place among the forward's calls, and whether it ran before."""
    count, whole = place.calls, place.target.batch
    place.calls += 1
    if whole is None and place.target.adapter.ragged_text:  # how many rows follow is not known
        return count, False
    rows = max(1, (whole or batch) // batch)
    return count % rows, count >= rows
