"""Runs and steps: what is one generation and what is its step, on pipelines that tell neither."""

import copy
import warnings

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, WanImageToVideoPipeline
from tiny_parts import pil
from tiny_stock import run_stock, stock_pipeline
from wan_tiny import generate as generate_video
from wan_tiny import tiny_transformer

import dit_accel
from dit_accel import LiteAttention, RadialAttention, SparseD
from dit_accel.attachment.backends import UnplannedRun

LITE = LiteAttention(block_size=16, dense_steps=0, threshold=-0.5)
SPARSED = SparseD(block_size=16, density=0.5, dense_steps=0, dense_layers=0)


def steps_of(attachment):
    """Return step -> whether any attention call of it was planned."""
    planned = {}
    for step in attachment.report().steps:
        planned[step.step_index] = planned.get(step.step_index, False) or step.sparse_layers > 0
    return planned


@pytest.fixture(scope="module")
def sd3():
    return stock_pipeline("StableDiffusion3Pipeline")


def test_a_scheduler_that_replaces_another_after_attach_is_asked():
    pipe, call = stock_pipeline("HunyuanVideoPipeline")
    with dit_accel.attach(
        pipe, RadialAttention(block_size=16, dense_steps=0.5, dense_last_steps=1, dense_layers=0)
    ) as a:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        generate_tiny(pipe, call, num_inference_steps=6)
        assert steps_of(a) == {0: False, 1: False, 2: False, 3: True, 4: True, 5: False}


def generate_tiny(pipe, call, **changes):
    torch.manual_seed(0)
    return pipe(**{**call, "output_type": "latent", "generator": torch.Generator().manual_seed(0), **changes})[0]


def test_runs_of_one_step_follow_each_other_as_runs(sd3):
    pipe, call = sd3
    with dit_accel.attach(pipe, SPARSED) as attachment:
        first = run_stock(pipe, call, num_inference_steps=1)
        run_stock(pipe, call, num_inference_steps=1, generator=torch.Generator().manual_seed(1))
        assert torch.equal(run_stock(pipe, call, num_inference_steps=1), first)
        assert len(attachment.report().steps) == 1


def test_two_evaluations_a_step_are_one_step(sd3):
    pipe, call = sd3
    scheduler = pipe.scheduler
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    try:
        with dit_accel.attach(
            pipe, SparseD(block_size=16, density=0.5, dense_steps=0.25, dense_layers=0)
        ) as attachment:
            first = run_stock(pipe, call, num_inference_steps=8)
            assert len(pipe.scheduler.timesteps) == 15
            planned = steps_of(attachment)
            assert planned == {step: step >= 2 for step in range(8)}
            assert {step.branch for step in attachment.report().steps} == {"call 0"}
            assert torch.equal(run_stock(pipe, call, num_inference_steps=8), first)
    finally:
        pipe.scheduler = scheduler


def test_a_run_that_starts_in_the_middle_has_the_steps_that_are_left():
    pipe, call = stock_pipeline("FluxImg2ImgPipeline")
    method = SparseD(block_size=16, density=0.5, dense_steps=0.25, dense_last_steps=1, dense_layers=0)
    with dit_accel.attach(pipe, method) as attachment:
        run_stock(pipe, call, num_inference_steps=10, strength=0.8)
        assert steps_of(attachment) == {step: 2 <= step < 7 for step in range(8)}
        run_stock(pipe, call, num_inference_steps=10, strength=0.4)
        assert steps_of(attachment) == {0: False, 1: True, 2: True, 3: False}


def test_an_interrupted_run_and_one_from_the_middle_do_not_go_on():
    pipe, call = stock_pipeline("FluxImg2ImgPipeline")

    def interrupt(pipe, step, timestep, tensors):
        if step == 0:
            pipe._interrupt = True
        return tensors

    for method in (LITE, SPARSED):
        with dit_accel.attach(pipe, method):
            fresh = run_stock(pipe, call, num_inference_steps=6, strength=0.6)
        with dit_accel.attach(pipe, method) as attachment:
            run_stock(pipe, call, num_inference_steps=6, strength=1.0, callback_on_step_end=interrupt)
            assert torch.equal(run_stock(pipe, call, num_inference_steps=6, strength=0.6), fresh)
            assert len(attachment.report().steps) == 4


def test_two_experts_share_one_count_of_steps(make_pipe):
    parts = dict(make_pipe().components, image_encoder=None, image_processor=None)
    width, channels = parts["transformer"].config.text_dim, 12
    experts = [tiny_transformer(seed, text_dim=width, in_channels=2 * channels + 2) for seed in (0, 1)]
    parts.update(transformer=experts[0], transformer_2=experts[1])
    pipe = WanImageToVideoPipeline(**parts, boundary_ratio=0.9)
    pipe.set_progress_bar_config(disable=True)
    picture = pil(32, 32)
    method = RadialAttention(block_size=16, decay_factor=0.2, near="half", sink=False, dense_steps=0.4, dense_layers=0)
    with dit_accel.attach(pipe, method) as attachment:
        generate_video(pipe, image=picture, num_inference_steps=6)
        planned = steps_of(attachment)
        experts_used = {step.transformer for step in attachment.report().steps}
    assert planned == {step: step >= 3 for step in range(6)}
    assert experts_used == {"transformer", "transformer_2"}


def test_two_contexts_of_one_name_at_one_step_reset_nothing():
    transformer = tiny_transformer()
    torch.manual_seed(0)
    inputs = dict(
        hidden_states=torch.randn(1, 12, 5, 8, 8), timestep=torch.tensor([500]),
        encoder_hidden_states=torch.randn(1, 6, 64), return_dict=False,
    )  # fmt: skip
    with dit_accel.attach(transformer, SPARSED) as attachment, torch.no_grad():
        (handler,) = attachment.engine.handlers
        for step in (0, 0, 1, 1):
            with transformer.cache_context("cond", step_index=step, num_inference_steps=4):
                transformer(**inputs)
            if step == 0:
                kept = {key: bits.clone() for key, bits in handler.bits.items()}
        assert len(attachment.report().steps) == 2
        assert all(torch.equal(handler.bits[key], bits) for key, bits in kept.items())
        with transformer.cache_context("cond", step_index=0, num_inference_steps=4):
            transformer(**inputs)
        assert len(attachment.report().steps) == 1


def test_training_is_no_generation_and_two_forwards_go_before_a_backward():
    transformer = tiny_transformer().train()
    torch.manual_seed(0)
    dense = copy.deepcopy(transformer)
    latents = [torch.randn(1, 12, 5, 8, 8) for _ in range(2)]
    text = torch.randn(1, 6, 64)

    def losses(model):
        return [
            model(x, timestep=torch.tensor([t]), encoder_hidden_states=text, return_dict=False)[0].square().mean()
            for x, t in zip(latents, (300, 700), strict=True)
        ]

    method = RadialAttention(
        block_size=16, decay_factor=0.2, near="half", sink=False, dense_steps=0.9, dense_last_steps=3, dense_layers=1
    )
    with dit_accel.attach(transformer, method) as attachment:
        one, two = losses(transformer)
        report = attachment.report()
        assert [(step.dense_layers, step.sparse_layers) for step in report.steps] == [(1, 2)]  # no warm-up by steps
        assert len(attachment.engine.backward) == 4
        (one + two).backward()
        together = [p.grad.clone() for p in transformer.parameters() if p.grad is not None]
        transformer.zero_grad(set_to_none=True)
        assert len(attachment.engine.backward) == 0
        for x, t in zip(latents, (300, 700), strict=True):
            out = transformer(x, timestep=torch.tensor([t]), encoder_hidden_states=text, return_dict=False)[0]
            out.square().mean().backward()
        alone = [p.grad for p in transformer.parameters() if p.grad is not None]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(together, alone, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(losses(dense), (one.detach(), two.detach()), strict=True))


def test_a_run_that_plans_nothing_warns_once_with_the_reason(pipe):
    with dit_accel.attach(pipe, RadialAttention(block_size=16, dense_steps=100)) as attachment:
        with pytest.warns(UnplannedRun, match=r"radial: .* 4 steps, .*dense_steps = 100"):
            generate_video(pipe)
        assert "no attention call of the run was planned" in str(attachment.report())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generate_video(pipe)
    with dit_accel.attach(pipe, RadialAttention(block_size=16, dense_steps=0)) as attachment:
        pipe.transformer.set_attn_processor(diffusers.models.transformers.transformer_wan.WanAttnProcessor())
        with pytest.warns(UnplannedRun, match=r"radial: .*3 of 3.*processors"):
            generate_video(pipe)
        assert "3 of 3 attention processors were replaced" in str(attachment.report())


def test_a_run_that_plans_does_not_warn(pipe):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnplannedRun)
        with dit_accel.attach(pipe, RadialAttention(block_size=16, dense_steps=1)):
            generate_video(pipe)
            generate_video(pipe)
