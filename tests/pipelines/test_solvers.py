"""Solvers: each takes the noise schedule that the model ships with, and all of them solve the same equation."""

import math

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from dit_accel_pipelines.generation.solvers import (
    SOLVERS,
    is_flow,
    is_of_betas,
    make_scheduler,
    scheduler_like,
    shift_of,
)

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


BETAS = {
    "cogvideox": CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0, timestep_spacing="trailing"
    ),
    "pixart": DPMSolverMultistepScheduler(timestep_spacing="trailing"),  # whose config has a flow_shift it does not use
}
SPREAD = 0.5


def denoised(shipped, scheduler, steps: int) -> tuple[float, float]:
    """Where x = 1 goes from the first noise level, for data of spread `SPREAD` around 0, and where it should."""
    scheduler.set_timesteps(steps)
    first = float(shipped.alphas_cumprod[int(scheduler.timesteps[0])].clamp(min=2**-24))
    x = torch.full((1, 1, 2, 2), 1.0, dtype=torch.float64) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, timestep)
        signal = shipped.alphas_cumprod[round(float(timestep))].double().clamp(min=2**-24)
        clean = signal.sqrt() * SPREAD**2 / (signal * SPREAD**2 + 1 - signal) * seen
        noise = (seen - signal.sqrt() * clean) / (1 - signal).sqrt()
        velocity = signal.sqrt() * noise - (1 - signal).sqrt() * clean
        told = velocity if shipped.config.prediction_type == "v_prediction" else noise
        x = scheduler.step(told, timestep, x).prev_sample
    return float(x.mean()), SPREAD / (first * SPREAD**2 + 1 - first) ** 0.5


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shipped", BETAS)
def test_solvers_converge_on_a_schedule_of_betas(solver, shipped):
    one = BETAS[shipped]
    assert (is_flow(one.config), is_of_betas(one.config), shift_of(one)) == (False, True, None)
    scheduler = make_scheduler(one, solver)
    kept = one.alphas_cumprod.double().clamp(min=2**-24)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), kept, rtol=2e-3, atol=1e-7)
    (far, exact), (near, _) = (denoised(one, make_scheduler(one, solver), steps) for steps in (10, 200))
    assert abs(near - exact) < 0.025  # the first step, out of pure noise, is of first order with every solver
    assert abs(near - exact) < abs(far - exact) / 8
    with pytest.raises(ConfigError, match=r"noise shift, got flow_shift 2.0"):
        make_scheduler(one, solver, 2.0)


def test_what_knows_neither_schedule_is_refused():
    with pytest.raises(ConfigError, match=r"FlowMatchEulerDiscreteScheduler.*betas"):
        scheduler_like(BETAS["cogvideox"], "FlowMatchEulerDiscreteScheduler")
    with pytest.raises(ConfigError, match=r"DDIMScheduler.*flow"):
        scheduler_like(SHIPPED["euler"], "DDIMScheduler")
    with pytest.raises(ConfigError, match=r"EDMEulerScheduler.*noise shift.*UniPCMultistep"):
        make_scheduler(EDMEulerScheduler(), "unipc")


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_shift_that_grows_with_the_tokens_keeps_its_bounds(solver):
    shipped = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.7, max_shift=1.3)
    scheduler = make_scheduler(shipped, solver)
    assert (scheduler.config["base_shift"], scheduler.config["max_shift"]) == (0.7, 1.3)
    assert scheduler.config["use_dynamic_shifting"]
    scheduler.set_timesteps(4, mu=0.9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_another_shift_where_it_grows_with_the_tokens_is_one_for_all(solver):
    shipped = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.7, max_shift=1.3)
    scheduler = make_scheduler(shipped, solver, 2.0)
    bounds = (scheduler.config["base_shift"], scheduler.config["max_shift"])
    assert bounds == (math.log(2), math.log(2))
    scheduler.set_timesteps(3, mu=bounds[0])  # as pipelines do along the line between the bounds
    usual = make_scheduler(SHIPPED["euler"], solver, 2.0)
    usual.set_timesteps(3)
    assert float(scheduler.sigmas[1]) == pytest.approx(float(usual.sigmas[1]), abs=0.01)


def test_an_unknown_solver_is_refused():
    with pytest.raises(ConfigError, match=r"solver 'eulr'.*'euler'"):
        make_scheduler(SHIPPED["euler"], "eulr")
