"""Where a denoising stands, as far as timesteps and schedulers tell; for pipelines that don't."""

import math
from typing import Any

from torch import Tensor


def noisiest(timestep: Tensor | None, rising: bool) -> float:
    """Return the timestep of what is still noisiest among frames and rows, falling from step to step; inf for None.

    Args:
        timestep: one a row, a frame, a token, or one of each kind.
        rising: the model's timesteps rise; the result is negative.
    """
    if timestep is None:
        return math.inf
    return float((-timestep if rising else timestep).max())


def step_count(scheduler: Any) -> int | None:
    """Return the steps of a run, or None without a scheduler that tells."""
    timesteps = getattr(scheduler, "timesteps", None)
    return None if timesteps is None else len(timesteps)


def noise_level(scheduler: Any) -> float | None:
    """Return the sigma of the step that a scheduler is about to take, or None without one that tells."""
    sigmas, index = getattr(scheduler, "sigmas", None), getattr(scheduler, "step_index", None)
    if index is None:
        index = getattr(scheduler, "begin_index", None) or 0
    return float(sigmas[index]) if sigmas is not None and index < len(sigmas) else None
