"""Step caches in pipelines: what tells their steps and branches, runs that end early or start late, two experts."""

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, WanImageToVideoPipeline
from tiny_parts import pil
from tiny_stock import run_stock, stock_pipeline
from wan_tiny import generate as generate_video
from wan_tiny import tiny_transformer

import dit_accel
from dit_accel import ConfigError, EasyCache, FirstBlockCache, ProfilingCache, StaticCache

ALTERNATE = StaticCache(every=2, warmup_steps=2, last_steps=0, predictor="taylor")


def drawn(attachment, method="staticcache"):
    """Return branch -> its computed (#) and reused (.) forwards."""
    entries = attachment.report().section(method).data["forwards"]
    branches = dict.fromkeys(entry["branch"] for entry in entries)
    return {
        branch: "".join("." if entry["reused"] else "#" for entry in entries if entry["branch"] == branch)
        for branch in branches
    }


def test_wan_tells_steps_and_branches(make_pipe):
    pipe = make_pipe()
    plain = generate_video(pipe, num_inference_steps=6)
    with dit_accel.attach(pipe, ALTERNATE) as attachment:
        cached = generate_video(pipe, num_inference_steps=6)
        assert drawn(attachment) == {"cond": "##.#.#", "uncond": "##.#.#"}
        assert attachment.engine.recorder.forwards_run == 8
        assert torch.equal(generate_video(pipe, num_inference_steps=6), cached)
        generate_video(pipe, num_inference_steps=6, height=48)
        assert torch.equal(generate_video(pipe, num_inference_steps=6), cached)
        generate_video(pipe, num_inference_steps=6, guidance_scale=1.0)
        assert drawn(attachment) == {"cond": "##.#.#"}
    assert not torch.equal(cached, plain)
    with dit_accel.attach(pipe, EasyCache(threshold=0.0)):
        assert torch.equal(generate_video(pipe, num_inference_steps=6), plain)
    assert torch.equal(generate_video(pipe, num_inference_steps=6), plain)


def test_two_evaluations_a_step_are_one_decision():
    pipe, call = stock_pipeline("StableDiffusion3Pipeline")
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    with dit_accel.attach(pipe, ALTERNATE) as attachment:
        first = run_stock(pipe, call, num_inference_steps=6)
        forwards = attachment.report().section("staticcache").data["forwards"]
        by_step = {}
        for entry in forwards:
            by_step.setdefault(entry["step_index"], set()).add(entry["reused"])
        assert by_step == {0: {False}, 1: {False}, 2: {True}, 3: {False}, 4: {True}, 5: {False}}
        assert len(forwards) == 11
        assert torch.equal(run_stock(pipe, call, num_inference_steps=6), first)
    assert first.isfinite().all()


def test_a_run_that_starts_in_the_middle_counts_its_own_steps():
    pipe, call = stock_pipeline("FluxImg2ImgPipeline")
    with dit_accel.attach(pipe, StaticCache(steps=(1, 1, 0, 1, 0, 1))) as attachment:
        run_stock(pipe, call, num_inference_steps=10, strength=0.6)
        assert drawn(attachment) == {"call 0": "##.#.#"}


def test_an_expert_that_takes_over_begins_with_nothing(make_pipe):
    parts = dict(make_pipe().components, image_encoder=None, image_processor=None)
    width, channels = parts["transformer"].config.text_dim, 12
    experts = [tiny_transformer(seed, text_dim=width, in_channels=2 * channels + 2) for seed in (0, 1)]
    parts.update(transformer=experts[0], transformer_2=experts[1])
    pipe = WanImageToVideoPipeline(**parts, boundary_ratio=0.9)
    pipe.set_progress_bar_config(disable=True)
    picture = pil(32, 32)
    with dit_accel.attach(pipe, StaticCache(every=100, warmup_steps=0, last_steps=0)) as attachment:
        latents = generate_video(pipe, image=picture, num_inference_steps=6)
        entries = attachment.report().section("staticcache").data["forwards"]
    for name in ("transformer", "transformer_2"):
        own = [entry["reused"] for entry in entries if entry["transformer"] == name and entry["branch"] == "cond"]
        assert own == [False] + [True] * (len(own) - 1)
        assert len(own) > 1
    assert latents.isfinite().all()


def test_sound_is_forecast_too():
    pipe, call = stock_pipeline("LTX2Pipeline")
    given = []
    with dit_accel.attach(pipe, StaticCache(every=100, warmup_steps=0, last_steps=0)) as attachment:
        pipe.transformer.register_forward_hook(lambda module, args, out: given.append(out))
        run_stock(pipe, call, num_inference_steps=3, output_type="latent")
        assert set("".join(drawn(attachment).values())) == {"#", "."}
        assert all(len(out) == 2 for out in given)


def test_a_pipeline_that_does_not_tell_its_branches_can_not_skip_one_alone():
    pipe, call = stock_pipeline("FluxImg2ImgPipeline")
    refused = pytest.raises(ConfigError, match=r"staticcache\.branches = 'uncond'.*cache_context")
    with dit_accel.attach(pipe, StaticCache(every=2, branches="uncond")), refused:
        run_stock(pipe, call)


@pytest.mark.parametrize("name", ["Flux2KleinKVPipeline", "QwenImage21Pipeline"])
def test_a_first_forward_that_holds_more_tokens(name):
    """Theirs holds tokens that later ones read from a cache of keys and values."""
    pipe, call = stock_pipeline(name)
    with dit_accel.attach(pipe, EasyCache(threshold=50.0, warmup_steps=1)) as attachment:
        first = run_stock(pipe, call, num_inference_steps=6)
        assert set(drawn(attachment, "easycache").values()) == {"###..#"}  # a rate takes two steps of one shape
        assert torch.equal(run_stock(pipe, call, num_inference_steps=6), first)
    with dit_accel.attach(pipe, ProfilingCache(blocks="0", warmup_steps=1, every=100)) as attachment:
        assert run_stock(pipe, call, num_inference_steps=4).isfinite().all()
        assert set(drawn(attachment, "profilingcache").values()) == {"##.."}


@pytest.mark.parametrize(
    ("cache", "reused"),
    [
        (StaticCache(every=3, warmup_steps=1, last_steps=1), 8),
        (EasyCache(threshold=50.0, warmup_steps=1, last_steps=1), 8),
        (FirstBlockCache(threshold=50.0, warmup_steps=1, last_steps=1), 10),
        (ProfilingCache(blocks="1", every=100, warmup_steps=1, last_steps=1), 8),
    ],
)
def test_two_transformers_that_hold_a_prompt_each(cache, reused):
    """Ideogram 4 calls both in every step: neither takes over from the other."""
    pipe, call = stock_pipeline("Ideogram4Pipeline")
    with dit_accel.attach(pipe, cache) as attachment:
        first = run_stock(pipe, call, num_inference_steps=7)
        data = attachment.report().section(cache.name).data
        assert (data["reused"], len(data["forwards"])) == (reused, 14)
        assert torch.equal(run_stock(pipe, call, num_inference_steps=7), first)
