"""Proposes an adapter by running a tiny model: what attends over the latents, where text lies, blocks and positions.

What a run can't show is left to whoever writes the adapter, such as how its pipelines guide.
"""

import contextlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapter import Adapter, latents_grid
from ..adapters.block_lists import block_lists, blocks_of
from ..adapters.blocks import BlockList, block_signature
from ..adapters.installed import adapters
from ..adapters.rotary import Rope
from ..errors import ConfigError, UnsupportedModel
from .rope_checks import check_rope
from .tiny_models import Case, TinyModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What a tiny model's run shows.

    Attributes:
        adapter: the adapter, with all that a run can show; its name is the class's.
        grid_found: `latents_grid` reads the grid; else a function must be written.
        rope_of: the installed adapter whose description of rotary positions fits the model too; None: none does.
        left_alone: patterns of the attention modules that attend to something else, for `TinyModel.left_alone`.
    """

    adapter: Adapter
    grid_found: bool
    rope_of: str | None = None
    left_alone: tuple[str, ...] = ()

    def source(self) -> str:
        """Return the adapter as code."""
        adapter = self.adapter
        lines = [f"name={adapter.name!r},", f"transformers={adapter.transformers!r},"]
        lines += [f"self_attention={adapter.self_attention!r},"]
        if not self.grid_found:
            lines += ["grid=...,  # a function (config, inputs) -> (frames, height, width, text before, text after)"]
        elif isinstance(adapter.grid, partial):
            options = ", ".join(f"{name}={value!r}" for name, value in adapter.grid.keywords.items())
            lines += [f"grid=partial(latents_grid, {options}),"]
        if adapter.blocks is not None:
            named = [f"pattern={spec.pattern!r}, takes={spec.takes!r}, gives={spec.gives!r}" for spec in adapter.blocks]
            lines += [f"blocks=({' '.join(f'BlockList({text}),' for text in named)}),"]
        if self.rope_of is not None:
            lines += [f"rope=adapters()[{self.rope_of!r}].rope,  # from dit_accel.adapters.installed"]
        alone = [f"# left_alone={self.left_alone!r}"] if self.left_alone else []
        return "\n".join(["Adapter(", *(f"    {line}" for line in lines), ")", *alone])


def propose_adapter(model: TinyModel) -> Proposal:
    """Run a tiny model and return the adapter that it shows.

    Args:
        model: the transformer class, its config and inputs; ``left_alone`` is not needed.

    Raises:
        ConfigError: if no attention module ran.
    """
    torch.manual_seed(0)
    transformer, inputs = model.transformer(**model.config).eval(), dict(model.inputs(1))
    for parameter in transformer.parameters():
        if parameter.ndim > 1 and not parameter.any():  # a gate of an untrained model hides what stands behind it
            nn.init.normal_(parameter, std=0.1)
    run = _run(transformer, inputs)
    squares = [queries for shapes in run.shapes().values() for queries, keys in shapes if queries == keys]
    if not squares:
        raise ConfigError(
            f"no attention of {model.transformer.__name__} ran scaled_dot_product_attention over one sequence; no "
            "adapter can cover it"
        )
    tokens = max(squares)
    options = _grid_options(transformer, inputs, run, tokens)
    attends = tuple(pattern for pattern, calls in run.shapes().items() if (tokens, tokens) in calls)
    adapter = Adapter(
        name=re.sub(r"Transformer\w*$", "", model.transformer.__name__).lower(),
        transformers=(model.transformer.__name__,),
        self_attention=attends,
        grid=partial(latents_grid, **options) if options else latents_grid,
    )
    alone = tuple(pattern for pattern in run.shapes() if pattern not in attends)
    adapter = _with_blocks(adapter, transformer, run)
    like = _like_rope(adapter, model) if options is not None else None
    adapter = adapter if like is None else replace(adapter, rope=adapters()[like].rope)
    return Proposal(adapter=adapter, grid_found=options is not None, rope_of=like, left_alone=alone)


@dataclass
class _Run:
    """What one forward did.

    Attributes:
        calls: attention module -> (queries, keys) of each of its calls.
        queries: attention module -> the queries of its first call, [S, H, D].
        blocks: module -> its arguments by name and its result, in the order of the calls.
    """

    calls: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    queries: dict[str, Tensor] = field(default_factory=dict)
    blocks: dict[str, tuple[Mapping[str, Any], Any]] = field(default_factory=dict)

    def shapes(self) -> dict[str, set[tuple[int, int]]]:
        """Return the shapes of the calls by the pattern of their modules, ``*`` for each number."""
        shapes: dict[str, set[tuple[int, int]]] = {}
        for name, calls in self.calls.items():
            shapes.setdefault(_pattern(name), set()).update(calls)
        return shapes


def _pattern(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _tokens(grid: Any) -> int:
    frames, height, width, before, after = grid
    return frames * height * width + before + after


def _run(transformer: Any, inputs: Mapping[str, Any]) -> _Run:
    """Run a forward and return what it did."""
    run, inside, plain = _Run(), [], F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if inside:
            run.calls.setdefault(inside[-1], []).append((query.shape[2], key.shape[2]))
            run.queries.setdefault(inside[-1], query[0].transpose(0, 1).detach().clone())
        return plain(query, key, *args, **kwargs)

    def note(module: nn.Module, args: Any, kwargs: Any, result: Any, name: str) -> None:
        inputs = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        run.blocks.setdefault(name, (inputs, result if isinstance(result, tuple) else (result,)))

    with contextlib.ExitStack() as stack, torch.no_grad():
        for name, module in transformer.named_modules():
            if hasattr(module, "processor"):
                hooks = (
                    module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)),
                    module.register_forward_hook(lambda *_: inside.pop() and None),
                )
            elif name.rpartition(".")[2].isdigit():
                hooks = (module.register_forward_hook(partial(note, name=name), with_kwargs=True),)
            else:
                continue
            for hook in hooks:
                stack.callback(hook.remove)
        F.scaled_dot_product_attention = attend
        stack.callback(setattr, F, "scaled_dot_product_attention", plain)
        transformer(**inputs, return_dict=False)
    return run


def _grid_options(transformer: Any, inputs: Mapping[str, Any], run: _Run, tokens: int) -> dict[str, Any] | None:
    """Return the arguments with which `latents_grid` counts all tokens of the longest calls, or None."""
    readings: list[dict[str, Any]] = [{}, {"frames_axis": 1}, {"frames_axis": None}, {"channels_last": True}]
    for text in ("none", "before"):
        for reading in readings:
            options = reading if text == "none" else {**reading, "text": text}
            with contextlib.suppress(Exception):  # the latents have another shape, or the config other names
                if _tokens(latents_grid(transformer.config, inputs, **options)) == tokens:
                    return options if text == "none" else {**options, "text": _side(transformer, inputs, run, tokens)}
    return None


def _side(transformer: Any, inputs: Mapping[str, Any], run: _Run, tokens: int) -> str:
    """Return whether text stands before or after the visual tokens: where other latents change no query."""
    first = next(name for name, calls in run.calls.items() if (tokens, tokens) in calls)
    moved = _run(transformer, {**inputs, "hidden_states": inputs["hidden_states"] + 1}).queries[first]
    changed = (moved != run.queries[first]).flatten(1).any(1)
    return "after" if bool(changed[0]) else "before"


def _with_blocks(adapter: Adapter, transformer: Any, run: _Run) -> Adapter:
    """Return the adapter with its block lists, where diffusers' own registry of blocks does not know them."""
    with contextlib.suppress(UnsupportedModel):
        for listed in block_lists(adapter, transformer):
            for _, module in blocks_of(listed, adapter, transformer):
                block_signature(listed, type(module))
        return adapter
    lists = [_streams(pattern[: pattern.rfind("*") + 1], run) for pattern in adapter.self_attention]
    blocks = tuple(entry for entry in lists if entry is not None)
    return replace(adapter, blocks=blocks) if blocks and len(blocks) == len(lists) else adapter


def _like_rope(adapter: Adapter, model: TinyModel) -> str | None:
    """Return the installed adapter whose description of rotary positions passes every check on a model, or None."""
    tried: list[Rope] = []
    for name, known in adapters().items():
        if not isinstance(known.rope, Rope) or known.rope in tried:
            continue
        tried.append(known.rope)
        with contextlib.suppress(Exception):  # it looks for parts or entries that this model does not have
            if check_rope(Case(replace(adapter, rope=known.rope), model)) is None:
                return name
    return None


def _streams(pattern: str, run: _Run) -> BlockList | None:
    """Return a list of blocks whose streams are the tensors that one block gives and the next one takes."""
    calls = [call for name, call in run.blocks.items() if _pattern(name) == pattern]
    if len(calls) < 2:
        return None
    (_, outs), (taken, _) = calls[:2]
    takes = tuple(
        name for name, value in taken.items() if isinstance(value, Tensor) and any(value is out for out in outs)
    )
    gives = tuple(next((i for i, name in enumerate(takes) if taken[name] is out), None) for out in outs)
    return BlockList(pattern=pattern, takes=takes, gives=gives) if takes else None
