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
    second = tiny_transformer(5, text_dim=96)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    return make_pipe(transformer_2=second, boundary_ratio=0.6, scheduler=scheduler)


def ran_and_held(pipe, method, kept):
    """Run twice; return (expert, its blocks that ran) of conditional forwards, whose state was held, and the report.

    ``kept`` names the attribute with the method's state, whose keys begin with the transformer.
    """
    ran, held, hooks = [], [], []
    for name in EXPERTS:
        model = getattr(pipe, name)
        hooks.append(model.patch_embedding.register_forward_hook(lambda *_, name=name: ran.append((name, []))))
        for index, block in enumerate(model.blocks):
            hooks.append(block.register_forward_hook(lambda *_, index=index: ran[-1][1].append(index)))

    def look(pipe, step, timestep, tensors):
        held.append({key[0] for key in getattr(attachment.engine.handlers[0], kept)})
        return tensors

    with dit_accel.attach(pipe, method) as attachment:
        latents = generate(pipe, num_inference_steps=STEPS, callback_on_step_end=look)
        report, first = attachment.report(), ran[::2]  # of two forwards a step the first is conditional
        for hook in hooks:
            hook.remove()
        assert torch.equal(generate(pipe, num_inference_steps=STEPS), latents)
    return first, held, report


def expected(first, second, refresh=()):
    """What runs where blocks are cached from each expert's first step on."""
    computed, cached = {0, SWITCH, *refresh}, (first, second)
    return [
        (
            EXPERTS[step >= SWITCH],
            [block for block in range(3) if step in computed or block not in cached[step >= SWITCH]],
        )
        for step in range(STEPS)
    ]


TURNS = [{EXPERTS[step >= SWITCH]} for step in range(STEPS)]
BY_INPUTS = DBPrune(threshold=1e9, warmup_steps=0, last_steps=0, first_blocks=1)


def write_profile(path, pipe, **cached):
    entries = {
        name: {"weights": weights_digest(getattr(pipe, name)), "blocks": 3, "cached": blocks}
        for name, blocks in cached.items()
    }
    path.write_text(json.dumps({"profile": 1, "model": "tiny", "transformers": entries}))
    return str(path)


def test_one_list_for_both_and_a_state_for_each(pipe):
    ran, held, report = ran_and_held(pipe, ProfilingCache(blocks="0, 2", **ONCE), "_histories")
    assert (ran, held) == (expected([0, 2], [0, 2]), TURNS)
    data = report.section("profilingcache").data
    assert data["cached"] == dict.fromkeys(EXPERTS, "0, 2")
    assert data["computed_blocks"] == pytest.approx((2 * 3 + (STEPS - 2)) / (3 * STEPS))
    assert report.state_bytes["profilingcache"] == 2 * 2 * 80 * 32 * 4  # branches, runs of blocks, tokens, channels


def test_the_schedule_is_that_of_the_run_and_inputs_are_each_experts(pipe):
    ran, *_ = ran_and_held(pipe, ProfilingCache(blocks="1", every=4, warmup_steps=0), "_histories")
    assert ran == expected([1], [1], refresh=(4, 8))
    ran, *_ = ran_and_held(pipe, BY_INPUTS, "_histories")
    assert ran == expected([1, 2], [1, 2])


def test_the_second_expert_reuses_nothing_of_the_first(pipe):
    """Whatever the first gave, the second's first step is that of an untouched expert on the same latents."""
    seen = []
    pipe.transformer_2.register_forward_hook(
        lambda model, args, kwargs, output: seen.append((kwargs, output[0])), with_kwargs=True
    )
    with dit_accel.attach(pipe, ProfilingCache(blocks="0-2", **ONCE)):
        generate(pipe, num_inference_steps=STEPS)
    (kwargs, output), count = seen[0], len(seen)
    assert count == 2 * (STEPS - SWITCH)
    with torch.no_grad():
        assert torch.equal(pipe.transformer_2(**kwargs)[0], output)


def test_the_foreground_is_told_anew_by_the_second_expert(pipe):
    _, held, report = ran_and_held(pipe, DFA(share=0.25, every=2, warmup_steps=1, last_steps=1), "_outputs")
    full = [step.step_index for step in report.steps if step.branch == "cond" and step.density == 1]
    assert full == [0, 2, 4, 6, 8, 9]  # at 6 the other takes over, 9 is the last
    assert held == TURNS
    assert report.state_bytes["dfa"] == 2 * 3 * 80 * 32 * 4  # branches, layers, tokens, channels, bytes


def test_a_profile_has_a_list_for_each_and_the_plan_takes_their_mean(pipe, tmp_path):
    path = write_profile(tmp_path / "profile.json", pipe, transformer=[0], transformer_2=[1, 2])
    config = ProfilingCache(blocks=path, **ONCE)
    ran, _, report = ran_and_held(pipe, config, "_histories")
    assert ran == expected([0], [1, 2])
    assert report.section("profilingcache").data["cached"] == {"transformer": "0", "transformer_2": "1-2"}
    handler = handler_of(config)(config, resolve_model("transformer", find_transformers(pipe)))
    saving = handler.estimate(dit_accel.TokenLayout(frames=5, height=4, width=4), STEPS)
    assert saving.blocks == (STEPS - 1) * 1.5
    assert "profilingcache.blocks has 2 lists, and how long each runs" in saving.notes[0]


def test_a_profile_of_one_expert_or_of_other_weights_is_refused(pipe, tmp_path):
    path = write_profile(tmp_path / "one.json", pipe, transformer=[0])
    with pytest.raises(ConfigError, match=r"on transformer, .*transformer_2"):
        dit_accel.attach(pipe, ProfilingCache(blocks=path))
    path = write_profile(tmp_path / "both.json", pipe, transformer=[0], transformer_2=[1])
    pipe.transformer_2 = tiny_transformer(6, text_dim=96)
    with pytest.raises(ConfigError, match=r"weights \w{12}, transformer_2.*\w{12}"):
        dit_accel.attach(pipe, ProfilingCache(blocks=path))
    assert dit_accel.attachment_of(pipe) is None
