"""The transformers and attention layers of one attachment: what they are, and where in a forward they stand."""

import contextlib
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..errors import ConfigError
from ..methods.find import heads_of
from ..plan.layout import TokenLayout, with_valid_text
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
    """

    name: str
    stated: Mapping[str, Any] = field(default_factory=dict)
    reopened: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    thread: int = field(default_factory=threading.get_ident)

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

    @property
    def branch(self) -> str:
        """Name of the running denoising call: its context's, else the transformer's own prompt or a number."""
        if self.branches:
            return self.branches[-1].name
        prompt = self.adapter.guidance.branch_of.get(self.name)
        if prompt is None:
            return f"call {self.calls}"
        return f"{prompt} {self.calls}" if self.calls else prompt

    def begin_run(self) -> None:
        """Forget what belongs to the last generation."""
        self.layouts.clear()
        self.calls_seen.begin_run()
        self.calls = 0


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
