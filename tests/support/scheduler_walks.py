"""Schedulers of diffusers in tiny pipelines: what the loop of a pipeline really did, seen from the outside."""

import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from matrix_runs import changed_step

STEPS = 6


def scheduler_names() -> list[str]:
    """Names of all scheduler classes of diffusers."""
    names = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    return [one for one in names if inspect.isclass(cls := getattr(diffusers, one)) and issubclass(cls, SchedulerMixin)]


def made(name: str, flow: bool) -> Any:
    """A scheduler for a model of flow matching or of betas, as far as its class has a choice; raises where it can't."""
    cls = getattr(diffusers, name)
    known = inspect.signature(cls.__init__).parameters
    options: dict[str, Any] = {"skip_prk_steps": True} if "skip_prk_steps" in known else {}
    if flow and "use_flow_sigmas" in known:
        options |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    return cls(**options)


@dataclass
class Walk:
    """A pipeline's loop: which of its rounds each forward of the transformer ran in.

    Attributes:
        rounds: how many the loop made.
        forwards: of each forward that ran, (round, timestep in the scheduler's list, what was seen).
    """

    rounds: int = 0
    forwards: list[tuple[int, float, Any]] = field(default_factory=list)
    latents: Any = None

    @property
    def ran(self) -> list[int]:
        """Forwards that ran, by round."""
        return np.bincount([one for one, *_ in self.forwards], minlength=self.rounds).tolist()


def walked(pipe: Any, call: dict[str, Any], see: Any = lambda: None, walk: Walk | None = None) -> Walk:
    """Run a pipeline and note its rounds and forwards."""
    walk, scheduler = walk or Walk(), pipe.scheduler

    def note(*_: Any) -> None:
        walk.forwards.append((walk.rounds, float(scheduler.timesteps[walk.rounds]), see()))

    def counted(_: int, step: Any, latents: Any) -> Any:
        walk.rounds += 1
        return step(latents)

    hook = pipe.transformer.register_forward_pre_hook(note)
    try:
        with changed_step(pipe, counted), torch.no_grad():
            out = pipe(**call, generator=torch.Generator().manual_seed(0))
    finally:
        hook.remove()
    walk.latents = getattr(out, "frames", None) if hasattr(out, "frames") else out.images
    return walk


def steps_of(rounds: int, steps: int = STEPS) -> list[int]:
    """Which step each round of a run is, by how many rounds there are beside the steps that were requested."""
    if rounds <= steps:  # MiniMax-H3's lists one noise level fewer
        return list(range(rounds))
    if rounds == steps + 1:  # PNDM evaluates its second timestep twice
        return [max(0, one - (one > 1)) for one in range(rounds)]
    assert rounds == 2 * steps - 1, (rounds, steps)  # Heun, DPM2: but for the first step twice
    return [(one + 1) // 2 for one in range(rounds)]


def noise_at(scheduler: Any, timestep: float) -> float | None:
    """The noise level that a timestep of a scheduler's list stands for, by what the class trains on; None: not told."""
    config = scheduler.config
    if not hasattr(scheduler, "sigmas"):
        return None
    if type(scheduler).__name__ == "MiniMaxH3Scheduler":
        return 1 - timestep
    if "sigma_data" in config:
        return math.exp(4 * timestep) if "EDM" in type(scheduler).__name__ else math.exp(timestep / 250)
    if "shift" in config or config.get("use_flow_sigmas"):
        return 1 - timestep / 1000 if config.get("invert_sigmas") else timestep / 1000
    if "beta_schedule" in config:
        signal = scheduler.alphas_cumprod.double().numpy()
        levels = np.log(np.sqrt((1 - signal) / signal))
        return float(np.exp(np.interp(timestep, np.arange(len(levels)), levels)))
    return math.nan
