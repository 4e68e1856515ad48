"""The scheduler of an arm: a solver by name, the model's own, or one of diffusers' classes."""

import inspect
from collections.abc import Mapping
from typing import Any

from dit_accel_pipelines.solvers import DYNAMIC, SOLVERS, make_scheduler, shift_of

from dit_accel import ConfigError
from dit_accel.errors import did_you_mean

OWN = "own"
"""The solver that stands for the scheduler which a model ships with."""

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
"""What tells a scheduler of another noise schedule that the model predicts a flow."""


def check_scheduler(name: str, options: Mapping[str, Any]) -> None:
    """Refuse what is none of diffusers' schedulers of a flow, or an option that it has not.

    Raises:
        ConfigError: with the nearest that is known.
    """
    taken = _parameters(name)
    for option in options:
        if option not in taken:
            raise ConfigError(f"{name} has no option {option!r}; {did_you_mean(option, taken)}")


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
    if solver == OWN:
        if flow_shift is not None:
            raise ConfigError(f"the model's own scheduler has a shift of its own, got flow_shift {flow_shift}; leave "
                              "it out")  # fmt: skip
        return type(shipped).from_config(shipped.config)
    import diffusers

    if not {"flow_shift", "shift"} & {*shipped.config}:
        raise ConfigError(f"{type(shipped).__name__} has no noise shift, so {solver} can't take its place")
    taken, shift = _parameters(solver), shift_of(shipped)
    dynamic = {key: shipped.config[key] for key in ("use_dynamic_shifting", *DYNAMIC) if key in shipped.config}
    told = {**dynamic, **FLOW, "flow_shift": shift, "shift": shift, **options}
    made = getattr(diffusers, solver)(**{key: value for key, value in told.items() if key in taken})
    # where the pipeline reads them, whatever the scheduler knows of them
    made.register_to_config(**{key: value for key, value in dynamic.items() if key not in taken})
    return made


def _parameters(name: str) -> list[str]:
    """Return the options of one of diffusers' schedulers of a flow."""
    import diffusers

    known = [one for one in dir(diffusers) if one.endswith("Scheduler")]
    cls = getattr(diffusers, name, None) if name in known else None
    if cls is None:
        raise ConfigError(f"diffusers has no scheduler {name!r}; {did_you_mean(name, known)}")
    taken = [one for one in inspect.signature(cls).parameters]
    if not {"use_flow_sigmas", "shift"} & {*taken}:
        raise ConfigError(
            f"{name} knows no flow, which these models predict; take, say, UniPCMultistepScheduler or "
            "FlowMatchHeunDiscreteScheduler"
        )
    return taken
