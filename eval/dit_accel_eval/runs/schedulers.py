"""The scheduler of an arm: a solver by name, the model's own, or one of diffusers' classes."""

import inspect
from collections.abc import Mapping
from typing import Any

from dit_accel_pipelines.generation.solvers import SOLVERS, make_scheduler, scheduler_like

from dit_accel import ConfigError, UnsupportedModel
from dit_accel.adapters.model_files import read_config
from dit_accel.errors import did_you_mean

OWN = "own"
"""The solver that stands for the scheduler which a model ships with."""


def check_scheduler(name: str, options: Mapping[str, Any]) -> None:
    """Refuse what is none of diffusers' schedulers of another's noise schedule, or an option that it has not.

    Raises:
        ConfigError: with the nearest that is known.
    """
    taken = _parameters(name)
    for option in options:
        if option not in taken:
            raise ConfigError(f"{name} has no option {option!r}; {did_you_mean(option, taken)}")


def shipped_scheduler(source: str) -> Any:
    """Return the scheduler that a model ships with, from its config alone.

    Args:
        source: folder or hub id.

    Raises:
        UnsupportedModel: if the config is not found, or diffusers has no such scheduler.
    """
    import diffusers

    config = read_config(source, "scheduler/scheduler_config.json")
    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if cls is None:
        raise UnsupportedModel(f"{source} ships with {config.get('_class_name')!r}, which diffusers does not have")
    return cls.from_config(config)


def scheduler_of(shipped: Any, solver: str, options: Mapping[str, Any], flow_shift: float | None) -> Any:
    """Return a fresh scheduler of the model's own noise schedule.

    Args:
        shipped: the scheduler that the model ships with.
        solver: a name of `SOLVERS`, `OWN`, or the class of one of diffusers' schedulers.
        options: of that class; what is not among them is as in the shipped one's config.
        flow_shift: another noise shift, of a solver; None: the model's own.

    Raises:
        ConfigError: for a scheduler that can't take the shipped one's place.
    """
    if solver in SOLVERS:
        return make_scheduler(shipped, solver, flow_shift)
    if solver != OWN:
        return scheduler_like(shipped, solver, **options)
    if flow_shift is not None:
        raise ConfigError(
            f"the model's own scheduler keeps its noise schedule, got flow_shift {flow_shift}; leave it out"
        )
    return type(shipped).from_config(shipped.config)


def _parameters(name: str) -> list[str]:
    """Return the options of one of diffusers' schedulers that can take another's noise schedule."""
    import diffusers

    known = [one for one in dir(diffusers) if one.endswith("Scheduler")]
    cls = getattr(diffusers, name, None) if name in known else None
    if cls is None:
        raise ConfigError(f"diffusers has no scheduler {name!r}; {did_you_mean(name, known)}")
    taken = [one for one in inspect.signature(cls).parameters]
    if not {"use_flow_sigmas", "shift", "trained_betas"} & {*taken}:
        raise ConfigError(
            f"{name} takes no noise schedule but its own; take, say, UniPCMultistepScheduler or "
            "FlowMatchHeunDiscreteScheduler"
        )
    return taken
