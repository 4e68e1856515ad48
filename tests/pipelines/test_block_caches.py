"""Caches of blocks on models that add to their streams between blocks, or hand on more than streams."""

import contextlib
import inspect

import pytest
import torch
from tiny_models import MODELS
from torch.utils._pytree import tree_leaves

import dit_accel
from dit_accel import ConfigError, DBCache, FirstBlockCache
from dit_accel.adapters import installed
from dit_accel.adapters.blocks import block_signature
from dit_accel.attachment.site import find_blocks
from dit_accel.testing.tiny_models import Case

FOREVER = dict(threshold=1e9, warmup_steps=0, last_steps=0)


def cases(name):
    return [Case(installed.adapters()[name], model) for model in MODELS[name]]


def run(case, inputs, step):
    """A forward of a run that stands still: where the timestep alone tells the steps apart, it hardly moves."""
    inputs, context = dict(inputs), contextlib.nullcontext()
    if hasattr(type(case.transformer), "cache_context"):
        context = case.transformer.cache_context("cond", step_index=step, num_inference_steps=8)
    else:
        time = inputs[case.adapter.timestep]
        inputs[case.adapter.timestep] = time.float() * (1 - step * 1e-5)
    with torch.no_grad(), context:
        out = case.transformer(**inputs, return_dict=False)
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]


def apart(found, expected=None):
    """The largest difference of two outputs, or the largest value of one."""
    zero = [torch.zeros_like(one) for one in found]
    return max(float((one - other).abs().max()) for one, other in zip(found, expected or zero, strict=True))


def test_streams_that_skip_the_middle_leave_no_last_blocks():
    """HunyuanDiT hands what its early blocks gave to its late ones: those can't run where the early ones did not."""
    (case,) = (case for case in cases("hunyuan-dit"))
    with pytest.raises(
        ConfigError,
        match=r"^dbcache\.last_blocks = 1 .*transformer.*earlier blocks",
    ):
        dit_accel.attach(case.transformer, DBCache(first_blocks=1, last_blocks=1))
    dit_accel.attach(case.transformer, DBCache(first_blocks=1)).detach()


def adds_nothing(block):
    """A hook with which a block gives what it took, in tensors of its own."""
    signature = block_signature(block.list, type(block.module))

    def hook(module, args, kwargs, result):
        streams = [None if stream is None else stream.clone() for stream in signature.read_call(args, kwargs)]
        return signature.write_result(streams, like=result)

    block.module.register_forward_hook(hook, with_kwargs=True)


@pytest.mark.parametrize(
    ("name", "inference"), [("flux", False), ("chroma", True), ("qwen-image", True), ("sd3", False)]
)
def test_what_a_control_network_adds_between_blocks_is_this_steps_own(name, inference):
    """Of blocks that add nothing, what reaches the output is what the control network added, once; Chroma in place."""
    case = cases(name)[0]
    inputs, streams = case.inputs(), []
    blocks = find_blocks(case.adapter, case.transformer)
    for block in blocks[1:]:
        adds_nothing(block)
    first = block_signature(blocks[0].list, type(blocks[0].module))
    blocks[0].module.register_forward_pre_hook(
        lambda *call: streams.append(first.read_call(*call[1:])), with_kwargs=True
    )
    run(case, inputs, 0)
    torch.manual_seed(0)
    samples = {
        key: [torch.randn_like(streams[0][0]) for _ in range(2)]
        for key in inspect.signature(case.transformer.forward).parameters
        if "controlnet" in key and key.endswith(("samples", "states"))
    }
    steps = [
        {**inputs, **{key: [scale * one for one in value] for key, value in samples.items()}} for scale in (1, 0, 3)
    ]
    with torch.inference_mode(inference):
        plain = [run(case, given, 0) for given in steps]
        with dit_accel.attach(case.transformer, DBCache(first_blocks=1, last_blocks=0, **FOREVER)) as attachment:
            for step, given in enumerate(steps):
                assert apart(run(case, given, step), plain[step]) < 2e-3  # time goes on a little
            assert [entry["reused"] for entry in attachment.report().section("dbcache").data["forwards"]][1:] == [
                True
            ] * 2
    assert apart(plain[0], plain[1]) > 0.1


def test_hints_of_wan_vace_are_this_steps_own():
    case = next(case for case in cases("wan") if "vace_layers" in case.transformer.config)
    for block in find_blocks(case.adapter, case.transformer)[1:]:
        adds_nothing(block)
    steps = [{**case.inputs(), "control_hidden_states_scale": torch.full((2,), scale)} for scale in (1.0, 0.0, 3.0)]
    plain = [run(case, given, 0) for given in steps]
    with dit_accel.attach(case.transformer, FirstBlockCache(**FOREVER)) as attachment:
        for step, given in enumerate(steps):
            assert apart(run(case, given, step), plain[step]) < 2e-3  # time goes on a little
        assert attachment.report().section("firstblockcache").data["reused"] == 2
    assert apart(plain[0], plain[1]) > 0.1
