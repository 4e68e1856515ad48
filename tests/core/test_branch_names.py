"""What denoising calls are named where no context names them."""

import torch
from dit_accel_pipelines import ADAPTERS

from dit_accel.attachment.layers import TransformerState


def test_calls_are_numbered_and_those_of_a_prompt_s_own_transformer_after_it():
    adapters = {one.name: one for one in ADAPTERS}
    wan = TransformerState("transformer", torch.nn.Identity(), adapters["wan"])
    own = TransformerState("unconditional_transformer", torch.nn.Identity(), adapters["ideogram4"])
    names = []
    for wan.calls in range(2):
        own.calls = wan.calls
        names += [wan.branch, own.branch]
    assert names == ["call 0", "uncond", "call 1", "uncond 1"]
