"""Which block lists a model has: those that its adapter describes, else what diffusers' registry of blocks knows."""

import fnmatch
import re
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModel
from .adapter import Adapter
from .blocks import BlockList

if TYPE_CHECKING:
    from torch import nn


def blocks_of(listed: BlockList, adapter: Adapter, transformer: "nn.Module") -> list[tuple[str, "nn.Module"]]:
    """Return (name, module) of a list's blocks, in running order; none where the model has no such list.

    Blocks that hold an attention which the adapter leaves dense in this model are left out: what runs through
    them is something else, such as the decoder's streams in a list that begins with encoder blocks.
    """
    named = re.compile(re.escape(listed.pattern).replace(r"\*", r"[^.]+")).fullmatch
    blocks = [(name, module) for name, module in transformer.named_modules() if named(name)]
    config: Any = transformer.config
    dense = adapter.always_dense(config) if adapter.always_dense else ()
    return [
        (name, module)
        for name, module in blocks
        if not any(fnmatch.fnmatch(f"{name}.{part}", at) for part, _ in module.named_modules() for at in dense)
    ]


def block_lists(adapter: Adapter, transformer: "nn.Module") -> tuple[BlockList, ...]:
    """Return the block lists that a model has, in the adapter's order; `UnsupportedModel` if it has none of them."""
    model = type(transformer).__name__
    if adapter.blocks is None:
        return _registered(adapter, transformer)
    if not adapter.blocks:
        raise UnsupportedModel(
            f"the adapter {adapter.name!r} describes no blocks, so that none of {model} can be skipped or cached; use "
            "a method that acts on the attention or on whole forwards"
        )
    lists = tuple(blocks for blocks in adapter.blocks if blocks_of(blocks, adapter, transformer))
    if not lists:
        raise UnsupportedModel(
            f"the adapter {adapter.name!r} looks for blocks {', '.join(b.pattern for b in adapter.blocks)} in {model} "
            "and finds none; correct the adapter's blocks"
        )
    return lists


def _registered(adapter: Adapter, transformer: "nn.Module") -> tuple[BlockList, ...]:
    """Return the lists of blocks that hold the adapter's attention modules, as diffusers' registry knows them."""
    lists = []
    for attention in (*adapter.self_attention, *adapter.side_attention):
        pattern = attention[: attention.rfind("*") + 1] or attention
        blocks = BlockList(pattern=pattern)
        modules = blocks_of(blocks, adapter, transformer)
        if modules and pattern not in [known.pattern for known in lists]:
            lists.append(registered_blocks(pattern, type(modules[0][1]), adapter.name))
    if not lists:
        raise UnsupportedModel(
            f"the adapter {adapter.name!r} finds no blocks around {', '.join(adapter.self_attention)} in "
            f"{type(transformer).__name__}; give the adapter blocks of its own"
        )
    return tuple(lists)


def registered_blocks(pattern: str, block: type, adapter: str) -> BlockList:
    """Make a block list of what diffusers' registry knows about a block class; `UnsupportedModel` if nothing."""
    from diffusers.hooks._helpers import TransformerBlockRegistry  # private to diffusers: used here and nowhere else

    try:
        known = TransformerBlockRegistry.get(block)
    except ValueError:
        raise UnsupportedModel(
            f"diffusers' block registry does not know {block.__name__} ({pattern}), and the adapter {adapter!r} "
            f"describes no blocks; give it blocks=(BlockList(pattern={pattern!r}, ...),)"
        ) from None
    visual, other = known.return_hidden_states_index, known.return_encoder_hidden_states_index
    if other is None:
        return BlockList(pattern=pattern, takes=(known.hidden_states_argument_name,))
    # diffusers tells the name since 0.42
    text = getattr(known, "encoder_hidden_states_argument_name", "encoder_hidden_states")
    takes = known.hidden_states_argument_name, text
    return BlockList(pattern=pattern, takes=takes, gives=(0, 1) if visual < other else (1, 0))
