"""What perturbed heads give in place of their attention: means of V, attention of mean and of blurred queries."""

import pytest
import torch
import torch.nn.functional as F

from dit_accel import NAG, SEG, ConfigError, SoftPAG
from dit_accel.adapters.installed import adapter_for
from dit_accel.methods.base import Model
from dit_accel.methods.compose import make_handlers
from dit_accel.methods.guidance.targets import (
    OtherOutput,
    blur,
    blurred_queries,
    mean_values,
    of_mean_query,
    put_in_place,
)
from dit_accel.plan.call import Call
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan

LAYOUT = TokenLayout(frames=2, height=3, width=4, text_before=1, text_after=2)


@pytest.fixture
def call():
    torch.manual_seed(0)
    q = torch.randn(2, 4, LAYOUT.tokens, 8)
    k, v = torch.randn(2, 2, 2, LAYOUT.tokens, 8)
    mask = torch.ones(2, 1, 1, LAYOUT.tokens, dtype=torch.bool)
    mask[1, ..., -1] = False
    return Call(q=q, k=k, v=v, mask=mask)


def attention(q, call):
    k, v = (x.double().repeat_interleave(2, 1) for x in (call.k, call.v))
    logits = q.double() @ k.transpose(2, 3) / 8**0.5
    return torch.softmax(logits.masked_fill(~call.mask, -torch.inf), -1) @ v


def test_uniform_is_the_mean_of_the_valid_values(call):
    wanted = attention(torch.zeros_like(call.q[:, :, :1]), call)
    torch.testing.assert_close(mean_values(call).double(), wanted, rtol=1e-5, atol=1e-6)


def test_the_mean_query_of_all_or_of_the_picture(call):
    image = torch.zeros(LAYOUT.tokens, dtype=torch.bool)
    image[LAYOUT.visual] = True
    wanted = attention(call.q[:, :, LAYOUT.visual].mean(2, keepdim=True), call)
    torch.testing.assert_close(of_mean_query(call, image).double(), wanted, rtol=1e-5, atol=1e-6)
    mean = torch.stack([call.q[0].mean(1, keepdim=True), call.q[1, :, :-1].mean(1, keepdim=True)])
    torch.testing.assert_close(of_mean_query(call, None).double(), attention(mean, call), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("side", "sigma", "length"), [(9, 0.4, 3), (9, 1.0, 7), (9, 1.3, 9), (5, 3.0, 9), (1, 2.0, 1)])
def test_the_blur_is_a_gaussian_mirrored_at_the_ends(side, sigma, length):
    offsets = torch.arange(length) - length // 2
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    values = torch.randn(1, 1, side)
    padded = F.pad(values, (length // 2, length // 2), mode="reflect") if length > 1 else values
    wanted = F.conv1d(padded, (kernel / kernel.sum())[None, None])
    torch.testing.assert_close(blur(side, sigma) @ values[0, 0], wanted[0, 0], rtol=1e-5, atol=1e-6)


def test_blurred_queries_lie_between_the_queries_and_each_frames_mean(call):
    torch.testing.assert_close(blurred_queries(call, LAYOUT, 1e-3), call.q)
    q = call.q.clone()
    grid = q[:, :, LAYOUT.visual].unflatten(2, (2, 12))
    q[:, :, LAYOUT.visual] = grid.mean(3, keepdim=True).expand_as(grid).flatten(2, 3)
    torch.testing.assert_close(blurred_queries(call, LAYOUT, 1e4), q)
    grid = call.q[:, :, LAYOUT.visual].unflatten(2, (2, 3, 4)).movedim(5, 3)
    blurred = blur(3, 1.0) @ grid @ blur(4, 1.0).T
    q[:, :, LAYOUT.visual] = blurred.movedim(3, 5).flatten(2, 4)
    torch.testing.assert_close(blurred_queries(call, LAYOUT, 1.0), q)


def test_a_share_of_some_heads_and_rows_is_replaced_and_nothing_else_moves(call):
    out, other = torch.randn(2, 2, 4, LAYOUT.tokens, 8)
    share, tokens = torch.tensor([0.0, 0.25, 1.0, 0.0]), torch.arange(LAYOUT.tokens) > 4
    changed = OtherOutput(other=other, share=share, tokens=tokens).applied(out)
    assert torch.equal(changed[:, [0, 3]], out[:, [0, 3]])
    assert torch.equal(changed[:, :, :5], out[:, :, :5])
    assert torch.equal(changed[:, 2, 5:], other[:, 2, 5:])
    torch.testing.assert_close(changed[:, 1, 5:], 0.75 * out[:, 1, 5:] + 0.25 * other[:, 1, 5:])
    rows = torch.tensor([2, 7, 9])
    some = OtherOutput(other=other, share=share, tokens=tokens).applied(out[:, :, rows], rows)
    assert torch.equal(some, changed[:, :, rows])
    mean = OtherOutput(other=other[:, :, :1], share=share).applied(out[:, :, rows], rows)
    assert torch.equal(mean[:, 2], other[:, 2, :1].expand(-1, 3, -1))


def test_a_layer_that_is_replaced_whole_computes_no_attention(call):
    share = torch.ones(4)
    assert put_in_place(AttentionPlan(), mean_values(call), share, whole=True).skips_logits
    assert not put_in_place(AttentionPlan(), mean_values(call), share).skips_logits


def test_it_and_a_negative_text_exclude_each_other():
    adapter = adapter_for("FluxTransformer2DModel")
    model = Model(adapter=adapter, family=None, heads=2, layers=4)
    with pytest.raises(ConfigError, match=r"^nag.*softpag.*last change"):
        make_handlers((SoftPAG(heads="L1", target="uniform"), NAG()), model)
    for config in (SEG(layers="L1"), SoftPAG(heads="L1")):
        assert len(make_handlers((config, NAG()), model)) == 2
