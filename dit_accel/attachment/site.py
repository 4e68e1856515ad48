"""A transformer as a handler sees it while it installs itself, and what the core makes of what handlers ask for."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.block_lists import block_lists, blocks_of
from ..adapters.blocks import Streams, block_signature
from ..errors import ConfigError
from ..methods.site import AroundBlock, AroundCall, AroundForward, Block, Site
from .layers import TransformerState
from .offloaded import fetch, send_away
from .parallel import split_before
from .seam import is_compiled, shadow, wrap_call
from .state import DenoisingState

_MISSING = object()

COMPILED_MODULE = (
    "A method that acts on modules inside transformer blocks can't act inside a compiled graph; detach it, or do not "
    "compile what holds them"
)
"""Why compiled code and a method on the modules inside exclude each other."""

COMPILED_WHOLE = (
    "A method that acts on transformer blocks can't act inside a graph of the whole transformer; compile the blocks "
    "instead (transformer.compile_repeated_blocks()), or detach first"
)
"""Why a transformer that is compiled whole and a method on blocks exclude each other."""


class TransformerSite(Site):
    """One transformer as one handler sees it; the core undoes all that goes through it."""

    def __init__(
        self,
        denoising: DenoisingState,
        state: TransformerState,
        undo: list[Callable[[], None]],
        context: Callable[[str], Any] | None,
        compiled_whole: bool,
    ) -> None:
        self.name, self.transformer, self.adapter = state.name, state.transformer, state.adapter
        self._denoising = denoising
        self._state = state
        self._undo = undo
        self._context = context
        self._compiled_whole = compiled_whole
        self._blocks: tuple[Block, ...] | None = None
        self._uncompiled: set[int] = set()
        self.forwards: list[AroundForward] = []  # what to run around forwards, in the order in which it was requested
        self.around: dict[int, list[AroundBlock]] = {}  # block index -> what to run around it, in the same order

    @property
    def pipe(self) -> Any:
        return self._denoising.pipe

    @property
    def running(self) -> Any:
        return self._state.running

    @property
    def attention(self) -> Mapping[int, str]:
        names = {id(module): name for name, module in self.transformer.named_modules()}
        return {layer.index: names[id(layer.module)] for layer in self._state.layers}

    @property
    def on_modules(self) -> bool:
        """Whether methods run around blocks or modules inside the transformer."""
        return bool(self.around or self._uncompiled)

    @property
    def compiled(self) -> bool:
        return is_compiled(self.transformer) or self._compiled_whole

    @property
    def blocks(self) -> tuple[Block, ...]:
        if self._blocks is None:
            self._blocks = find_blocks(self.adapter, self.transformer)
        return self._blocks

    def around_forward(self, function: AroundForward) -> None:
        self.forwards.append(function)

    def around_blocks(self, function: AroundBlock, blocks: tuple[Block, ...] | None = None) -> None:
        for block in self.blocks if blocks is None else blocks:
            self.around.setdefault(block.index, []).append(function)

    def around_module(self, module: nn.Module, function: AroundCall) -> None:
        path = next(name for name, inner in self.transformer.named_modules() if inner is module).split(".")
        for depth in range(len(path) + 1):
            name = ".".join(path[:depth])
            holder = self.transformer.get_submodule(name)
            if id(holder) in self._uncompiled:
                continue
            if is_compiled(holder) or self._compiled_whole:
                raise ConfigError(f"{'.'.join(filter(None, (self.name, name)))} is compiled. {COMPILED_MODULE}")
            self._uncompiled.add(id(holder))
            self._undo.append(shadow(holder, "compile", functools.partial(_refuse, COMPILED_MODULE)))
        self._undo.append(wrap_call(module, function))

    @contextlib.contextmanager
    def stand_in(self, module: nn.Module, function: AroundCall) -> Iterator[None]:
        undo = wrap_call(module, function)
        try:
            yield
        finally:
            undo()

    def replace(self, owner: Any, name: str, value: Any) -> None:
        tables = getattr(owner, "_buffers", {}), getattr(owner, "_parameters", {})
        holder = next((table for table in tables if name in table), owner.__dict__)
        old = holder.get(name, _MISSING)
        holder[name] = value

        def restore() -> None:
            now = holder.get(name)
            moved = isinstance(now, Tensor) and isinstance(value, Tensor) and now.shape == value.shape
            if now is not value and not moved:
                return  # whatever the user set since then is the user's
            if old is _MISSING:
                del holder[name]
            elif isinstance(now, Tensor) and isinstance(old, Tensor):
                holder[name] = old.to(now.device)  # the module may have been moved to another device
            else:
                holder[name] = old

        self._undo.append(restore)

    def on_detach(self, undo: Callable[[], None]) -> None:
        self._undo.append(undo)

    def reached(self) -> int:
        engine = self._denoising.engine
        return sum(engine.layers[number].state is self._state for number in engine.forward.reached)

    @contextlib.contextmanager
    def branch(self, name: str, rows: Sequence[int] | None = None) -> Iterator[None]:
        state, denoising = self._state, self._denoising
        with denoising.engine.forward.nested(), denoising.nested(state, name, rows) as full, self._opened(full):
            yield
        if state.branches and self._context is not None:  # diffusers forgets the outer one with the inner
            state.branches[-1].reopened.enter_context(self._context(state.branches[-1].name))

    def _opened(self, branch: str) -> Any:
        return contextlib.nullcontext() if self._context is None else self._context(branch)

    def install_blocks(self) -> None:
        """Wrap the blocks that methods requested; `ConfigError` in a transformer that is compiled whole."""
        if not self.around:
            return
        if self.compiled:
            raise ConfigError(f"{self.name} is compiled whole. {COMPILED_WHOLE}")
        self._undo.append(shadow(self.transformer, "compile", functools.partial(_refuse, COMPILED_WHOLE)))
        for block in self.blocks:
            functions = self.around.get(block.index)
            around = self._around_block(block, functions) if functions else _fetched(block.module)
            self._undo.append(wrap_call(block.module, around))

    def _around_block(self, block: Block, functions: list[AroundBlock]) -> Callable[..., Any]:
        """Wrap a block: take its streams out of the call, let methods change them, and put them into the result."""
        signature = block_signature(block.list, type(block.module))
        last: list[Any] = [None]  # what a block gave besides its streams, for when it is skipped

        def around(run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            args, kwargs, run = split_before(block.module, run, args, kwargs)
            skipped = True

            def innermost(streams: Streams) -> Streams:
                nonlocal skipped
                skipped = False
                fetch(block.module)
                positional, named = signature.write_call(streams, args, kwargs)
                result = run(*positional, **named)
                if not block.list.gives_streams_only:
                    last[0] = result
                return signature.read_result(result)

            inner: Callable[[Streams], Streams] = innermost
            context = self._denoising.context(self._state)
            for function in functions:
                inner = functools.partial(function, context, block, inner)
            result = signature.write_result(inner(signature.read_call(args, kwargs)), like=last[0])
            if skipped:
                send_away(block.module)
            return result

        return around


def _refuse(why: str, *args: Any, **kwargs: Any) -> None:
    raise ConfigError(why)


def _fetched(module: nn.Module) -> AroundCall:
    """Wrap a block that no method acts on, where others of its offload group may be skipped."""

    def around(run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        fetch(module)
        return run(*args, **kwargs)

    return around


def find_blocks(adapter: Adapter, transformer: nn.Module) -> tuple[Block, ...]:
    """Return a transformer's blocks in running order, as its adapter describes them; not those beside the main ones."""
    listed = [
        (blocks, name, module)
        for blocks in block_lists(adapter, transformer)
        if not blocks.beside
        for name, module in blocks_of(blocks, adapter, transformer)
    ]
    return tuple(
        Block(index=index, name=name, module=module, list=blocks) for index, (blocks, name, module) in enumerate(listed)
    )
