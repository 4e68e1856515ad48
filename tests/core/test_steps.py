"""Steps and noise levels, read off timesteps and schedulers."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler

from dit_accel.attachment.steps import noise_level, noisiest, step_count


def test_the_noisiest_frame_tells_the_step():
    assert noisiest(torch.tensor([[0.0, 0.0, 700.0]]), rising=False) == 700
    assert noisiest(torch.tensor([500, 500]), rising=False) == 500
    assert noisiest(torch.tensor([0.25, 0.5, 1.0]), rising=True) == -0.25
    assert noisiest(None, rising=True) == math.inf


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(shift=3.0), HeunDiscreteScheduler()])
def test_the_noise_level_is_that_of_the_coming_step(scheduler):
    scheduler.set_timesteps(4)
    assert step_count(scheduler) == len(scheduler.timesteps)
    sample = torch.ones(1, 1, 2, 2)
    for index, timestep in enumerate(scheduler.timesteps):
        assert noise_level(scheduler) == float(scheduler.sigmas[index])
        sample = scheduler.step(sample * 0.1, timestep, sample).prev_sample
    scheduler.set_timesteps(4)
    assert noise_level(scheduler) == float(scheduler.sigmas[0])


def test_a_later_start_begins_at_its_own_noise():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    assert noise_level(scheduler) == float(scheduler.sigmas[2])


def test_what_nothing_tells_is_unknown():
    assert noise_level(None) is None
    assert step_count(None) is None
    assert noise_level(DDIMScheduler()) is None
    assert noise_level(SimpleNamespace(sigmas=torch.ones(2), step_index=2)) is None
