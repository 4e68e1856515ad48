"""The transformers and attention layers of one attachment: what they are, and what is known of their calls.

Where no context names the denoising calls of a step, they are told apart by the text that each of them holds. A branch
is a text, and which of the calls with that text in a step it is (two prompts that are equal, or windows of one clip,
are as many branches). So a branch stays itself when another one ends or begins, whatever the order.
"""

import contextlib
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..errors import ConfigError
from ..methods.find import heads_of
from ..plan.call import Call
from ..plan.context import CallContext
from ..plan.layout import TokenLayout, with_valid_text
from ..plan.plan import AttentionPlan
from .beside import CallsMade

DenseAttention = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]
"""(q, k, v, mask, scale) -> output: the model's own attention on the user's backend; tensors lie as it holds them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlannedCall:
    """One planned attention call, as an observer sees it; tensors are [B, H, S, D] views of the run: only read."""

    plan: AttentionPlan  # what ran
    context: CallContext  # where the denoising stood
    call: Call  # q, k and v as the model gave them, its mask and scale
    out: Tensor  # the output that the model gets
    planned: Tensor | None = None  # the output before methods corrected it; None where none corrects
    # the tiles that a selection left exact, bits int32 [B, H, NQ, W]; None without a selection
    exact: Tensor | None = None

    @property
    def rows(self) -> Tensor | None:
        """The tokens of the queries and of the output, int64, rising; None: all. See `Call.rows`."""
        return self.call.rows


Observer = Callable[[PlannedCall], None]


class AttentionLayer:
    """One attention module that methods may change: where it stands and the processor put on it.

    ``index`` is its place among all that the adapter names, unique in its transformer; ``depth`` its block's.
    """

    def __init__(
        self, state: "TransformerState", module: nn.Module | None, index: int, depth: int, heads: int | None = None
    ) -> None:
        self.state, self.index, self.depth = state, index, depth
        self.module: Any = module
        if heads is None:
            assert module is not None
            heads = heads_of(module, getattr(state.transformer, "config", None))
        self.heads = heads
        self.processor: Any = SimpleNamespace()  # one of its own only where layers are known before they run
        self.dense: DenseAttention | None = None


@dataclass(slots=True)
class Branch:
    """One denoising call that is open: its name, and what the pipeline states of the step."""

    name: str  # such as ``cond``; a nested one's is ``cond/name``
    # what else the context states of the step, as diffusers' ``CacheContext`` names it
    stated: Mapping[str, Any] = field(default_factory=dict)
    # diffusers' own context of this branch, opened again after a nested one ended
    reopened: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    thread: int = field(default_factory=threading.get_ident)  # the thread that opened it
    rows: tuple[int, ...] | None = None  # the rows of the outermost forward that those of a nested one are; None: all

    @property
    def tells_step(self) -> bool:
        """Whether the context tells the step."""
        return "step_index" in self.stated


class TransformerState:
    """One transformer of the attachment and what is known of its forwards."""

    def __init__(self, name: str, transformer: nn.Module, adapter: Adapter) -> None:
        self.name = name  # the pipeline's component name
        self.transformer: Any = transformer  # the module
        self.part: Any = transformer  # what the pipeline calls: the transformer, or what ``torch.compile`` made of it
        self.adapter = adapter  # its adapter
        self.layers: list[AttentionLayer] = []  # its attention layers that methods may change, in the adapter's order
        self.branches: list[Branch] = []  # the denoising calls that are open, the innermost last
        self.nested = 0  # how many of them a method opened
        self.begin_unseen = False  # the last forward was not seen to begin, in a transformer that is compiled whole
        self.weights: Hashable = None  # what acted on the transformer's weights in the last forward
        self.running: Any = None  # the pipeline in whose call the current forward runs; None: none, or no forward runs
        # branch -> rows, as `Branch` has them, of the forwards of their own inside the running call
        self.ran: dict[str, tuple[int, ...] | None] = {}
        self.made = CallsMade()  # their attention calls, for the forwards beside them
        self.begin_run()

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
            for names in itertools.combinations(inner, count):
                if (name := "/".join((first, *names))) in self.ran:
                    ours, theirs = self.branches[-1].rows, self.ran[name]
                    rows = None if ours == theirs else places(ours, theirs)
                    return (name, rows) if rows is not None or ours == theirs else (None, None)
        return None, None

    def last_layout(self, branch: str) -> TokenLayout | None:
        """Return the layout of a branch's last forward, or None."""
        layout, _ = self.layouts.get(branch, (None, 0))
        return layout

    def note_ran(self) -> None:
        """Note that a forward of the open branch ran, unless it ran beside another."""
        if self.beside[0] is None:
            self.ran[self.branch] = self.branches[-1].rows if self.nested else None

    def begin_run(self) -> None:
        """Forget what belongs to the last generation."""
        self.layouts: dict[str, tuple[TokenLayout, int]] = {}  # branch -> (layout, batch) of its last forward
        self.calls = 0  # number of the running forward among the calls that no context names
        self.calls_seen = Calls()  # what distinguishes these


def places(rows: Sequence[int] | None, theirs: Sequence[int] | None) -> tuple[int, ...] | None:
    """Find the place of each row among others, of which each serves once; None where one is not there.

    Rows that are None are all those of a forward, in their order.
    """
    if rows is None or theirs is None:
        return None if rows is None else tuple(rows)
    left, indices = list(theirs), []
    for row in rows:
        if row not in left:
            return None
        indices.append(left.index(row))
        left[indices[-1]] = -1
    return tuple(indices)


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


def lora_state(transformer: Any) -> Hashable:
    """Return a key of peft's chosen adapters and scales; empty where peft is not in use.

    Seen are adapters added, removed, chosen, rescaled, switched off or merged; not seen is a weight that is written to.
    """
    if not getattr(transformer, "peft_config", None):
        return ()
    return tuple(
        (
            tuple(layer.active_adapters),
            tuple(layer.scaling.items()),
            tuple(layer.merged_adapters),
            layer.disable_adapters,
        )
        for layer in transformer.modules()
        if hasattr(layer, "active_adapters") and hasattr(layer, "scaling")
    )


class RememberedTensors:
    """Tensors that a caller passed in, to be recognised when they come again: the same unchanged memory, or values.

    They are not copied, but for tensors of ``torch.inference_mode``, which do not tell whether they were written to.
    """

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._tensors = tuple(x.detach().clone() if x.is_inference() else x.detach() for x in tensors)
        self._versions = tuple(map(_version, self._tensors))
        self._memory = tuple(map(_memory, tensors))

    def is_unchanged_memory(self, tensors: tuple[Tensor, ...]) -> bool:
        """Tell whether these are the same tensors, not written to since; waits for nothing."""
        memory = tuple(map(_memory, tensors))
        return None not in (*self._versions, *memory) and self._memory == memory and self._is_intact()

    def has_values(self, tensors: tuple[Tensor, ...]) -> bool:
        """Tell whether these hold the same numbers; may wait for the device."""
        return (
            self._is_intact()
            and len(self._tensors) == len(tensors)
            and all(
                held.shape == other.shape and held.dtype == other.dtype and held.device == other.device
                for held, other in zip(self._tensors, tensors, strict=True)
            )
            and all(torch.equal(held, other) for held, other in zip(self._tensors, tensors, strict=True))
        )

    def _is_intact(self) -> bool:
        return self._versions == tuple(map(_version, self._tensors))


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


def _memory(x: Tensor) -> Any:
    """Return what tells a tensor's memory from any other's; None for a tensor that only wraps others."""
    try:
        address = x.data_ptr()
    except RuntimeError:  # a wrapper around other tensors, such as what a collective will have gathered
        return None
    return (address, x.shape, x.stride(), x.dtype, x.device) if address else None


def text_in(adapter: Adapter, inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Return the text in a forward's inputs, as its adapter names it, else all inputs but latents and timestep."""
    named = (getattr(adapter.cross_attention, "text", None), getattr(adapter.joined_text, "text", None))
    for name in (*named, "encoder_hidden_states"):
        if name is not None and (texts := tensors_in(inputs.get(name))):
            return texts
    values = (value for name, value in inputs.items() if name not in (adapter.latents, adapter.timestep))
    return tuple(x for value in values for x in tensors_in(value))


def tensors_in(value: Any) -> tuple[Tensor, ...]:
    """Return the tensors in an input, which may be one or a list of them."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(x for x in values if isinstance(x, Tensor))


class Calls:
    """The denoising calls of one transformer in one run, numbered as they were first seen."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._texts: dict[int, list[RememberedTensors]] = {}  # of each text the objects that it came in
        self._known: list[tuple[int | None, int]] = []  # number -> text, and which of the calls with it
        self._here: dict[tuple[int | None, int], None] = {}  # those of this timestep, in their order
        self._number: int | None = None
        self._since: int | None = None
        self.text: int | None = None  # number of the text of the last call; None: it held none
        self._times = Counter[int | None]()
        self._count: int | None = None

    def number(self, step: int, text: tuple[Tensor, ...], repeats: bool) -> tuple[int, bool]:
        """Return the number of a call, and whether what was learned so far may be another call's that had this number.

        Args:
            step: which of the different timesteps of the run is the call's, from 0.
            repeats: the scheduler evaluates the model twice at a timestep, so that all calls come again.
        """
        lost = False
        if step != self._number:  # calls are compared within a step, of which each text has as many as before
            if not text and not repeats:  # the n-th call is another one where there are more or fewer of them
                lost = self._count not in (None, len(self._here))
            self._count = len(self._here) if self._known else None
            self._number, self._here, self._times = step, {}, Counter()
        which = self.text = self._text_number(text)
        time = self._times[which]
        self._times[which] += 1
        if repeats and self._since != step:
            time %= max(1, sum(number == which for number, _ in self._known))
        call = which, time
        if call not in self._known and time == 0 and self._since != step and len(self._known) > len(self._here):
            # a text never seen, while one that was is still to come: it may be that one, changed
            lost, self._known = True, list(self._here)
            left = {which, *(number for number, _ in self._known)}
            self._texts = {number: objects for number, objects in self._texts.items() if number in left}
            self._since = step
        if not self._known:
            self._since = step
        if call not in self._known:
            self._known.append(call)
        self._here[call] = None
        return self._known.index(call), lost

    def _text_number(self, text: tuple[Tensor, ...]) -> int | None:
        if not text:
            return None
        for number, objects in self._texts.items():
            if any(held.is_unchanged_memory(text) for held in objects):
                return number
        for number, objects in self._texts.items():
            if any(held.has_values(text) for held in objects):
                objects[1:] = [RememberedTensors(text)]
                return number
        number = next(self._numbers)
        self._texts[number] = [RememberedTensors(text)]
        return number
