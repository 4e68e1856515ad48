"""The transformers and attention layers of one attachment: what they are, and where in a forward they stand."""

import contextlib
import itertools
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..errors import ConfigError
from ..methods.find import heads_of
from ..plan.layout import TokenLayout, with_valid_text
from .beside import CallsMade
from .calls import Calls

DenseAttention = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]
"""(q, k, v, mask, scale) -> output: the model's own attention on the user's backend; tensors lie as it holds them."""


class AttentionLayer:
    """One attention module that methods may change: where it stands and the processor put on it.

    Attributes:
        index: its place among all that the adapter names, unique in its transformer.
        depth: index of its block, counted from the input.
        heads: its heads, H.
        processor: the processor put on it.
        dense: the model's own attention, on the user's own backend.
    """

    def __init__(self, state: "TransformerState", module: nn.Module, index: int, depth: int) -> None:
        self.state, self.index, self.depth = state, index, depth
        self.module: Any = module
        self.heads = heads_of(module, getattr(state.transformer, "config", None))
        self.processor: Any = None
        self.dense: DenseAttention | None = None


@dataclass(slots=True)
class Branch:
    """One denoising call that is open: its name, and what the pipeline states of the step.

    Attributes:
        name: such as ``cond``; a nested one's is ``cond/name``.
        stated: what else the context states of the step, as diffusers' ``CacheContext`` names it.
        reopened: diffusers' own context of this branch, opened again after a nested one ended.
        thread: the thread that opened it.
        rows: the rows of the outermost forward that those of a nested one are; None: all.
    """

    name: str
    stated: Mapping[str, Any] = field(default_factory=dict)
    reopened: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    thread: int = field(default_factory=threading.get_ident)
    rows: tuple[int, ...] | None = None

    @property
    def tells_step(self) -> bool:
        """Whether the context tells the step."""
        return "step_index" in self.stated


class TransformerState:
    """One transformer of the attachment and what is known of its forwards.

    Attributes:
        name: the pipeline's component name.
        transformer: the module.
        part: what the pipeline calls: the transformer, or what ``torch.compile`` made of it.
        adapter: its adapter.
        layers: its attention layers that methods may change, in the adapter's order.
        branches: the denoising calls that are open, the innermost last.
        nested: how many of them a method opened.
        layouts: branch -> (layout, batch) of its last forward.
        calls: number of the running forward among the calls that no context names.
        calls_seen: what distinguishes these.
        begun: a context states the step, and no forward was seen in it yet.
        unseen: the last forward was not seen to begin, in a transformer that is compiled whole.
        weights: what acted on the transformer's weights in the last forward.
        running: the pipeline in whose call the current forward runs; None: none, or no forward runs.
        ran: branch -> rows, as `Branch` has them, of the forwards of their own inside the running call.
        made: their attention calls, for the forwards beside them.
    """

    def __init__(self, name: str, transformer: nn.Module, adapter: Adapter, part: Any = None) -> None:
        self.name = name
        self.transformer: Any = transformer
        self.part: Any = transformer if part is None else part
        self.adapter = adapter
        self.layers: list[AttentionLayer] = []
        self.branches: list[Branch] = []
        self.nested = 0
        self.layouts: dict[str, tuple[TokenLayout, int]] = {}
        self.calls = 0
        self.calls_seen = Calls()
        self.begun = self.unseen = False
        self.weights: Hashable = None
        self.running: Any = None
        self.ran: dict[str, tuple[int, ...] | None] = {}
        self.made = CallsMade()

    @property
    def branch(self) -> str:
        """Name of the running denoising call: its context's, else the transformer's own prompt or a number."""
        if self.branches:
            return self.branches[-1].name
        prompt = self.adapter.guidance.branch_of.get(self.name)
        if prompt is None:
            return f"call {self.calls}"
        return f"{prompt} {self.calls}" if self.calls else prompt

    @property
    def beside(self) -> tuple[str | None, tuple[int, ...] | None]:
        """The branch that a nested one runs beside and which of its rows these are, as `StepContext` has both.

        It is the innermost around it that ran. What opened branches inside that one opens them here as well.
        """
        if not self.nested:
            return None, None
        first, *inner = self.branch.split("/")
        for count in range(len(inner) - 1, -1, -1):
            for kept in itertools.combinations(inner, count):
                if (name := "/".join((first, *kept))) in self.ran:
                    own, theirs = self.branches[-1].rows, self.ran[name]
                    rows = None if own == theirs else places(own, theirs)
                    return (name, rows) if rows is not None or own == theirs else (None, None)
        return None, None

    def note_ran(self) -> None:
        """Note that a forward of the branch that is open ran, if it is one of its own."""
        if self.beside[0] is None:
            self.ran[self.branch] = self.branches[-1].rows if self.nested else None

    def end_call(self) -> None:
        """Forget the forwards of a call that is over."""
        self.ran.clear()
        self.made.clear()

    def begin_run(self) -> None:
        """Forget what belongs to the last generation."""
        self.layouts.clear()
        self.calls_seen.begin_run()
        self.calls = 0


def places(own: Sequence[int] | None, theirs: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return where each of some rows stands among others, of which each serves once; None where one is not there.

    Rows that are None are all those of a forward, in their order.
    """
    if own is None or theirs is None:
        return None if own is None else tuple(own)
    left, found = list(theirs), []
    for row in own:
        if row not in left:
            return None
        found.append(left.index(row))
        left[found[-1]] = -1
    return tuple(found)


def shortened(layer: AttentionLayer, layout: TokenLayout | None, tokens: int) -> TokenLayout:
    """Return the layout of a call that leaves out the text that pads its row; refuse other lengths."""
    state, adapter = layer.state, layer.state.adapter
    assert layout is not None
    if adapter.variable_text_length:
        layout = with_valid_text(layout, tokens)
    if tokens != layout.tokens:
        raise ConfigError(
            f"{state.name} layer {layer.index} attends over {tokens} tokens, but the adapter {adapter.name!r} "
            f"reads {layout.tokens} off the latents ({layout}); check the adapter's grid: frames_axis, text, "
            "joined, the patch size"
        )
    return layout
