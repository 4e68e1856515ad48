"""Step caches in pipelines: what tells their steps and branches, runs that end early or start late, two experts."""

import pytest
import tiny_image_pipelines
import tiny_other_pipelines
import tiny_pipelines
import tiny_video_pipelines
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, WanImageToVideoPipeline, WanPipeline
from tiny_image_pipelines import generate
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


def test_only_uncond(make_pipe):
    pipe = make_pipe()
    with dit_accel.attach(pipe, StaticCache(every=2, warmup_steps=2, branches="uncond")) as attachment:
        generate_video(pipe, num_inference_steps=6)
        assert drawn(attachment) == {"cond": "######", "uncond": "##.#.#"}


def test_one_call_for_both_branches():
    pipe, call = tiny_other_pipelines.sd3()
    with dit_accel.attach(pipe, ALTERNATE) as attachment:
        first = generate(pipe, call, num_inference_steps=6)
        assert drawn(attachment) == {"call 0": "##.#.#"}
        assert torch.equal(generate(pipe, call, num_inference_steps=6), first)


def test_two_evaluations_a_step_are_one_decision():
    pipe, call = tiny_other_pipelines.sd3()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    with dit_accel.attach(pipe, ALTERNATE) as attachment:
        first = generate(pipe, call, num_inference_steps=6)
        forwards = attachment.report().section("staticcache").data["forwards"]
        by_step = {}
        for entry in forwards:
            by_step.setdefault(entry["step_index"], set()).add(entry["reused"])
        assert by_step == {0: {False}, 1: {False}, 2: {True}, 3: {False}, 4: {True}, 5: {False}}
        assert len(forwards) == 11
        assert torch.equal(generate(pipe, call, num_inference_steps=6), first)
    assert first.isfinite().all()


def test_a_run_that_starts_in_the_middle_counts_its_own_steps():
    pipe, call = tiny_image_pipelines.flux_img2img()
    with dit_accel.attach(pipe, StaticCache(steps=(1, 1, 0, 1, 0, 1))) as attachment:
        generate(pipe, call, num_inference_steps=10, strength=0.6)
        assert drawn(attachment) == {"call 0": "##.#.#"}


def test_a_run_after_an_interrupted_one_is_a_fresh_one():
    pipe, call = tiny_other_pipelines.sd3()

    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = step == 3
        return tensors

    with dit_accel.attach(pipe, ALTERNATE):
        fresh = generate(pipe, call, num_inference_steps=6, generator=torch.Generator().manual_seed(1))
        generate(pipe, call, num_inference_steps=6, callback_on_step_end=interrupt)
        again = generate(pipe, call, num_inference_steps=6, generator=torch.Generator().manual_seed(1))
        assert torch.equal(again, fresh)


def test_an_expert_that_takes_over_begins_with_nothing(make_pipe):
    parts = dict(make_pipe().components, image_encoder=None, image_processor=None)
    width, channels = parts["transformer"].config.text_dim, 12
    experts = [tiny_transformer(seed, text_dim=width, in_channels=2 * channels + 2) for seed in (0, 1)]
    parts.update(transformer=experts[0], transformer_2=experts[1])
    pipe = WanImageToVideoPipeline(**parts, boundary_ratio=0.9)
    pipe.set_progress_bar_config(disable=True)
    picture = tiny_image_pipelines.pil(32, 32)
    with dit_accel.attach(pipe, StaticCache(every=100, warmup_steps=0, last_steps=0)) as attachment:
        latents = generate_video(pipe, image=picture, num_inference_steps=6)
        entries = attachment.report().section("staticcache").data["forwards"]
    for name in ("transformer", "transformer_2"):
        own = [entry["reused"] for entry in entries if entry["transformer"] == name and entry["branch"] == "cond"]
        assert own == [False] + [True] * (len(own) - 1)
        assert len(own) > 1
    assert latents.isfinite().all()


def test_sound_is_forecast_too():
    pipe, call = tiny_video_pipelines.ltx2()
    given = []
    with dit_accel.attach(pipe, StaticCache(every=100, warmup_steps=0, last_steps=0)) as attachment:
        pipe.transformer.register_forward_hook(lambda module, args, out: given.append(out))
        tiny_pipelines.generate(pipe, call, num_inference_steps=3, output_type="latent")
        assert set("".join(drawn(attachment).values())) == {"#", "."}
        assert all(len(out) == 2 for out in given)


def test_two_pipelines_by_turns_do_not_meet(make_pipe):
    pipes: list[WanPipeline] = [make_pipe(0), make_pipe(1)]
    attachments = [dit_accel.attach(pipe, ALTERNATE) for pipe in pipes]
    alone = [generate_video(pipe, num_inference_steps=4) for pipe in pipes]

    def meanwhile(pipe, step, timestep, tensors):
        if step == 1:
            assert torch.equal(generate_video(pipes[1], num_inference_steps=4), alone[1])
        return tensors

    assert torch.equal(generate_video(pipes[0], num_inference_steps=4, callback_on_step_end=meanwhile), alone[0])
    for attachment in attachments:
        attachment.detach()


def test_a_pipeline_that_does_not_tell_its_branches_can_not_skip_one_alone():
    pipe, call = tiny_image_pipelines.flux_img2img()
    refused = pytest.raises(ConfigError, match=r"staticcache\.branches = 'uncond'.*cache_context")
    with dit_accel.attach(pipe, StaticCache(every=2, branches="uncond")), refused:
        generate(pipe, call)


def test_latents_that_a_pipeline_writes_into_are_cached_like_others():
    """Kandinsky 5's pipelines write each step's latents into the last one's tensor."""
    pipe, call = tiny_video_pipelines.kandinsky5()
    with dit_accel.attach(pipe, EasyCache(threshold=50.0, warmup_steps=1)) as attachment:
        tiny_pipelines.generate(pipe, call, num_inference_steps=6, output_type="latent")
        assert set(drawn(attachment, "easycache").values()) == {"##...#"}


@pytest.mark.parametrize("made", [tiny_image_pipelines.flux2_klein_kv, tiny_other_pipelines.qwen_image_21])
def test_a_first_forward_that_holds_more_tokens(made):
    """Theirs holds tokens that later ones read from a cache of keys and values."""
    pipe, call = made()
    with dit_accel.attach(pipe, EasyCache(threshold=50.0, warmup_steps=1)) as attachment:
        first = generate(pipe, call, num_inference_steps=6)
        assert set(drawn(attachment, "easycache").values()) == {"###..#"}  # a rate takes two steps of one shape
        assert torch.equal(generate(pipe, call, num_inference_steps=6), first)
    with dit_accel.attach(pipe, ProfilingCache(blocks="0", warmup_steps=1, every=100)) as attachment:
        assert generate(pipe, call, num_inference_steps=4).isfinite().all()
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
    pipe, call = tiny_other_pipelines.ideogram4()
    with dit_accel.attach(pipe, cache) as attachment:
        first = generate(pipe, call, num_inference_steps=7)
        data = attachment.report().section(cache.name).data
        assert (data["reused"], len(data["forwards"])) == (reused, 14)
        assert torch.equal(generate(pipe, call, num_inference_steps=7), first)


@pytest.mark.parametrize("prompts", [1, 2])
def test_guidance_that_a_callback_switches_off_begins_anew(prompts):
    """diffusers documents it: half of the rows are left, and they must not be compared with all of them."""

    def switch_off(pipe, step, timestep, tensors):
        if step == 2:
            tensors |= {name: value[prompts:] for name, value in tensors.items() if name != "latents"}
            pipe._guidance_scale = 0.0
        return tensors

    pipe, call = tiny_other_pipelines.sd3()
    call = {name: torch.cat([value] * prompts) if torch.is_tensor(value) else value for name, value in call.items()}
    callback = dict(
        callback_on_step_end=switch_off,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds", "pooled_prompt_embeds"],
    )
    with dit_accel.attach(pipe, EasyCache(threshold=50.0, warmup_steps=1)) as attachment:
        latents = generate(pipe, call, num_inference_steps=8, **callback)
        assert set(drawn(attachment, "easycache").values()) == {"##.###.#"}  # the layers see the new batch in step 3
    assert latents.isfinite().all()
