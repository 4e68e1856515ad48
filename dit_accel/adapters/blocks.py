"""Block lists: where the transformer blocks of a model lie, and which arguments and results are its token streams.

A stream is a tensor of tokens that a block takes and gives back changed, such as the video's hidden states or, in joint
attention, the text's. Whoever skips, repeats or caches blocks reads and writes streams and nothing else.

A model may change a stream between two blocks, by a control branch or by text of a further layer. Whoever carries
something over several blocks asks whether the next one takes the very tensors that the one before it gave.
"""

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor, nn


Streams = tuple["Tensor | None", ...]
"""The streams of one block, the visual one first; None: a stream that the call lacks, or that the block ends."""

JOINT = ("hidden_states", "encoder_hidden_states")
"""What most blocks of joint attention call their two streams."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockList:
    """A list of transformer blocks of one kind, and the token streams that run through it.

    Attributes:
        pattern: module names of its blocks, such as ``transformer_blocks.*``; ``*`` stands for one part of a name.
        takes: the arguments that hold the streams, the visual stream first.
        gives: which stream each element of a block's result is, or None for one that is not a stream. A lone tensor is
            one element: ``(0,)``; several elements are a tuple.
        joined: the visual stream is the whole attention sequence: what the adapter's grid counts as text, references
            included, stands in it before and after the visual tokens.
        token_axis: axis of a stream that counts its tokens.
        beside: these blocks run beside the main ones, such as control branches: skipping one shortens no main path.

    Raises:
        ConfigError: for a pattern that names no list, or results that leave out or repeat a stream.
    """

    pattern: str
    takes: tuple[str, ...] = ("hidden_states",)
    gives: tuple[int | None, ...] = (0,)
    joined: bool = False
    token_axis: int = -2
    beside: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or "*" not in self.pattern:
            raise ConfigError(f"a block list needs a pattern such as 'transformer_blocks.*', got {self.pattern!r}")
        if not isinstance(self.takes, tuple) or not self.takes or len(set(self.takes)) < len(self.takes):
            raise ConfigError(
                f"blocks {self.pattern!r}: takes must be a tuple of different argument names, the visual stream's "
                f"first, got {self.takes!r}"
            )
        streams = sorted(stream for stream in self.gives if stream is not None)
        if not isinstance(self.gives, tuple) or streams != list(range(len(self.takes))):
            raise ConfigError(
                f"blocks {self.pattern!r}: gives must name each of the {len(self.takes)} streams once by its index in "
                f"takes, and None for what is not a stream, got {self.gives!r}"
            )

    @property
    def gives_streams_only(self) -> bool:
        """A result can be built from streams alone, so that a block may be skipped before it ever ran."""
        return None not in self.gives


@dataclass(frozen=True, slots=True)
class BlockSignature:
    """Where the streams stand in the calls and results of one block class; made by `block_signature`."""

    block: str  # the class's name, for errors
    # name, position (beyond every call's arguments for a keyword) and default of each stream's argument
    places: tuple[tuple[str, int, Any], ...]
    gives: tuple[int | None, ...]  # which stream each element of a result is; see `BlockList`

    def read_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Streams:
        """Return the streams among a call's arguments."""
        return tuple(
            kwargs[name] if name in kwargs else args[at] if at < len(args) else default
            for name, at, default in self.places
        )

    def write_call(
        self, streams: Sequence["Tensor | None"], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a call's arguments with other streams in their places; the given ones are not changed."""
        positional, named = list(args), dict(kwargs)
        for (name, at, _), stream in zip(self.places, streams, strict=True):
            if name in named:
                named[name] = stream
            elif at < len(positional):
                positional[at] = stream
            elif stream is not None:
                named[name] = stream
        return tuple(positional), named

    def read_result(self, result: Any) -> Streams:
        """Return the streams of a block's result; `UnsupportedModel` for one of another form than described."""
        elements = self._elements(result)
        return tuple(elements[self.gives.index(stream)] for stream in range(len(self.places)))

    def write_result(self, streams: Sequence["Tensor | None"], like: Any = None) -> Any:
        """Return a result that holds these streams, and what else a given one holds.

        ``like``: an earlier result of the block; None: the block never ran.
        """
        if like is None and None in self.gives:
            raise ConfigError(
                f"{self.block} gives more than its streams, which can't be made up; let it run once before skipping it"
            )
        elements = [None] * len(self.gives) if like is None else self._elements(like)
        arguments = [old if at is None else streams[at] for at, old in zip(self.gives, elements, strict=True)]
        return arguments[0] if len(arguments) == 1 else tuple(arguments)

    def _elements(self, result: Any) -> Sequence[Any]:
        several = isinstance(result, (tuple, list))
        elements = result if several else (result,)
        if len(elements) != len(self.gives) or several != (len(self.gives) > 1):
            returned = f"a {type(result).__name__} of {len(elements)}" if several else f"one {type(result).__name__}"
            described = "one tensor" if len(self.gives) == 1 else f"a tuple of {len(self.gives)}"
            raise UnsupportedModel(
                f"{self.block} gave {returned}, the adapter's blocks describe {described}; correct the adapter's blocks"
            )
        return elements


@cache
def block_signature(blocks: BlockList, block: "type[nn.Module]") -> BlockSignature:
    """Find the streams of a list in a block class's calls, once; `UnsupportedModel` if it lacks one."""
    parameters = list(inspect.signature(block.forward).parameters.values())[1:]
    names = [parameter.name for parameter in parameters]
    places = []
    for name in blocks.takes:
        if name not in names:
            raise UnsupportedModel(
                f"{block.__name__} has no argument {name!r}, which the blocks {blocks.pattern!r} should take; it has "
                f"{', '.join(names)}; correct the adapter's blocks"
            )
        parameter = parameters[names.index(name)]
        by_name = parameter.kind is inspect.Parameter.KEYWORD_ONLY
        default = None if parameter.default is inspect.Parameter.empty else parameter.default
        places.append((name, sys.maxsize if by_name else names.index(name), default))
    return BlockSignature(block.__name__, tuple(places), blocks.gives)
