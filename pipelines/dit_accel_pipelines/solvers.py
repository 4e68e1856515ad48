"""The solvers that a run may name, as diffusers schedulers of a model's own noise schedule."""

from collections.abc import Callable
from typing import Any

from dit_accel import ConfigError
from dit_accel.errors import did_you_mean

BEST = "unipc"
"""The solver of references and of the dense runs that every arm is held against."""

_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def _euler(shift: float, **dynamic: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=shift, **dynamic)


def _unipc(shift: float, **dynamic: Any) -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(flow_shift=shift, **_FLOW, **dynamic)


def _dpm(shift: float, **dynamic: Any) -> Any:
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(flow_shift=shift, **_FLOW, **dynamic)


DYNAMIC = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
"""What a shift that grows with the tokens is made of."""

SOLVERS: dict[str, Callable[..., Any]] = {"unipc": _unipc, "euler": _euler, "dpm++": _dpm}


def check_solver(solver: str) -> None:
    """Refuse an unknown solver, with the nearest that is known.

    Raises:
        ConfigError: for one that is not in `SOLVERS`.
    """
    if solver not in SOLVERS:
        raise ConfigError(f"there is no solver {solver!r}; {did_you_mean(solver, SOLVERS)}")


def shift_of(shipped: Any) -> float:
    """Return the noise shift of the scheduler that a model ships with."""
    config = shipped.config
    return float(config.flow_shift if "flow_shift" in config else config.shift)


def make_scheduler(shipped: Any, solver: str, flow_shift: float | None = None) -> Any:
    """Return a fresh scheduler of a named solver.

    Args:
        shipped: the scheduler that the model ships with, whose noise shift is kept.
        solver: a name of `SOLVERS`.
        flow_shift: another shift; None: the model's own.

    Raises:
        ConfigError: for an unknown solver, a model without a noise shift, or a shift of one that shifts by its tokens.
    """
    check_solver(solver)
    if not {"flow_shift", "shift"} & {*shipped.config}:
        raise ConfigError(
            f"{type(shipped).__name__} has no noise shift, so {solver} can't take its place; leave it out"
        )
    if not shipped.config.get("use_dynamic_shifting"):
        return SOLVERS[solver](shift_of(shipped) if flow_shift is None else flow_shift)
    if flow_shift is not None:
        raise ConfigError(f"this model's shift grows with its tokens, got flow_shift {flow_shift}; leave it out")
    scheduler = SOLVERS[solver](shift_of(shipped), use_dynamic_shifting=True)
    bounds = {name: shipped.config[name] for name in DYNAMIC if name in shipped.config}
    scheduler.register_to_config(**bounds)  # where the pipeline reads them, whatever the solver knows of them
    return scheduler
