"""Checks of values: tile lists and token orders that would read memory that isn't there, or leave tokens unwritten."""

import os

import torch
from torch import Tensor

from .cache import StorageCache, capturing, readable
from .csr import check_range
from .problem import Problem, lists_of

SWITCH = "DIT_ACCEL_VALIDATE"
"""Environment variable: 1 checks values in every call on a GPU too, which waits for it."""

_CHECKED: StorageCache[None] = StorageCache()


def check_values(problem: Problem) -> None:
    """Raise ValueError where lists or token order don't fit: on a CPU once until they change, else by `SWITCH`."""
    if torch.compiler.is_compiling():  # the reference alone is traced
        return
    order, device = problem.token_order, problem.q.device
    if readable(device):
        _CHECKED.get(problem.parts.values(), tuple(problem.sizes.values()), lambda: _check_lists(problem))
        if order is not None:
            _CHECKED.get([order], (), lambda: _check_order(order))
    elif os.environ.get(SWITCH) == "1" and not capturing(device):
        _check_lists(problem)
        if order is not None:
            _check_order(order)


def _check_lists(problem: Problem) -> None:
    lists_of(problem).validate()


def _check_order(order: Tensor) -> None:
    """Every token once."""
    tokens = order.numel()
    check_range("token_order", order, 0, tokens - 1, f"{tokens} tokens")
    count = torch.zeros(tokens, dtype=torch.int64, device=order.device).scatter_add_(0, order, torch.ones_like(order))
    if bool((count != 1).any()):
        token = int((count != 1).nonzero()[0])
        raise ValueError(f"token_order must hold every token once, found token {token} {int(count[token])} times")
