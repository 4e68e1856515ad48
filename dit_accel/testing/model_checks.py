"""Checks of what an adapter says of a model: which modules attend, where tokens lie, what is refused, what compiles."""

import contextlib
import copy
import fnmatch
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..adapters.installed import adapters
from ..attachment.attachment import attach, attachment_of
from ..errors import ConfigError
from ..methods import registry
from ..methods.find import attention_modules
from .everything import FromStepOne, planned
from .recording import recorded, require, require_as_planned, require_same, silenced, stopped_at
from .tiny_models import Case, wide_inputs


def check_places(case: Case) -> None:
    """The adapter names self-attention modules and all of them; every other attention module is left alone."""
    name = type(case.transformer).__name__
    known = {name: adapter for adapter in adapters().values() for name in adapter.transformers}
    problem = f"{name} is registered for another adapter object" if name in known else f"no adapter covers {name}"
    install = "install the package whose entry point gives this adapter"
    require(known.get(name) is case.adapter, f"{problem}; {install}, and import the adapter from there")
    forward = list(inspect.signature(type(case.transformer).forward).parameters)[1:]
    for requested in (case.adapter.latents, case.adapter.timestep):
        require(requested in forward, f"forward has no input {requested!r}; it has {', '.join(forward)}")
    attended = {n: m.processor for n, m in case.transformer.named_modules() if hasattr(m, "processor")}
    places = [n for n, _, _ in attention_modules(case.transformer, case.adapter)]
    require(len(set(places)) == len(places), f"patterns overlap: {places}")
    alone = {n for n in attended if any(fnmatch.fnmatch(n, pattern) for pattern in case.model.left_alone)}
    require(not alone & set(places), f"left_alone names modules of the adapter: {sorted(alone & set(places))}")
    unknown = set(attended) - alone - set(places)
    require(not unknown, f"neither the adapter nor left_alone names {sorted(unknown)}")
    with attach(case.transformer, preset="none"):
        touched = {
            n for n, processor in attended.items() if case.transformer.get_submodule(n).processor is not processor
        }
        wrong = sorted(touched ^ set(places))
        require(not wrong, f"attach touched {wrong} beyond the adapter's modules, or missed them")


def check_full(case: Case) -> None:
    """Every call sent to the kernels with all tiles kept is dense attention, each call and the whole model."""
    inputs = case.inputs(2)
    with planned(case.transformer, case.adapter) as attachment, recorded(attachment) as calls:
        case.run(inputs)
    require_as_planned(calls)
    wide, inputs = case.wide(), wide_inputs(inputs)
    expected = case.run(inputs, transformer=wide)
    with planned(wide, case.adapter):
        require_same(case.run(inputs, transformer=wide), expected, "all tiles kept and dense differ")


def check_layout(case: Case) -> None:
    """A changed latent changes the one token that the grid says, and no text token."""
    inputs = case.inputs(1)
    with silenced(case.transformer), planned(case.transformer, case.adapter) as attachment:
        with recorded(attachment) as calls:
            case.run(inputs)
        longest = max(call.k.shape[2] for call in calls)

        def values(latents: Tensor) -> Tensor:
            with stopped_at(attachment, longest) as seen:
                case.run(case.with_latents(inputs, latents))
            return seen[0]

        latents = case.latents(inputs)
        still = values(latents)
        frames, height, width, before, after = attachment.engine.forward.sizes
        visual, hit, apart = frames * height * width, set(), 0

        def tokens_along(axis: int, base: list[int]) -> Iterator[int]:
            for index in range(latents.shape[axis]):
                changed = latents.clone()
                changed[(*base[:axis], index, *base[axis + 1 :])] += 1.0
                moved = (values(changed) != still).any(1).nonzero().flatten().tolist()
                if packed and not moved:  # text has a place among the latents
                    moved = [-1]
                require(len(moved) == 1, f"latent {index} of axis {axis} moves the tokens {moved}, not one")
                yield moved[0] - before

        # Tokens of text or reference frames may stand first among the latents: the walk begins where the grid does.
        base, packed = [0] * latents.ndim, latents.ndim in (3, 6)
        for axis in range(1, latents.ndim if packed or case.model.reference_frames else 1):
            base[axis] = next((i for i, token in enumerate(tokens_along(axis, base)) if token == 0), 0)
        for axis in range(1, latents.ndim):
            tokens = list(tokens_along(axis, base))
            inside = [token for token in tokens if 0 <= token < visual]
            outside = [token for token in tokens if token not in inside]
            if packed:  # further images may stand beside the first, as tokens that the grid counts as text
                require(max(tokens) < visual + after, f"latents lie in token {max(tokens)}, beyond all the grid counts")
            else:
                apart += len(outside)
            first = tokens[base[axis]]
            require(first == 0, f"the first visual token is {first + before}, the adapter says {before}")
            require(
                apart <= case.model.reference_frames,
                f"latents lie in token {max(outside, default=0)}, the adapter counts {visual} visual tokens",
            )
            steps = {b - a for a, b in itertools.pairwise(inside)} - {0}
            require(
                len(steps) < 2 and steps <= {1, width, height * width},
                f"along axis {axis} the latents lie in the tokens {inside}, not as in {(frames, height, width)}",
            )
            hit.update(inside)
        require({width - 1, (height - 1) * width, (frames - 1) * height * width} <= hit, "the grid is larger than that")
        require(apart == case.model.reference_frames, f"the model has {apart} reference frames among its latents")
        require(len(still) <= before + visual + after, "the sequence is longer than the grid and its text")


def check_signal(case: Case) -> str | None:
    """A signal is a tensor of the forward: what its first attention gets, or what an embedding gives, bit for bit."""
    if case.adapter.signal is None:
        return "the adapter describes no signal"
    inputs, seen = case.inputs(2), []
    (_, first, _), *_ = attention_modules(case.transformer, case.adapter)

    def see_input(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    with contextlib.ExitStack() as stack:
        stack.callback(first.register_forward_pre_hook(see_input, with_kwargs=True).remove)
        for module in case.transformer.modules():
            stack.callback(module.register_forward_hook(lambda module, args, output: seen.append(output)).remove)
        case.run(inputs)
    for make in filter(None, (case.adapter.signal, case.adapter.projected_signal)):
        with torch.no_grad():
            signal = make(case.transformer, inputs)
        same = any(isinstance(x, Tensor) and x.shape == signal.shape and torch.equal(x, signal) for x in seen)
        require(same, f"the signal {list(signal.shape)} is nothing that the forward makes")
    return None


def check_refused(case: Case) -> str | None:
    """A method that makes no sense here is refused with the reason, and nothing stays."""
    if not case.adapter.refused:
        return "nothing is refused"
    for name, reason in case.adapter.refused.items():
        config = registry.methods().get(name)
        if config is None:
            raise AssertionError(f"the adapter refuses {name!r}, which is not a method")
        try:
            attach(case.transformer, config())
        except ConfigError as error:
            require(reason in str(error), f"the refusal of {name} does not give the reason: {error}")
        else:
            raise AssertionError(f"{name} is refused by the adapter and was attached")
        require(attachment_of(case.transformer) is None, f"the refusal of {name} left something attached")
    return None


def check_compile(case: Case) -> None:
    """Blocks compile full-graph, to twice the graphs of the untouched model at most: dense and planned.

    One kind of block makes one graph, or more where its inputs differ: in the first block they often are slices.
    """
    inputs = case.inputs(1)
    with planned(case.transformer, case.adapter, FromStepOne):
        eager = [case.run(inputs, step) for step in range(2)]
    with _compiled(case) as (transformer, graphs):
        case.run(inputs, transformer=transformer)
        untouched = graphs()
    with _compiled(case) as (transformer, graphs), planned(transformer, case.adapter, FromStepOne):
        for step, expected in enumerate(eager):
            torch.testing.assert_close(case.run(inputs, step, transformer=transformer), expected)
        require(untouched > 0, "no block of its own runs")
        require(graphs() <= 2 * untouched, f"the blocks made {graphs()} graphs, the untouched ones {untouched}")


def _block_of(transformer: Any, name: str) -> str:
    """Return the name of the block that holds an attention module: of a repeated kind, or just what holds it."""
    parts = name.split(".")
    above = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
    kinds = getattr(transformer, "_repeated_blocks", None) or ()
    return next((n for n in above if type(transformer.get_submodule(n)).__name__ in kinds), above[0])


@contextlib.contextmanager
def _compiled(case: Case) -> Iterator[tuple[Any, Callable[[], int]]]:
    """Give a copy of the transformer with compiled blocks, and a counter of their graphs."""
    from torch._dynamo.utils import counters

    transformer = copy.deepcopy(case.transformer)
    places = attention_modules(transformer, case.adapter)
    for name in sorted({_block_of(transformer, name) for name, _, _ in places}):
        transformer.get_submodule(name).compile(fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    counters.clear()
    try:
        yield transformer, lambda: counters["stats"]["unique_graphs"]
    finally:
        torch._dynamo.reset()
