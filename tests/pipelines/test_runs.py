"""Runs, steps and branches: what is one generation and what is its step, on pipelines that tell neither."""

import copy
import warnings

import diffusers
import pytest
import torch
from tiny_stock import run_stock, stock_pipeline
from wan_tiny import generate, tiny_transformer

import dit_accel
from dit_accel import ConfigError, EasyCache, LiteAttention, RadialAttention, SparseD, StaticCache
from dit_accel.attachment.backends import UnplannedRun

LITE = LiteAttention(block_size=16, dense_steps=0, threshold=-0.5)
SPARSED = SparseD(block_size=16, density=0.5, dense_steps=0, dense_layers=0)
ALTERNATE = StaticCache(every=2, warmup_steps=2, last_steps=0, predictor="taylor")


def steps_of(attachment):
    """Return step -> whether any attention call of it was planned."""
    planned = {}
    for step in attachment.report().steps:
        planned[step.step_index] = planned.get(step.step_index, False) or step.sparse_layers > 0
    return planned


def drawn(attachment):
    """Return branch -> its computed (#) and reused (.) forwards."""
    by_branch = {}
    for entry in attachment.report().section("staticcache").data["forwards"]:
        by_branch[entry["branch"]] = by_branch.get(entry["branch"], "") + ("." if entry["reused"] else "#")
    return by_branch


def test_wan_tells_steps_and_branches(pipe):
    six = dict(num_inference_steps=6)
    plain = generate(pipe, **six)
    with dit_accel.attach(pipe, ALTERNATE) as attachment:
        cached = generate(pipe, **six)
        assert drawn(attachment) == {"cond": "##.#.#", "uncond": "##.#.#"}
        assert attachment.engine.recorder.forwards_run == 8
        generate(pipe, height=48, **six)
        assert torch.equal(generate(pipe, **six), cached)
        generate(pipe, guidance_scale=1.0, **six)
        assert drawn(attachment) == {"cond": "##.#.#"}
    with dit_accel.attach(pipe, EasyCache(threshold=0.0)):
        assert torch.equal(generate(pipe, **six), plain)


def test_a_scheduler_that_replaces_another_after_attach_is_asked():
    pipe, call = stock_pipeline("HunyuanVideoPipeline")
    method = RadialAttention(block_size=16, dense_steps=0.5, dense_last_steps=1, dense_layers=0)
    with dit_accel.attach(pipe, method) as attachment:
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        run_stock(pipe, call, num_inference_steps=6, output_type="latent")
        assert steps_of(attachment) == {0: False, 1: False, 2: False, 3: True, 4: True, 5: False}


def test_runs_of_one_step_follow_each_other_as_runs():
    pipe, call = stock_pipeline("StableDiffusion3Pipeline")
    call["num_inference_steps"] = 1
    with dit_accel.attach(pipe, SPARSED) as attachment:
        first = run_stock(pipe, call)
        run_stock(pipe, call, generator=torch.Generator().manual_seed(1))
        assert torch.equal(run_stock(pipe, call), first)
        assert len(attachment.report().steps) == 1


def test_a_run_that_starts_in_the_middle_has_the_steps_that_are_left():
    pipe, call = stock_pipeline("FluxImg2ImgPipeline")
    method = SparseD(block_size=16, density=0.5, dense_steps=0.25, dense_last_steps=1, dense_layers=0)
    with dit_accel.attach(pipe, StaticCache(steps=(1, 1, 0, 1, 0, 1))) as attachment:
        run_stock(pipe, call, num_inference_steps=10, strength=0.6)
        assert drawn(attachment) == {"call 0": "##.#.#"}
    with dit_accel.attach(pipe, method) as attachment:
        run_stock(pipe, call, num_inference_steps=10, strength=0.8)
        assert steps_of(attachment) == {step: 2 <= step < 7 for step in range(8)}
        run_stock(pipe, call, num_inference_steps=10, strength=0.4)
        assert steps_of(attachment) == {0: False, 1: True, 2: True, 3: False}
    refused = pytest.raises(ConfigError, match=r"staticcache\.branches = 'uncond'.*cache_context")
    with dit_accel.attach(pipe, StaticCache(every=2, branches="uncond")), refused:
        run_stock(pipe, call)


@pytest.mark.parametrize("method", [LITE, SPARSED], ids=lambda method: method.name)
def test_an_interrupted_run_and_one_from_the_middle_do_not_go_on(method):
    pipe, call = stock_pipeline("FluxImg2ImgPipeline")
    call["num_inference_steps"] = 5

    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = step == 0
        return tensors

    with dit_accel.attach(pipe, method):
        fresh = run_stock(pipe, call, strength=0.6)
    with dit_accel.attach(pipe, method) as attachment:
        run_stock(pipe, call, strength=1.0, callback_on_step_end=interrupt)
        assert torch.equal(run_stock(pipe, call, strength=0.6), fresh)
        assert len(attachment.report().steps) == 3


def test_sound_is_forecast_too():
    pipe, call = stock_pipeline("LTX2Pipeline")
    outputs = []
    with dit_accel.attach(pipe, StaticCache(every=100, warmup_steps=0, last_steps=0)) as attachment:
        pipe.transformer.register_forward_hook(lambda module, args, out: outputs.append(out))
        run_stock(pipe, call, num_inference_steps=2, output_type="latent")
        assert set("".join(drawn(attachment).values())) == {"#", "."}
    assert {len(out) for out in outputs} == {2}


def test_two_contexts_of_one_name_at_one_step_reset_nothing():
    transformer = tiny_transformer()
    inputs = torch.randn(1, 12, 5, 8, 8), torch.tensor([500]), torch.randn(1, 6, 64)

    def forward(step):
        with torch.no_grad(), transformer.cache_context("cond", step_index=step, num_inference_steps=4):
            transformer(*inputs)

    with dit_accel.attach(transformer, SPARSED) as attachment:
        (handler,) = attachment.engine.handlers
        forward(0)
        forward(0)
        kept = {key: bits.clone() for key, bits in handler.bits.items()}
        forward(1)
        forward(1)
        assert len(attachment.report().steps) == 2
        assert all(torch.equal(handler.bits[key], bits) for key, bits in kept.items())
        forward(0)
        assert len(attachment.report().steps) == 1


def test_training_is_no_generation_and_two_forwards_go_before_a_backward():
    transformer = tiny_transformer().train()
    dense = copy.deepcopy(transformer)
    given, text = [(torch.randn(1, 12, 5, 8, 8), torch.tensor([time])) for time in (300, 700)], torch.randn(1, 6, 64)

    def losses(model):
        for latents, time in given:
            yield model(latents, time, text, return_dict=False)[0].square().mean()

    def gradients():
        found = [weight.grad.clone() for weight in transformer.parameters() if weight.grad is not None]
        transformer.zero_grad(set_to_none=True)
        return found

    method = RadialAttention(
        block_size=16, decay_factor=0.2, near="half", sink=False, dense_steps=0.9, dense_last_steps=3, dense_layers=1
    )
    with dit_accel.attach(transformer, method) as attachment:
        one, two = losses(transformer)
        (step,) = attachment.report().steps
        assert (step.dense_layers, step.sparse_layers) == (1, 2)  # no warm-up by steps
        assert len(attachment.engine.backward) == 4
        (one + two).backward()
        together = gradients()
        assert len(attachment.engine.backward) == 0
        for loss in losses(transformer):
            loss.backward()
    torch.testing.assert_close(together, gradients(), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert not torch.equal(torch.stack([*losses(dense)]), torch.stack([one, two]))


def test_a_run_that_plans_nothing_warns_once_with_the_reason(pipe):
    with dit_accel.attach(pipe, RadialAttention(block_size=16, dense_steps=100)) as attachment:
        with pytest.warns(UnplannedRun, match=r"radial: .* 4 steps, .*dense_steps = 100"):
            generate(pipe)
        assert "no attention call of the run was planned" in str(attachment.report())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generate(pipe)
    method = RadialAttention(block_size=16, dense_steps=1)
    with warnings.catch_warnings(), dit_accel.attach(pipe, method):
        warnings.simplefilter("error", UnplannedRun)
        generate(pipe)
        generate(pipe)
    with dit_accel.attach(pipe, method) as attachment:
        pipe.transformer.set_attn_processor(diffusers.models.transformers.transformer_wan.WanAttnProcessor())
        with pytest.warns(UnplannedRun, match=r"radial: .*3 of 3.*processors"):
            generate(pipe)
        assert "3 of 3 attention processors were replaced" in str(attachment.report())
