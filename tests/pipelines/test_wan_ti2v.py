"""Wan 2.2 TI2V-5B gives every token its own timestep; methods meet it all the same."""

import torch
from wan_tiny import generate

import dit_accel
from dit_accel import RadialAttention


def test_one_timestep_a_token(make_pipe):
    pipe = make_pipe(expand_timesteps=True)
    dense = generate(pipe)
    with dit_accel.attach(pipe, preset="none") as neutral:
        assert torch.equal(generate(pipe), dense)
        assert [step.step_index for step in neutral.report().steps] == [0, 0, 1, 1, 2, 2, 3, 3]
    radial = RadialAttention(decay_factor=0.1, block_size=16, near="half", sink=False, dense_steps=2, dense_layers=0)
    with dit_accel.attach(pipe, radial) as attachment:
        assert not torch.equal(generate(pipe), dense)
        report = attachment.report()
    assert [step.sparse_layers for step in report.steps] == [0, 0, 0, 0, 3, 3, 3, 3]
    assert report.sparse_density < 1
    assert torch.equal(generate(pipe), dense)
