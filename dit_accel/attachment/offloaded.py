"""Loads and unloads diffusers' offload groups around skipped blocks, on whose calls they rely.

A group is fetched when its first block is called, and sent away after its last one. Where the first is skipped and
another runs, that one would find its weights elsewhere; where the last is skipped, the group would stay on the device,
as would one that a stream fetched ahead and of which nothing ran.
"""

from typing import Any

from torch import nn

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


def _group_of(block: nn.Module) -> Any:
    """Return the group of blocks that one is of; None: it is not offloaded so."""
    registry = block.__dict__.get("_diffusers_hook")
    hook = None if registry is None else registry.get_hook(_HOOK)
    return getattr(hook, "group", None)


def _is_away(group: Any) -> bool:
    """Tell whether a group's weights are where they wait."""
    parameters = (one for module in group.modules for one in module.parameters())
    first = next(parameters, None)
    return first is not None and first.device == group.offload_device
