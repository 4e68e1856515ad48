"""Whether the methods can run under a transformer's context parallelism, and whether its processes run alike."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, ProcessLost
from .engine import Engine
from .layers import TransformerState
from .state import DenoisingState

SAMPLES = 16
"""Numbers of the first latents by which processes tell whether they began with the same noise."""

_LOST = ("connection closed", "connection reset", "connection refused", "broken pipe", "timed out")
"""What gloo says, in errors of no class of their own, where a process is gone."""


def context_parallel(transformer: Any) -> Any:
    """Return diffusers' ``ContextParallelConfig`` of a transformer, or None."""
    return getattr(getattr(transformer, "_parallel_config", None), "context_parallel_config", None)


def require_parallel(engine: Engine, state: TransformerState, config: Any) -> None:
    """Raise `ConfigError` for context parallelism under which the attached methods would be wrong, on every process."""
    native = [handler.name for handler in engine.handlers if handler.objects]
    if native:
        raise ConfigError(
            f"{native[0]} is diffusers' own cache, whose processes would decide each by its own tokens under context "
            "parallelism; use a cache of this package, such as EasyCache or FirstBlockCache, or disable parallelism"
        )
    names = ", ".join(handler.name for handler in engine.attention)
    if not names:
        return
    looking = ", ".join(handler.name for handler in engine.attention if not handler.by_place)
    if config.ring_degree > 1 and looking:
        raise ConfigError(
            f"{looking}: ring_degree = {config.ring_degree} leaves a process the queries of its own tokens alone, and "
            "what is kept follows from others' too; use ContextParallelConfig(ulysses_degree=...)"
        )
    if config.ring_degree > 1 and config.ulysses_degree > 1:
        raise ConfigError(
            f"{names}: methods on attention run under ring attention or Ulysses, got ring_degree = "
            f"{config.ring_degree} with ulysses_degree = {config.ulysses_degree}; set one of them to 1"
        )
    if state.adapter.split_text is None:
        raise ConfigError(
            f"{names}: the adapter {state.adapter.name!r} does not say how context parallelism splits its tokens, so "
            "methods on attention can't distinguish them; disable parallelism, or give the adapter split_text"
        )
    for layer in state.layers:
        if not hasattr(layer.processor, "_parallel_config"):
            raise ConfigError(
                f"{names}: {type(layer.processor).__name__} of {state.name} knows no context parallelism, so each "
                "process would attend over its own tokens alone; disable parallelism"
            )
        if layer.heads % config.ulysses_degree and not config.ulysses_anything:
            raise ConfigError(
                f"ulysses_degree = {config.ulysses_degree} does not divide the {layer.heads} heads of {state.name}; "
                "choose a degree that does, or ulysses_anything=True"
            )
        # with ulysses_anything the last process has what the others, which round up, leave
        if (config.ulysses_degree - 1) * -(-layer.heads // config.ulysses_degree) >= layer.heads:
            raise ConfigError(
                f"ulysses_degree = {config.ulysses_degree} leaves a process none of the {layer.heads} heads of "
                f"{state.name}; choose a smaller degree"
            )


def require_agreement(denoising: DenoisingState, state: TransformerState, config: Any, latents: Tensor) -> None:
    """Raise `ConfigError` on all processes if their methods, sizes or first latents differ as a run begins."""
    import torch.distributed as dist

    engine, group = denoising.engine, config._flattened_mesh.get_group()
    mine = {
        "methods": {handler.name: handler.settings.to_dict() for handler in engine.handlers},
        "layers": [layer.index for layer in state.layers],
        "backend": engine.backend,
        "dense": engine.dense,
        "num_inference_steps": denoising.num_inference_steps,
        "step_index": denoising.step_index,
        "branch": state.branch,
        "latents": f"{latents.dtype} {list(latents.shape)}",
    }
    picks = torch.linspace(0, latents.numel() - 1, SAMPLES).long().to(latents.device)
    noise = latents.flatten()[picks].float().cpu()
    facts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(facts, (mine, noise.tolist()), group=group)
    for rank, (other, numbers) in enumerate(facts):
        for what, value in facts[0][0].items():
            if other[what] != value:
                raise ConfigError(
                    f"the processes that run {state.name} together disagree: {what} is {value} on rank 0 and "
                    f"{other[what]} on rank {rank}; attach the same methods and call the pipeline alike on all of them"
                )
        difference = (torch.tensor(numbers) - torch.tensor(facts[0][1])).abs().max()
        if difference > 0.1 * (1e-3 + torch.tensor(facts[0][1]).abs().max()):
            raise ConfigError(
                f"the processes that run {state.name} together begin with other latents on rank {rank} than on rank 0; "
                "give the pipeline a generator of the same seed on all of them"
            )


def split_before(
    module: Any, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], Mapping[str, Any], Callable[..., Any]]:
    """Return a block's arguments as diffusers' context parallelism splits them, and what runs it on these.

    So a method sees of every block what this process has of its streams, and may leave out the one that splits them.
    """
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    splits = [hook for name, hook in hooks.items() if name.startswith("cp_input")]
    kwargs = dict(kwargs)
    for hook in splits:
        args, kwargs = hook.pre_forward(module, *args, **kwargs)

    def run_split(*positional: Any, **named: Any) -> Any:
        plans = [hook.metadata for hook in splits]
        try:
            for hook in splits:
                hook.metadata = {}
            return run(*positional, **named)
        finally:
            for hook, plan in zip(splits, plans, strict=True):
                hook.metadata = plan

    return args, kwargs, run_split


def tells_of_loss(error: RuntimeError) -> bool:
    """Tell whether an error says that another process is gone or no longer answers."""
    known = isinstance(error, getattr(torch.distributed, "DistError", ()))
    return known or any(word in str(error).lower() for word in _LOST)


@contextlib.contextmanager
def naming_lost(state: TransformerState, config: Any) -> Iterator[None]:
    """Raise `ProcessLost` in place of the communication's error if another process of the transformer is gone."""
    try:
        yield
    except RuntimeError as error:
        if config is None or not tells_of_loss(error):
            raise
        count = config.ulysses_degree * config.ring_degree
        raise ProcessLost(
            f"another of the {count} processes that run {state.name} together ended or no longer answers "
            f"({str(error).strip().splitlines()[0]}); look for the first error among their outputs, and start all again"
        ) from error
