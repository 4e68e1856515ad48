"""Loads and unloads diffusers' offload groups around skipped blocks, on whose calls they rely, and times all fetches.

A group is fetched when its first block is called, and sent away after its last one. Where the first is skipped and
another runs, that one would find its weights elsewhere; where the last is skipped, the group would stay on the device,
as would one that a stream fetched ahead and of which nothing ran.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..report.clock import Clock

_HOOK = "group_offloading"
"""diffusers' name of the hook."""


def fetch(block: nn.Module) -> None:
    """Fetch a block's weights before it runs, unless they are there; of a group's first block its own call does it."""
    group = _group_of(block)
    if group is not None and group.onload_leader is not block and _is_away(group):
        group.onload_()


def send_away(block: nn.Module) -> None:
    """Send a group away whose last block was skipped, unless it is away."""
    group = _group_of(block)
    if group is not None and group.offload_leader is block and not _is_away(group):
        group.offload_()


@contextlib.contextmanager
def timed_fetches(transformer: nn.Module, clock: Clock, device: torch.device) -> Iterator[None]:
    """Time what fetches a transformer's weights inside the block: the hooks of accelerate and diffusers' groups."""
    fetchers: dict[int, tuple[Any, str]] = {}
    for module in transformer.modules():
        hook, group = module.__dict__.get("_hf_hook"), _group_of(module)
        if hook is not None:
            fetchers[id(hook)] = hook, "pre_forward"
        if group is not None:
            fetchers[id(group)] = group, "onload_"
    for of, name in fetchers.values():
        vars(of)[name] = _timed(getattr(of, name), clock, device)
    try:
        yield
    finally:
        for of, name in fetchers.values():
            del vars(of)[name]


def _timed(fetch: Callable[..., Any], clock: Clock, device: torch.device) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        begin = clock.stamp(device)
        result = fetch(*args, **kwargs)
        clock.add_part("fetching", begin, device)
        return result

    return run


def _group_of(block: nn.Module) -> Any:
    """Return the group of blocks that one is of; None: it is not offloaded so."""
    registry = block.__dict__.get("_diffusers_hook")
    hook = None if registry is None else registry.get_hook(_HOOK)
    return getattr(hook, "group", None)


def _is_away(group: Any) -> bool:
    parameters = (parameter for module in group.modules for parameter in module.parameters())
    first = next(parameters, None)
    return first is not None and first.device == group.offload_device
