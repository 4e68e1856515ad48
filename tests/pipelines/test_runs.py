"""Runs, steps and branches: what is one generation and what is its step, on pipelines that tell and that do not."""

import copy
import json
import warnings

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from some_cases import some
from tiny_stock import run_stock, stock_pipeline
from wan_tiny import generate, tiny_transformer

import dit_accel
from dit_accel import DFA, ConfigError, DBPrune, EasyCache, ProfilingCache, RadialAttention, SparseD, StaticCache
from dit_accel.attachment.backends import UnplannedRun
from dit_accel.methods.caches.profile_file import weights_digest
from dit_accel.methods.find import find_transformers, resolve_model
from dit_accel.methods.registry import handler_of

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


def test_a_step_with_more_noise_than_the_one_before_reuses_nothing():
    pipe, call = stock_pipeline("FluxPipeline")
    with dit_accel.attach(pipe, StaticCache(every=6, warmup_steps=1, last_steps=0)) as attachment:
        run_stock(pipe, call, num_inference_steps=5, sigmas=[1.0, 0.6, 0.8, 0.4, 0.2], output_type="latent")
        assert drawn(attachment) == {"cond": "#.#.."}


def test_a_scheduler_that_replaces_another_after_attach_is_asked():
    pipe, call = stock_pipeline("HunyuanVideoPipeline")
    method = RadialAttention(block_size=16, dense_steps=0.5, dense_last_steps=1, dense_layers=0)
    with dit_accel.attach(pipe, method) as attachment:
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        run_stock(pipe, call, num_inference_steps=6, output_type="latent")
        assert steps_of(attachment) == {0: False, 1: False, 2: False, 3: True, 4: True, 5: False}


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


def test_sound_is_forecast_too():
    pipe, call = stock_pipeline("LTX2Pipeline")
    outputs = []
    with dit_accel.attach(pipe, StaticCache(every=100, warmup_steps=0, last_steps=0)) as attachment:
        pipe.transformer.register_forward_hook(lambda module, args, out: outputs.append(out))
        run_stock(pipe, call, num_inference_steps=2, output_type="latent")
        assert set("".join(drawn(attachment).values())) == {"#", "."}
    assert {len(out) for out in outputs} == {2}


def test_two_contexts_of_one_name_at_one_step_reset_nothing():
    transformer, bits_of = tiny_transformer(), []
    inputs = torch.randn(1, 12, 5, 8, 8), torch.tensor([500]), torch.randn(1, 6, 64)
    with dit_accel.attach(transformer, SPARSED) as attachment, torch.no_grad():
        for step, count in ((0, 1), (0, 1), (1, 2), (1, 2), (0, 1)):
            with transformer.cache_context("cond", step_index=step, num_inference_steps=4):
                transformer(*inputs)
            assert len(attachment.report().steps) == count
            bits_of.append([bits.clone() for bits in attachment.engine.handlers[0].bits.values()])
    assert all(map(torch.equal, bits_of[1], bits_of[3]))


def test_training_is_no_generation_and_two_forwards_go_before_a_backward():
    transformer = tiny_transformer().train()
    dense = copy.deepcopy(transformer)
    inputs, text = [(torch.randn(1, 12, 5, 8, 8), torch.tensor([time])) for time in (300, 700)], torch.randn(1, 6, 64)

    def losses(model):
        for latents, time in inputs:
            yield model(latents, time, text, return_dict=False)[0].square().mean()

    def gradients():
        grads = [weight.grad.clone() for weight in transformer.parameters() if weight.grad is not None]
        transformer.zero_grad(set_to_none=True)
        return grads

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


# Every branch of every pipeline

GUIDED, TOLD, COUNTED, ONE = ("cond", "uncond"), ("pred_cond", "pred_uncond"), ("call 0", "call 1"), ("call 0",)
BRANCHES = {
    **dict.fromkeys(("QwenImagePipeline", "QwenImageEditPipeline", "Flux2KleinPipeline", "OvisImagePipeline"), GUIDED),
    **dict.fromkeys(("CogView4Pipeline", "HunyuanVideoPipeline", "SkyReelsV2Pipeline", "HeliosPipeline"), GUIDED),
    **dict.fromkeys(("HunyuanImagePipeline", "HunyuanVideo15Pipeline", "MotifVideoPipeline"), TOLD),
    **dict.fromkeys(("Kandinsky5T2VPipeline", "HunyuanVideoFramepackPipeline", "CosmosTextToWorldPipeline"), COUNTED),
    **dict.fromkeys(("EasyAnimatePipeline", "AllegroPipeline", "AnyFlowPipeline", "MiniMaxH3ModularPipeline"), ONE),
    **dict.fromkeys(("MochiPipeline", "CogVideoXPipeline", "LTXPipeline"), ("cond_uncond",)),
    "LTX2Pipeline": ("cond_uncond", "uncond_stg", "uncond_modality"),
    "WanImageToVideoPipeline, a timestep a token": GUIDED,
    "WanAnimatePipeline": ("cond",),
}
"""Pipeline class -> the branches of a step, in the order in which they run; those that are told, and those counted."""

STEPS = {"MiniMaxH3ModularPipeline": 3}  # its schedule of four points
QUICK = ("Flux2KleinPipeline", "HunyuanImagePipeline", "Kandinsky5T2VPipeline", "AllegroPipeline", "LTXPipeline")


@pytest.mark.parametrize("name", some(BRANCHES, *QUICK))
def test_a_report_tells_the_branches_of_every_step_and_their_layers(name):
    pipe, call = stock_pipeline(name)
    with dit_accel.attach(pipe, SparseD(block_size=16, density=0.5, dense_steps=0, dense_layers=0)) as attachment:
        run_stock(pipe, call)
        states = list(dict.fromkeys(layer.state for layer in attachment.engine.layers))
        report = attachment.report()
    assert report.model["transformer"] == f"{states[0].adapter.name}, sizes of no released model"
    assert 0 < report.sparse_density < 1
    count = STEPS.get(name, call["num_inference_steps"])
    expected = [(index, branch) for index in range(count) for branch in BRANCHES[name]]
    assert [(step.step_index, step.branch) for step in report.steps] == expected
    for state in states:
        layers = {step.dense_layers + step.sparse_layers for step in report.steps if step.transformer == state.name}
        spared = {len(state.layers) - 1} if name == "LTX2Pipeline" else set()  # its perturbed block attends to none
        assert layers == {len(state.layers)} | spared


# Two experts: each has its list, state and profile; a switch drops what was stored

EXPERTS = ("transformer", "transformer_2")
COUNT, SWITCH = 10, 6
"""The second expert takes over at this step of so many."""
ONCE = dict(every=100, warmup_steps=0)


@pytest.fixture
def two_experts(make_pipe):
    second = tiny_transformer(5, text_dim=96)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    return make_pipe(transformer_2=second, boundary_ratio=0.6, scheduler=scheduler)


def ran_and_held(pipe, method, state):
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
        held.append({key[0] for key in getattr(attachment.engine.handlers[0], state)})
        return tensors

    with dit_accel.attach(pipe, method) as attachment:
        latents = generate(pipe, num_inference_steps=COUNT, callback_on_step_end=look)
        report, first = attachment.report(), ran[::2]  # of two forwards a step the first is conditional
        for hook in hooks:
            hook.remove()
        assert torch.equal(generate(pipe, num_inference_steps=COUNT), latents)
    return first, held, report


def expected(first, second, refresh=()):
    """What runs where blocks are cached from each expert's first step on."""
    computed, cached = {0, SWITCH, *refresh}, (first, second)
    return [
        (
            EXPERTS[step >= SWITCH],
            [block for block in range(3) if step in computed or block not in cached[step >= SWITCH]],
        )
        for step in range(COUNT)
    ]


TURNS = [{EXPERTS[step >= SWITCH]} for step in range(COUNT)]
BY_INPUTS = DBPrune(threshold=1e9, warmup_steps=0, last_steps=0, first_blocks=1)


def write_profile(path, pipe, **cached):
    entries = {
        name: {"weights": weights_digest(getattr(pipe, name)), "blocks": 3, "cached": blocks}
        for name, blocks in cached.items()
    }
    path.write_text(json.dumps({"profile": 1, "model": "tiny", "transformers": entries}))
    return str(path)


def test_one_list_for_both_and_a_state_for_each(two_experts):
    ran, held, report = ran_and_held(two_experts, ProfilingCache(blocks="0, 2", **ONCE), "_histories")
    assert (ran, held) == (expected([0, 2], [0, 2]), TURNS)
    data = report.section("profilingcache").data
    assert data["cached"] == dict.fromkeys(EXPERTS, "0, 2")
    assert data["computed_blocks"] == pytest.approx((2 * 3 + (COUNT - 2)) / (3 * COUNT))
    assert report.state_bytes["profilingcache"] == 2 * 2 * 80 * 32 * 4  # branches, runs of blocks, tokens, channels


def test_the_schedule_is_that_of_the_run_and_inputs_are_each_experts(two_experts):
    ran, *_ = ran_and_held(two_experts, ProfilingCache(blocks="1", every=4, warmup_steps=0), "_histories")
    assert ran == expected([1], [1], refresh=(4, 8))
    ran, *_ = ran_and_held(two_experts, BY_INPUTS, "_histories")
    assert ran == expected([1, 2], [1, 2])


def test_the_foreground_is_told_anew_by_the_second_expert(two_experts):
    _, held, report = ran_and_held(two_experts, DFA(share=0.25, every=2, warmup_steps=1, last_steps=1), "_outputs")
    full = [step.step_index for step in report.steps if step.branch == "cond" and step.density == 1]
    assert full == [0, 2, 4, 6, 8, 9]  # at 6 the other takes over, 9 is the last
    assert held == TURNS
    assert report.state_bytes["dfa"] == 2 * 3 * 80 * 32 * 4  # branches, layers, tokens, channels, bytes


def test_a_profile_has_a_list_for_each_and_the_plan_takes_their_mean(two_experts, tmp_path):
    path = write_profile(tmp_path / "profile.json", two_experts, transformer=[0], transformer_2=[1, 2])
    config = ProfilingCache(blocks=path, **ONCE)
    ran, _, report = ran_and_held(two_experts, config, "_histories")
    assert ran == expected([0], [1, 2])
    assert report.section("profilingcache").data["cached"] == {"transformer": "0", "transformer_2": "1-2"}
    handler = handler_of(config)(config, resolve_model("transformer", find_transformers(two_experts)))
    saving = handler.estimate(dit_accel.TokenLayout(frames=5, height=4, width=4), COUNT)
    assert saving.blocks == (COUNT - 1) * 1.5
    assert "profilingcache.blocks has 2 lists" in saving.notes[0]


def test_a_profile_of_one_expert_or_of_other_weights_is_refused(two_experts, tmp_path):
    path = write_profile(tmp_path / "one.json", two_experts, transformer=[0])
    with pytest.raises(ConfigError, match=r"on transformer, .*transformer_2"):
        dit_accel.attach(two_experts, ProfilingCache(blocks=path))
    path = write_profile(tmp_path / "both.json", two_experts, transformer=[0], transformer_2=[1])
    two_experts.transformer_2 = tiny_transformer(6, text_dim=96)
    with pytest.raises(ConfigError, match=r"weights \w{12}, transformer_2.*\w{12}"):
        dit_accel.attach(two_experts, ProfilingCache(blocks=path))
    assert dit_accel.attachment_of(two_experts) is None
