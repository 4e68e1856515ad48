"""Kernels and gradients: the option `precision` of sparse methods, the backend fa4, and a part that is trained."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

import fa4_stand_in
import pytest
import torch
from dit_accel_pipelines.families.wan import WAN
from one_layer import Fixed, OneLayer
from wan_tiny import denoise, sharp_transformer, tiny_transformer

import dit_accel
from dit_accel import ConfigError, LiteAttention, RadialAttention, SolAttention
from dit_accel.adapters.installed import family
from dit_accel.estimate.prediction import estimate
from dit_accel.methods import Model
from dit_accel.methods.compose import make_handlers
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan
from dit_accel.plan.tiling import full_tiles


MODEL = Model(adapter=WAN, family=family("wan2.1-14b"), heads=40, layers=40)
LAYOUT = TokenLayout(frames=4, height=4, width=4)


def radial(**options) -> RadialAttention:
    return RadialAttention(**dict(block_size=16, dense_steps=0, dense_layers=0, rest="pooled") | options)


def ran(config: RadialAttention, backend: str, steps: int = 1):
    """What a short run of a tiny Wan under a config gives, and its report."""
    with dit_accel.attach(sharp_transformer(), config, preset="none", backend=backend) as attachment:
        return denoise(attachment.engine.layers[0].state.transformer, steps, branches=("cond",)), attachment.report()


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_run_differs_by_little_and_the_report_says_by_what(precision):
    (plain, _), (found, report) = ran(radial(), "reference"), ran(radial(precision=precision), "reference")
    difference = float((found - plain).norm() / plain.norm())
    assert 1e-6 < difference < 0.02
    assert report.backend == f"reference; queries and keys in {precision}"
    assert report.methods["radial"]["precision"] == precision
    assert f"queries and keys in {precision}" in str(report)


def test_the_kernels_multiply_as_the_specification_says():
    (expected, _), (found, report) = ran(radial(precision="int8"), "reference"), ran(radial(precision="int8"), "auto")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert report.backend == "auto (triton); queries and keys in int8"


def test_only_where_the_method_acts():
    """Dense steps are the model's own attention; a method beside it that asks for nothing changes nothing."""
    dense = radial(precision="int8", dense_steps=1)
    assert torch.equal(ran(dense, "reference")[0], ran(radial(dense_steps=1), "reference")[0])
    plan = AttentionPlan(tiles=full_tiles(LAYOUT.tokens, LAYOUT.tokens, 16, "cpu"))
    seen = []
    layer = OneLayer(radial(precision="int8", dense_steps=1), Fixed(plan))
    layer.observe(lambda call: seen.append(call.plan.precision))
    q, k, v = (torch.randn(1, 2, LAYOUT.tokens, 8) for _ in range(3))
    for step in (0, 1):
        layer.call(q, k, v, LAYOUT, step=step)
    assert seen == [None, "int8"]


def test_methods_agree_on_one():
    one = LiteAttention(precision="fp8", dense_steps=0)
    with pytest.raises(ConfigError, match=r"radial.*'int8'.*lite.*'fp8'|lite.*'fp8'.*radial.*'int8'"):
        make_handlers([radial(precision="int8"), one], MODEL)
    assert make_handlers([radial(precision="fp8"), one], MODEL)
    assert make_handlers([radial(), one], MODEL)


@pytest.mark.parametrize("backend", ["torch", "flex", "fa4"])
def test_other_backends_are_refused_at_attach(backend, monkeypatch):
    for name in ("flex", "fa4"):
        monkeypatch.setattr(f"dit_accel.attachment.backends.{name}_requirement", lambda on: None)
    with pytest.raises(dit_accel.MissingBackend, match=rf"radial\.precision = 'int8'.*'triton', got '{backend}'"):
        dit_accel.attach(tiny_transformer(), radial(precision="int8"), backend=backend)


def test_a_machine_without_such_products_is_told_what_it_lacks(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET")
    for precision in ("int8", "fp8"):
        with pytest.raises(dit_accel.MissingBackend, match=rf"'{precision}'.*'triton'.*CUDA.*\(found cpu"):
            dit_accel.attach(tiny_transformer(), SolAttention(precision=precision))


def test_training_is_refused():
    layer = OneLayer(radial(precision="int8"))
    q, k, v = (torch.randn(1, 2, LAYOUT.tokens, 8, requires_grad=True) for _ in range(3))
    with pytest.raises(ConfigError, match=r"radial\.precision = 'int8'.*train"):
        layer.call(q, k, v, LAYOUT)


def test_an_estimate_says_what_it_does_not_count():
    for precision in ("int8", None):
        notes = estimate(WAN, family("wan2.1-14b"), methods=[RadialAttention(precision=precision)]).notes
        assert any("radial.precision = 'int8'" in note for note in notes) == bool(precision)


def test_the_backend_fa4_says_what_it_lacks_and_refuses_votes(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(torch.accelerator, "current_accelerator", lambda: None)
        with pytest.raises(dit_accel.MissingBackend, match=r"'fa4'.*sm_90.*sm_100 \(found cpu\)"):
            dit_accel.attach(tiny_transformer(), RadialAttention(), backend="fa4")
    fa4_stand_in.install(monkeypatch, "sm_90")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(dit_accel.MissingBackend, match=r"'fa4'.*votes.*lite.*'auto'"):
        dit_accel.attach(tiny_transformer(), LiteAttention(), backend="fa4")


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
