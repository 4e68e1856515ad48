"""What may compute the attention calls of an attachment, and whether it can run on this machine."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from dit_accel_kernels import BACKENDS, fa4_requirement, flex_requirement, triton_requirement

from ..errors import ConfigError, MissingBackend, did_you_mean
from ..methods.base import AttentionHandler, Handler

Backend = Literal["auto", "triton", "fa4", "torch", "flex", "reference"]
Dense = Literal["auto", "user"]


def check_backend(backend: Any, dense: Any, handlers: Sequence[Handler]) -> None:
    """Raise `MissingBackend` for a kernel backend that can't run here, `ConfigError` for another ``dense``."""
    if dense not in get_args(Dense):
        raise ConfigError(f"attach takes dense={' or '.join(map(repr, get_args(Dense)))}, got {dense!r}")
    if backend not in BACKENDS:
        raise MissingBackend(f"attach has no kernel backend {backend!r}; {did_you_mean(str(backend), BACKENDS)}")
    # the model may still wait in main memory: ask the device it will run on; a torch built for one may find none
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = accelerator or torch.device("cpu")
    requirements = {"triton": triton_requirement, "fa4": fa4_requirement, "flex": lambda on: flex_requirement(on.type)}
    if backend in requirements and (missing := requirements[backend](device)):
        raise MissingBackend(f"kernel backend {backend!r} needs {missing}; use 'auto' or 'torch'")
    attention = [handler for handler in handlers if isinstance(handler, AttentionHandler)]
    for handler in attention:
        precision = handler.precision
        if precision is None or backend == "reference":  # which simulates it
            continue
        needs = f"{handler.name}.precision = {precision!r} needs kernel backend 'triton'"
        if backend not in ("auto", "triton"):
            raise MissingBackend(f"{needs}, got {backend!r}; use 'auto', or leave the precision out")
        if missing := triton_requirement(device, precision=precision):
            raise MissingBackend(f"{needs}, which needs {missing}; leave the precision out")
    voting = [handler.name for handler in attention if handler.votes]
    if backend in ("flex", "fa4") and voting:
        raise MissingBackend(f"kernel backend {backend!r} has no votes, which {voting[0]} needs; use 'auto' or 'torch'")
