"""Where a method may act on a transformer besides its attention: around forwards, around blocks, and on attributes.

The core gives every handler a site for each transformer; all that a method changes goes through it, so that the core
can undo it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.blocks import BlockList, Streams
from ..plan.context import StepContext


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardContext(StepContext):
    """A forward that is about to run.

    Attributes:
        inputs: the forward's inputs by name; tensors as the pipeline gives them.
    """

    inputs: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """One transformer block.

    Attributes:
        index: its place among all blocks that the adapter lists, in running order.
        name: its name in the transformer.
        module: the block.
        list: what the adapter says about its kind: which of its arguments and results are streams.
    """

    index: int
    name: str
    module: nn.Module
    list: BlockList


AroundForward = Callable[[ForwardContext, Callable[..., Any]], Any]
"""(context, run) -> output. ``run()`` runs what lies further in, ``run(name=value)`` with other inputs.

``run(whole=inputs, name=value)`` runs it on some of the tokens of ``inputs``, by whose layout methods go.
"""

AroundBlock = Callable[[StepContext, Block, Callable[[Streams], Streams], Streams], Streams]
"""(context, block, run, streams) -> streams. ``run(streams)`` runs what lies further in; else the block is skipped."""


AroundCall = Callable[[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Any]
"""(run, args, kwargs) -> output. ``run(*args, **kwargs)`` is the module's own call, compiled if it is."""


class Site(ABC):
    """One transformer as one handler sees it while it installs itself.

    Attributes:
        name: the component's name.
        transformer: the transformer.
        adapter: its adapter.
        pipe: the pipeline that the methods are attached to, or None: they are attached to the transformer alone.
        running: the pipeline in whose call the current forward runs; None in a loop written by hand, and outside
            forwards. It need not be ``pipe``: several pipelines may share a transformer.
        attention: index -> name of the attention modules that methods may change.
        compiled: it is compiled whole, so that nothing can run around its blocks.
        blocks: the transformer's blocks, in running order; `UnsupportedModel` if the adapter describes none.
    """

    name: str
    transformer: nn.Module
    adapter: Adapter
    pipe: Any
    running: Any
    attention: Mapping[int, str]
    compiled: bool
    blocks: tuple[Block, ...]

    @abstractmethod
    def around_forward(self, function: AroundForward) -> None:
        """Run ``function`` in place of every forward; it may skip the forward, run it again in a branch, or pass on."""

    @abstractmethod
    def around_blocks(self, function: AroundBlock, blocks: tuple[Block, ...] | None = None) -> None:
        """Run ``function`` in place of blocks (None: all); it may skip a block or change its streams."""

    @abstractmethod
    def around_module(self, module: nn.Module, function: AroundCall) -> None:
        """Run ``function`` in place of a submodule's calls; it and what holds it can't be compiled then."""

    @abstractmethod
    def stand_in(self, module: nn.Module, function: AroundCall) -> AbstractContextManager[None]:
        """Run ``function`` in place of a submodule's calls inside the block."""

    @abstractmethod
    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute, buffer or parameter of an object until the methods are detached."""

    @abstractmethod
    def on_detach(self, undo: Callable[[], None]) -> None:
        """Call ``undo`` when the methods are detached: for what only another library can take back."""

    @abstractmethod
    def branch(self, name: str, rows: Sequence[int] | None = None) -> AbstractContextManager[None]:
        """Let a forward inside the block be a nested branch that advances no step.

        Behind a forward of the branch that is open it runs beside that one: attention calls follow the plans made
        there, to which methods of `Phase.GUIDANCE` and those that act in the nested branch alone add theirs, and no
        method learns from them. Else it is a forward of its own, with state of its own.

        ``rows``: which rows of that branch's forward this one has; None: all.
        """

    @abstractmethod
    def reached(self) -> int:
        """Return how many of the attention layers that methods may change ran in the forward that ended last.

        Those of compiled blocks are not seen.
        """


def target_sample(of: Any) -> Tensor:
    """Return latents, or an output's prediction, as one tensor; of lists the last, before which images may be given.

    An image that is given does not change, and its prediction is 0: nothing can be measured by it.
    """
    sample: Any = of if isinstance(of, (Tensor, list)) else sample_of(of)
    while not isinstance(sample, Tensor):
        sample = sample[-1]
    return sample.detach()


def sample_of(output: Any) -> Tensor:
    """Return the prediction in a forward's output, whether it is that alone, a tuple or an output object."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, (tuple, list)) else output.sample


def with_sample(output: Any, sample: Tensor | list[Tensor]) -> Any:
    """Return a forward's output with another prediction; the rest, and the kind of output, stay."""
    if isinstance(output, Tensor):
        return sample
    if isinstance(output, tuple):
        return (sample, *output[1:])
    return type(output)(**{**dict(output), "sample": sample})
