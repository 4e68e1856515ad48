"""The solvers that a run may name, as diffusers schedulers of a model's own noise schedule."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

from dit_accel import ConfigError
from dit_accel.adapters.model_files import ModelFiles, read_config
from dit_accel.errors import did_you_mean

BEST = "unipc"
"""The solver of references and of the dense runs that every arm is held against."""

SOLVERS: dict[str, tuple[str, str]] = {
    "unipc": ("UniPCMultistepScheduler", "UniPCMultistepScheduler"),
    "euler": ("FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler"),
    "dpm++": ("DPMSolverMultistepScheduler", "DPMSolverMultistepScheduler"),
}
"""Name -> diffusers' class for a model that predicts a flow, and for one that was trained on betas."""

DYNAMIC = ("use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
"""What a shift that grows with the tokens is made of."""

TRAINED = ("num_train_timesteps", "prediction_type", "timestep_spacing", "steps_offset")
"""What a scheduler of betas tells of how its model was trained and is sampled, besides the betas."""

LEAST_SIGNAL = 2.0**-24
"""The least share of signal (cumulative alpha), of a schedule that ends in pure noise, as in diffusers' own solvers."""


def check_solver(solver: str) -> None:
    """Raise `ConfigError` for an unknown solver, with the nearest that is known."""
    if solver not in SOLVERS:
        raise ConfigError(f"there is no solver {solver!r}; {did_you_mean(solver, SOLVERS)}")


def is_flow(config: Mapping[str, Any]) -> bool:
    """Say from the config of the scheduler that a model ships with whether the model predicts a flow."""
    return "shift" in config or bool(config.get("use_flow_sigmas"))


def is_of_betas(config: Mapping[str, Any]) -> bool:
    """Say from the config of the scheduler that a model ships with whether its noise is a schedule of betas."""
    return not is_flow(config) and "beta_schedule" in config


def shift_of(shipped: Any) -> float | None:
    """Return the noise shift of the scheduler that a model ships with; None where it has none."""
    config = shipped.config
    if not is_flow(config):
        return None
    return float(config.flow_shift if "flow_shift" in config else config.shift)


def read_scheduler(files: ModelFiles) -> Any:
    """Return the scheduler that a model ships with, made of its config alone."""
    import diffusers

    if not files.has("scheduler"):
        raise ConfigError(f"{files.name} has no scheduler, so that no solver or shift can be set; leave both out")
    config = read_config(files.name, "scheduler/scheduler_config.json")
    return getattr(diffusers, files.index["scheduler"][1]).from_config(config)


def make_scheduler(shipped: Any, solver: str | None, flow_shift: float | None = None) -> Any:
    """Return a fresh scheduler of a named solver, or with None of the model's own.

    ``flow_shift``: another shift; None: the model's own. Where that grows with the tokens, as FLUX's e^mu does with
    diffusers' mu, it is the same for any number of them.
    """
    if solver is not None:
        check_solver(solver)
    flow = is_flow(shipped.config)
    if flow_shift is not None and not flow:
        raise ConfigError(f"{type(shipped).__name__} has no noise shift, got flow_shift {flow_shift}; leave it out")
    shift = {} if flow_shift is None else {"flow_shift": flow_shift, "shift": flow_shift}
    name = type(shipped).__name__ if solver is None else SOLVERS[solver][0 if flow else 1]
    if shift and name.startswith("FlowMatch"):
        shift["use_dynamic_shifting"] = False  # a mu is taken then, and left aside
    elif shift and shipped.config.get("use_dynamic_shifting"):
        shift |= dict.fromkeys(("base_shift", "max_shift"), math.log(shift["shift"]))
    if solver is not None:
        return scheduler_like(shipped, name, **shift)
    taken = inspect.signature(type(shipped)).parameters
    scheduler = type(shipped).from_config(shipped.config, **{key: shift[key] for key in shift if key in taken})
    return _registered(scheduler, shift)


def _registered(scheduler: Any, options: Mapping[str, Any]) -> Any:
    """Return a scheduler whose config has what pipelines read there, whatever the scheduler knows of it."""
    taken = inspect.signature(type(scheduler)).parameters
    scheduler.register_to_config(**{key: options[key] for key in DYNAMIC if key in options and key not in taken})
    return scheduler


def scheduler_like(shipped: Any, name: str, **options: Any) -> Any:
    """Return one of diffusers' schedulers, by class, on the noise schedule of the one that a model ships with."""
    import diffusers

    cls = getattr(diffusers, name)
    taken, schedule = inspect.signature(cls).parameters, _schedule(shipped, name)
    if not ({"use_flow_sigmas", "shift"} if is_flow(shipped.config) else {"trained_betas"}) & {*taken}:
        kind = "flow, which this model predicts" if is_flow(shipped.config) else "betas, which this model has"
        raise ConfigError(f"{name} knows no {kind}; take, say, UniPCMultistepScheduler")
    options = {**schedule, **options}
    return _registered(cls(**{key: value for key, value in options.items() if key in taken}), options)


def _schedule(shipped: Any, name: str) -> dict[str, Any]:
    """Return the options of diffusers that give a scheduler the shipped one's noise schedule."""
    config = shipped.config
    if is_flow(config):
        shift = shift_of(shipped)
        schedule = {key: config[key] for key in DYNAMIC if key in config}
        schedule |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        return {**schedule, "flow_shift": shift, "shift": shift}
    if not is_of_betas(config):
        raise ConfigError(
            f"{type(shipped).__name__} has neither a noise shift nor betas, so {name} can't take its place; leave it "
            "out"
        )
    signal = shipped.alphas_cumprod.double().clamp(min=LEAST_SIGNAL)  # whatever made it: rescaling, a shift of its own
    betas = 1 - signal[1:] / signal[:-1]
    return {
        **{key: config[key] for key in TRAINED if key in config},
        "trained_betas": [float(1 - signal[0]), *betas.tolist()],
    }
