"""Caches of blocks on both experts of Wan 2.2: each has its list, state and profile; a switch drops what was stored."""

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from wan_tiny import generate, tiny_transformer

import dit_accel
from dit_accel import DFA, ConfigError, DBPrune, ProfilingCache
from dit_accel.methods.caches.profile_file import weights_digest
from dit_accel.methods.find import find_transformers, resolve_model
from dit_accel.methods.registry import handler_of

EXPERTS = ("transformer", "transformer_2")
STEPS, SWITCH = 10, 6
"""The second expert takes over at this step of so many."""
ONCE = dict(every=100, warmup_steps=0)


@pytest.fixture
def pipe(make_pipe):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    width = make_pipe().transformer.config.text_dim
    second = tiny_transformer(5, text_dim=width)
    return make_pipe(transformer_2=second, boundary_ratio=0.6, scheduler=scheduler)


def blocks_by_step(pipe):
    """Every (expert, blocks that ran) of the conditional forwards from now on, inside of all that is attached."""
    ran = []
    for name in EXPERTS:
        model = getattr(pipe, name)
        for index, block in enumerate(model.blocks):
            block.register_forward_hook(lambda *_, index=index: ran[-1][1].append(index))
        model.patch_embedding.register_forward_hook(lambda *_, name=name: ran.append((name, [])))
    return lambda: ran[::2]  # of two forwards a step the first is conditional


def expected(first, second, refresh=()):
    """The same for blocks that are cached from each expert's first step on."""
    whole = [0, 1, 2]
    computed = {0, SWITCH, *refresh}
    return [
        (
            EXPERTS[step >= SWITCH],
            whole if step in computed else [b for b in whole if b not in (first, second)[step >= SWITCH]],
        )
        for step in range(STEPS)
    ]


def test_one_list_for_both_and_a_state_for_each(pipe):
    read, held = blocks_by_step(pipe), []
    cache = ProfilingCache(blocks="0, 2", **ONCE)

    def look(pipe, step, timestep, tensors):
        (handler,) = attachment.engine.handlers
        held.append({key[0] for key in handler._histories})
        return tensors

    with dit_accel.attach(pipe, cache) as attachment:
        latents = generate(pipe, num_inference_steps=STEPS, callback_on_step_end=look)
        assert read() == expected([0, 2], [0, 2])
        assert held == [{EXPERTS[step >= SWITCH]} for step in range(STEPS)]
        data = attachment.report().section("profilingcache").data
        assert data["cached"] == dict.fromkeys(EXPERTS, "0, 2")
        assert data["computed_blocks"] == pytest.approx((2 * 3 + (STEPS - 2)) / (3 * STEPS))
        one_expert = 2 * 2 * 80 * 32 * 4  # branches, runs of blocks, tokens, channels, bytes
        assert attachment.report().state_bytes["profilingcache"] == one_expert
        assert torch.equal(generate(pipe, num_inference_steps=STEPS), latents)
    assert latents.isfinite().all()


def test_the_second_expert_reuses_nothing_of_the_first(pipe):
    """Whatever the first gave, the second's first step is that of an untouched expert on the same latents."""
    seen = []
    pipe.transformer_2.register_forward_hook(
        lambda model, args, kwargs, output: seen.append((kwargs, output[0])), with_kwargs=True
    )
    with dit_accel.attach(pipe, ProfilingCache(blocks="0-2", **ONCE)):
        generate(pipe, num_inference_steps=STEPS)
    (kwargs, given), count = seen[0], len(seen)
    assert count == 2 * (STEPS - SWITCH)
    with torch.no_grad():
        assert torch.equal(pipe.transformer_2(**kwargs)[0], given)


def test_the_schedule_is_that_of_the_run(pipe):
    read = blocks_by_step(pipe)
    with dit_accel.attach(pipe, ProfilingCache(blocks="1", every=4, warmup_steps=0)):
        generate(pipe, num_inference_steps=STEPS)
    assert read() == expected([1], [1], refresh=(4, 8))


def test_blocks_by_their_own_inputs(pipe):
    read = blocks_by_step(pipe)
    with dit_accel.attach(pipe, DBPrune(threshold=1e9, warmup_steps=0, last_steps=0, first_blocks=1)):
        generate(pipe, num_inference_steps=STEPS)
    assert read() == expected([1, 2], [1, 2])


def test_the_foreground_is_told_anew_by_the_second_expert(pipe):
    held = []

    def look(pipe, step, timestep, tensors):
        (handler,) = attachment.engine.handlers
        held.append({transformer for transformer, *_ in handler._outputs})
        return tensors

    with dit_accel.attach(pipe, DFA(share=0.25, every=2, warmup_steps=1, last_steps=1)) as attachment:
        latents = generate(pipe, num_inference_steps=STEPS, callback_on_step_end=look)
        full = [step.density == 1 for step in attachment.report().steps if step.branch == "cond"]
        assert full == [True, False, True, False, True, False, True, False, True, True]  # 6 and 9: taken over, and last
        assert held == [{EXPERTS[step >= SWITCH]} for step in range(STEPS)]
        one_expert = 2 * 3 * 80 * 32 * 4  # branches, layers, tokens, channels, bytes
        assert attachment.report().state_bytes["dfa"] == one_expert
        assert torch.equal(generate(pipe, num_inference_steps=STEPS), latents)


def write_profile(path, pipe, **cached):
    entries = {
        name: {"weights": weights_digest(getattr(pipe, name)), "blocks": 3, "cached": blocks}
        for name, blocks in cached.items()
    }
    path.write_text(json.dumps({"profile": 1, "model": "tiny", "transformers": entries}))
    return str(path)


def test_a_profile_has_a_list_for_each(pipe, tmp_path):
    path = write_profile(tmp_path / "profile.json", pipe, transformer=[0], transformer_2=[1, 2])
    read = blocks_by_step(pipe)
    with dit_accel.attach(pipe, ProfilingCache(blocks=path, **ONCE)) as attachment:
        generate(pipe, num_inference_steps=STEPS)
        cached = attachment.report().section("profilingcache").data["cached"]
    assert read() == expected([0], [1, 2])
    assert cached == {"transformer": "0", "transformer_2": "1-2"}


def test_a_profile_of_one_expert_or_of_other_weights_is_refused(pipe, make_pipe, tmp_path):
    path = write_profile(tmp_path / "one.json", pipe, transformer=[0])
    with pytest.raises(ConfigError, match=r"on transformer, .*transformer_2"):
        dit_accel.attach(pipe, ProfilingCache(blocks=path))
    path = write_profile(tmp_path / "both.json", pipe, transformer=[0], transformer_2=[1])
    pipe.transformer_2 = tiny_transformer(6, text_dim=pipe.transformer.config.text_dim)
    with pytest.raises(ConfigError, match=r"weights \w{12}, transformer_2.*\w{12}"):
        dit_accel.attach(pipe, ProfilingCache(blocks=path))
    assert dit_accel.attachment_of(pipe) is None


def test_the_plan_takes_the_mean_of_both_lists(pipe, tmp_path):
    path = write_profile(tmp_path / "profile.json", pipe, transformer=[0], transformer_2=[1, 2])
    config = ProfilingCache(blocks=path, **ONCE)
    handler = handler_of(config)(config, resolve_model("transformer", find_transformers(pipe)))
    saving = handler.estimate(dit_accel.TokenLayout(frames=5, height=4, width=4), STEPS)
    assert saving.blocks == (STEPS - 1) * 1.5
    assert saving.notes == (
        "profilingcache.blocks has 2 lists, and how long each runs is not known: their mean is counted",
    )
