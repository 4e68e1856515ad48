"""Gradients through planned attention where a part of a transformer is trained."""

import pytest
import torch
from wan_tiny import tiny_transformer

import dit_accel
from dit_accel import SolAttention


def gradients(part: str) -> dict[str, torch.Tensor]:
    transformer = tiny_transformer(num_layers=1).train()
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(part in name)
    noise = torch.Generator().manual_seed(3)
    inputs = torch.randn(1, 12, 5, 8, 8, generator=noise), torch.tensor([500]), torch.randn(1, 6, 64, generator=noise)
    with dit_accel.attach(transformer, SolAttention(block_size=16, dense_steps=0, beta=0.5)):
        transformer(*inputs, return_dict=False)[0].square().sum().backward()
    return {
        name: one.grad for name, one in transformer.named_parameters() if ".attn1.to_" in name and one.requires_grad
    }


@pytest.mark.parametrize("part", ["attn1.to_q", "attn1.to_k", "attn1.to_v"])
def test_one_projection_alone_is_trained_as_beside_the_others(part):
    own, all_of_them = gradients(part), gradients("attn1.to_")
    assert own
    for name, gradient in own.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, all_of_them[name])
