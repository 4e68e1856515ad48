"""One transformer's passes: what the conditional one leaves for the perturbed one, and which blocks that one skips."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...adapters.blocks import Streams
from ...plan.context import StepContext
from ..prompt_branches import Rows
from ..site import Block


class PerturbedBlocks:
    """What runs around the blocks of one transformer.

    ``first``: the first perturbed block, from which a perturbed pass may begin; None: it runs whole.
    """

    def __init__(self, first: int | None, skip: frozenset[int] = frozenset()) -> None:
        self.first = first
        self._skip = skip
        self.perturbs = False  # what runs now is perturbed
        self._records = False
        self.rows: Rows = None  # the rows that are; None: all
        self._saved: Streams | None = None
        self._begun: Streams | None = None
        self.held = 0  # bytes that the conditional pass left last

    def blocks(self, blocks: Sequence[Block]) -> tuple[Block, ...]:
        """Return those of a transformer's blocks that this runs around."""
        first = -1 if self.first is None else self.first
        return tuple(block for block in blocks if block.index <= first or block.index in self._skip)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the streams that the first perturbed block gets."""
        self._records = self.first is not None
        try:
            yield
        finally:
            self._records = False

    @contextlib.contextmanager
    def perturbing(self, rows: Rows = None, taken: Rows = None) -> Iterator[bool]:
        """Perturb what runs inside; tell whether it begins at the first perturbed block.

        ``taken``: which rows of the recorded forward this one has.
        """
        begun = self._taken(taken)
        self._begun, self._saved, self.rows = begun, None, rows  # a reset inside the pass must not take it away
        self.perturbs = True
        try:
            yield begun is not None
        finally:
            self.perturbs, self.rows, self._begun = False, None, None

    def around(self, context: StepContext, block: Block, run, streams: Streams) -> Streams:  # type: ignore[no-untyped-def]
        """Run a block, or leave it out."""
        if self._records and block.index == self.first:
            # copies, since later blocks may write into the streams
            self._saved = tuple(None if stream is None else stream.clone() for stream in streams)
            self.held = sum(stream.nbytes for stream in self._saved if stream is not None)
        if self._begun is not None and self.first is not None:  # up to there both passes compute the same
            if block.index < self.first:
                return streams
            if block.index == self.first:
                streams = self._begun
        if self.perturbs and block.index in self._skip:
            return streams if self.rows is None else self._mixed(run(streams), streams)
        return run(streams)

    def forget(self) -> None:
        """Free what is kept."""
        self._saved = None

    def _taken(self, taken: Rows) -> Streams | None:
        """Return the recorded streams of some rows; None where there are none, or they are not of rows."""
        saved = self._saved
        if saved is None or taken is None:
            return saved
        rows, batch = taken
        if any(stream is not None and len(stream) != batch for stream in saved):
            return None
        return tuple(None if stream is None else stream[rows] for stream in saved)

    def _mixed(self, ran: Streams, inputs: Streams) -> Streams:
        """Return a block's output, with the perturbed rows as they came in."""
        assert self.rows is not None
        rows, _ = self.rows

        def mixed(output: Tensor | None, other: Tensor | None) -> Tensor | None:
            if output is None or other is None:
                return output
            return torch.cat([output[: rows.start], other[rows], output[rows.stop :]])

        return tuple(map(mixed, ran, inputs))
