"""Notes what a scheduler sees and makes in every step, by standing in for its ``step``."""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_accel.attachment.steps import noise_level

COLUMNS = 2**20
"""Values of every step that are multiplied at a time, in float64."""


@dataclass(slots=True)
class Trace:
    """What a scheduler saw and made in a run, float32 on the CPU."""

    # noise level before each step, and after the last; None where it is not told
    sigmas: list[float | None] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)  # before each step, and after the last, each [D]
    # of the model, guided, as the scheduler takes them, one a step, each [D]
    outputs: list[Tensor] = field(default_factory=list)

    def products(self, residual: bool) -> np.ndarray:
        """Return the mean product of any two steps' outputs, [N, N]; ``residual``: minus the latents, where alike."""
        values = torch.stack(self.outputs)
        if residual and self.outputs[0].shape == self.latents[0].shape:
            values -= torch.stack(self.latents[:-1])
        parts = [part.double() @ part.double().mT for part in values.split(COLUMNS, 1)]
        return (torch.stack(parts).sum(0) / values.shape[1]).numpy()

    def moved(self, other: "Trace") -> list[float]:
        """Measure the RMS distance of another run's latents before each step and at the end."""
        return [float((a - b).square().mean().sqrt()) for a, b in zip(self.latents, other.latents, strict=True)]


@contextlib.contextmanager
def traced(scheduler: Any) -> Iterator[Trace]:
    """Give the trace of the one run that a scheduler makes inside the block."""
    step, trace = scheduler.step, Trace()
    signature = inspect.signature(step)

    @functools.wraps(step)
    def noted(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        trace.sigmas.append(noise_level(scheduler))
        trace.outputs.append(_flat(arguments["model_output"]))
        trace.latents[len(trace.sigmas) - 1 :] = [_flat(arguments["sample"])]
        result = step(*args, **kwargs)
        trace.latents.append(_flat(result[0] if isinstance(result, tuple) else result.prev_sample))
        return result

    scheduler.step = noted  # on the object; its class stays as it is
    try:
        yield trace
    finally:
        del scheduler.step
    trace.sigmas.append(noise_level(scheduler))


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().flatten().clone()
