"""Check an adapter's block lists: each block and stream is where it says, and a skipped block hands its streams on."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters.block_lists import block_lists, blocks_of
from ..adapters.blocks import BlockList, BlockSignature, Streams, block_signature
from ..attachment.seam import wrap_call
from ..methods.find import attention_modules
from .recording import require
from .tiny_models import Case


class Block(NamedTuple):
    """One block of a model under check."""

    name: str
    module: nn.Module
    blocks: BlockList
    signature: BlockSignature


Call = Callable[[Block, Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Any]
"""(block, what runs it, args, kwargs) -> what the model gets of it."""


def check_blocks(case: Case) -> str | None:
    """Raise `AssertionError` unless the adapter's block lists describe the model.

    Every block that holds an attention of the adapter is in a list, and runs once, in the lists' order; its streams
    are tensors that keep their shapes; taking them out and putting them back changes nothing, bit for bit; and
    skipped blocks hand the streams that they were given on to the next, stream by stream.
    """
    if case.adapter.blocks == ():
        return "the adapter describes no blocks"
    blocks = blocks_in(case)
    _require_covered(case, blocks)
    inputs = case.inputs(2)
    plain = case.run(inputs)
    results = _require_streams(case, inputs, blocks, plain)
    with replaced(blocks, _with_copies):
        require(torch.equal(case.run(inputs), plain), "putting copies of the streams back changes the output")
    _require_handed_on(case, inputs, blocks, results)
    lasts = list({block.blocks: block for block in blocks}.values())
    with replaced(lasts, partial(skipped, results)):
        out = case.run(inputs)
    description = f"without {', '.join(block.name for block in lasts)} the output is not finite"
    require(out.shape == plain.shape and bool(out.isfinite().all()), description)
    return None


def blocks_in(case: Case) -> list[Block]:
    """Return the blocks of a model that its adapter lists, in the lists' order."""
    return [
        Block(name, module, listed, block_signature(listed, type(module)))
        for listed in block_lists(case.adapter, case.transformer)
        for name, module in blocks_of(listed, case.adapter, case.transformer)
    ]


@contextlib.contextmanager
def replaced(blocks: Sequence[Block], call: Call) -> Iterator[None]:
    """Let ``call`` run in place of blocks."""
    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.callback(wrap_call(block.module, partial(call, block)))
        yield


def _with_copies(block: Block, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Put copies of the streams among a block's arguments and into its result."""
    args, kwargs = block.signature.write_call(_copied(block.signature.read_call(args, kwargs)), args, kwargs)
    result = run(*args, **kwargs)
    return block.signature.write_result(_copied(block.signature.read_result(result)), like=result)


def _copied(streams: Streams) -> Streams:
    return tuple(None if stream is None else stream.clone() for stream in streams)


def skipped(results: dict[str, Any], block: Block, run: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Hand on the streams that a block is given; what it gives besides is taken from its earlier result."""
    return _handed_on(results, block, block.signature.read_call(args, kwargs))


def _handed_on(results: dict[str, Any], block: Block, streams: Sequence[Tensor | None]) -> Any:
    like = None if block.blocks.gives_streams_only else results[block.name]
    return block.signature.write_result(streams, like=like)


def _require_covered(case: Case, blocks: Sequence[Block]) -> None:
    names = [block.name for block in blocks]
    require(len(set(names)) == len(names), f"block lists overlap: {names}")
    for attention, _, _ in attention_modules(case.transformer, case.adapter):
        inside = any(attention.startswith(f"{name}.") for name in names)
        require(inside, f"{attention} lies in no block of the lists {', '.join(names)}")


def _require_streams(case: Case, inputs: dict[str, Any], blocks: Sequence[Block], plain: Tensor) -> dict[str, Any]:
    """Check order, shapes and lengths of the streams in an untouched forward; return each block's result."""
    results: dict[str, Any] = {}
    lengths = {}

    def recorded(block: Block, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        require(block.name not in results, f"{block.name} runs more than once in a forward")
        streams = block.signature.read_call(args, kwargs)
        for name, stream in zip(block.blocks.takes, streams, strict=True):
            require(isinstance(stream, Tensor), f"{block.name}: {name} is not a stream, it holds {stream!r:.60}")
        versions = [stream._version for stream in streams if stream is not None]
        results[block.name] = result = run(*args, **kwargs)
        left = block.signature.read_result(result)
        for name, stream, version, after in zip(block.blocks.takes, streams, versions, left, strict=True):
            assert stream is not None
            shape = None if after is None else list(after.shape)
            require(
                shape in (None, list(stream.shape)), f"{block.name} takes {name} {list(stream.shape)}, gives {shape}"
            )
            require(stream._version == version, f"{block.name} changes {name} in place")
        assert streams[0] is not None
        require(left[0] is not None, f"{block.name} ends its visual stream")
        lengths[block.name] = streams[0].shape[block.blocks.token_axis]
        return result

    with replaced(blocks, recorded):
        require(torch.equal(case.run(inputs), plain), "recording the blocks changes the output")
    for beside in (False, True):
        listed = [block.name for block in blocks if block.blocks.beside == beside]
        ran = [name for name in results if name in listed]
        require(ran == listed, f"blocks run in the order {', '.join(ran)}, the lists say {', '.join(listed)}")
    _require_lengths(case, inputs, blocks, lengths)
    return results


def _require_lengths(case: Case, inputs: dict[str, Any], blocks: Sequence[Block], lengths: dict[str, int]) -> None:
    config: Any = case.transformer.config
    grid = case.adapter.grid(config, inputs)
    if isinstance(grid, str):
        return
    frames, height, width, before, after = grid
    whole = frames * height * width + before + after
    for block in blocks if before + after else ():
        joined = lengths[block.name] == whole
        description = "the whole sequence" if block.blocks.joined else "not the whole sequence"
        require(
            joined == block.blocks.joined,
            f"{block.name}: its visual stream has {lengths[block.name]} of the sequence's {whole} tokens, and "
            f"joined={block.blocks.joined} says {description}",
        )


def _require_handed_on(case: Case, inputs: dict[str, Any], blocks: Sequence[Block], results: dict[str, Any]) -> None:
    """Check that each block of a list gets the streams that the one before it got, where all are skipped.

    What a block gives back as one stream must reach that stream of the next block, and no other. That is checked by
    changing it, and not by equality: a model may add to streams between its blocks, such as by a control branch.
    """

    def skip_all(shifted: int | None = None) -> dict[str, tuple[Tensor, ...]]:
        taken: dict[str, tuple[Tensor, ...]] = {}

        def skip(block: Block, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            streams = block.signature.read_call(args, kwargs)
            taken[block.name] = tuple(stream for stream in streams if stream is not None)
            require(len(taken[block.name]) == len(streams), f"{block.name} lacks a stream where all are skipped")
            moved = [stream + (at == shifted) for at, stream in enumerate(taken[block.name])]
            return _handed_on(results, block, moved if shifted is not None else streams)

        with replaced(blocks, skip):
            out = case.run(inputs)
        require(bool(out.isfinite().all()), "with all blocks skipped the output is not finite")
        return taken

    taken = skip_all()
    pairs = [(one, two) for one, two in itertools.pairwise(blocks) if one.blocks is two.blocks]
    for stream in range(max(len(block.blocks.takes) for block in blocks)):
        shifted = skip_all(stream)
        for one, two in pairs:
            if stream < len(one.blocks.takes):
                name, old, new = one.blocks.takes[stream], taken[one.name], taken[two.name]
                require(old[stream].shape == new[stream].shape, f"{two.name} gets another {name} than {one.name} gave")
                moved = [not torch.equal(a, b) for a, b in zip(new, shifted[two.name], strict=True)]
                description = [at == stream for at in range(len(moved))]
                require(
                    moved == description, f"{two.name} does not get its {name} from what {one.name} gives as {name}"
                )
