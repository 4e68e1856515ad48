"""Solvers: each takes the noise schedule that the model ships with, and all of them solve the same equation."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from dit_accel_pipelines.solvers import SOLVERS, make_scheduler, shift_of

from dit_accel import ConfigError

SHIPPED = {
    "unipc": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
    "euler": FlowMatchEulerDiscreteScheduler(shift=5.0),
}


def solved(scheduler, steps: int) -> float:
    """Where the flow v = x - 1 takes x = 2 on the way from noise level 1 to 0."""
    scheduler.set_timesteps(steps)
    x = torch.full((1, 1, 2, 2), 2.0)
    for timestep in scheduler.timesteps:
        x = scheduler.step(x - 1.0, timestep, x).prev_sample
    return float(x.mean())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shipped", SHIPPED)
def test_solvers_converge_to_one_solution_on_the_models_own_schedule(solver, shipped):
    scheduler = make_scheduler(SHIPPED[shipped], solver)
    assert shift_of(scheduler) == 5.0
    exact = 1 + torch.e**-1
    near, far = abs(solved(scheduler, 200) - exact), abs(solved(make_scheduler(SHIPPED[shipped], solver), 10) - exact)
    assert near < 3e-3
    assert near < far
    assert shift_of(make_scheduler(SHIPPED[shipped], solver, 3.0)) == 3.0


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_shift_that_grows_with_the_tokens_keeps_its_bounds(solver):
    shipped = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.7, max_shift=1.3)
    scheduler = make_scheduler(shipped, solver)
    assert (scheduler.config["base_shift"], scheduler.config["max_shift"]) == (0.7, 1.3)
    assert scheduler.config["use_dynamic_shifting"]
    scheduler.set_timesteps(4, mu=0.9)
    with pytest.raises(ConfigError, match=r"shift grows with its tokens, got flow_shift 2.0; leave it out"):
        make_scheduler(shipped, solver, 2.0)


def test_an_unknown_solver_is_refused():
    with pytest.raises(ConfigError, match="there is no solver 'eulr'; did you mean 'euler'"):
        make_scheduler(SHIPPED["euler"], "eulr")
