"""Block lists: those that are wrong are found; what is added between blocks is never reused."""

import contextlib
import inspect
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from tiny_models import MODELS
from torch.utils._pytree import tree_leaves

import dit_accel
from dit_accel import ConfigError, DBCache, FirstBlockCache, UnsupportedModel
from dit_accel.adapters import installed
from dit_accel.adapters.block_lists import registered_blocks
from dit_accel.adapters.blocks import JOINT, BlockList, block_signature
from dit_accel.attachment.site import find_blocks
from dit_accel.testing.block_checks import check_blocks
from dit_accel.testing.tiny_models import Case

FLUX = (
    BlockList(pattern="transformer_blocks.*", takes=JOINT, gives=(1, 0)),
    BlockList(pattern="single_transformer_blocks.*", takes=JOINT, gives=(1, 0)),
)


def case_of(name, index=0, **changes):
    return Case(replace(installed.adapters()[name], **changes), MODELS[name][index])


def alone(pattern, *takes, **options):
    return (BlockList(pattern=pattern, takes=takes, **options),)


WAN = installed.adapters()["wan"].blocks
WRONG = [
    ("flux", (replace(FLUX[0], gives=(0, 1)), FLUX[1]), r"transformer_blocks.0.*hidden_states \[2, 80, 32\]"),
    ("flux", FLUX[:1], r"single_transformer_blocks.0.attn.*transformer_blocks.0"),
    ("flux", FLUX[::-1], r"order transformer_blocks.0, .*lists say single_transformer_blo"),
    ("flux", (*FLUX, FLUX[0]), "lists overlap"),
    ("flux", (replace(FLUX[0], joined=True), FLUX[1]), r"80 of.*86 tokens.*joined=True"),
    ("flux", (BlockList(pattern="transformer_blocks.*"), FLUX[1]), r"FluxTransformerBlock.*tuple of 2"),
    ("z-image", alone("layers.*", "x"), r"160 of.*160 tokens.*joined=False"),
    ("krea2", alone("transformer_blocks.*", "temb"), r"temb \[2, 1, 192\], gives"),
    ("krea2", alone("transformer_blocks.*", "attention_mask"), r"attention_mask \[2, 1, 1, 86\], gives"),
    ("wan", alone("blocks.*", "rotary_emb"), r"rotary_emb.*a stream"),
    ("ernie-image", alone("layers.*", "x", joined=True), r"has 2 of.*86 tok"),
    ("wan vace", (WAN[0], replace(WAN[1], takes=("hidden_states",))), r"vace_blocks\.1.*its hidden_.*vace_blocks\.0"),
]


@pytest.mark.parametrize(("name", "blocks", "message"), WRONG)
def test_wrong_lists_are_found(name, blocks, message):
    with pytest.raises((AssertionError, UnsupportedModel), match=message):
        check_blocks(case_of(name.split()[0], 2 if "vace" in name else 0, blocks=blocks))


def test_an_adapter_without_blocks_is_told():
    assert check_blocks(case_of("wan", blocks=())) == "the adapter describes no blocks"


def test_swapped_streams_are_found_where_their_shapes_are_equal():
    def as_long_as_the_image(batch):
        text = dict(encoder_hidden_states=torch.randn(batch, 80, 16), txt_ids=torch.zeros(80, 3))
        return {**MODELS["flux"][0].inputs(batch), **text}

    model = replace(MODELS["flux"][0], inputs=as_long_as_the_image)
    right = replace(installed.adapters()["flux"], blocks=FLUX)
    assert check_blocks(Case(right, model)) is None
    wrong = replace(right, blocks=tuple(replace(listed, gives=(0, 1)) for listed in FLUX))
    with pytest.raises(AssertionError, match=r"its hidden_states.*transformer_blocks\.0 gives"):
        check_blocks(Case(wrong, model))


@pytest.mark.parametrize(("twice", "message"), [(False, r"blocks\.1 changes hidden_states"), (True, "0.*than once")])
def test_blocks_that_change_their_streams_in_place_or_run_twice_are_found(twice, message):
    case = case_of("wan")
    blocks = case.transformer.blocks

    def meddle(module, args):
        if twice:
            blocks[0](*args)
        else:
            args[0].add_(0)

    blocks[1].register_forward_pre_hook(meddle)
    with pytest.raises(AssertionError, match=message):
        check_blocks(case)


def test_a_registry_that_names_no_text_argument_means_diffusers_own(monkeypatch):
    """As before diffusers 0.42, which servers still ask for."""
    known = SimpleNamespace(
        return_hidden_states_index=1, return_encoder_hidden_states_index=0, hidden_states_argument_name="hidden_states"
    )
    monkeypatch.setattr(TransformerBlockRegistry, "get", lambda block: known)
    blocks = registered_blocks("blocks.*", torch.nn.Linear, "any")
    assert (blocks.takes, blocks.gives) == (("hidden_states", "encoder_hidden_states"), (1, 0))


# What is added between blocks


def test_streams_that_skip_the_middle_leave_no_last_blocks():
    """HunyuanDiT hands what its early blocks gave to its late ones: those can't run where the early ones did not."""
    transformer = case_of("hunyuan-dit").transformer
    with pytest.raises(ConfigError, match=r"^dbcache\.last_blocks = 1 .*transformer.*earlier blocks"):
        dit_accel.attach(transformer, DBCache(first_blocks=1, last_blocks=1))
    dit_accel.attach(transformer, DBCache(first_blocks=1)).detach()


def let_add_nothing(block):
    """Let a block give what it took, in tensors of its own."""
    signature = block_signature(block.list, type(block.module))

    def hook(module, args, kwargs, result):
        streams = [None if stream is None else stream.clone() for stream in signature.read_call(args, kwargs)]
        return signature.write_result(streams, like=result)

    block.module.register_forward_hook(hook, with_kwargs=True)


def run(case, inputs, step):
    """A forward of a run that stands still: where the timestep alone tells the steps apart, it hardly moves."""
    inputs, context = dict(inputs), contextlib.nullcontext()
    if hasattr(type(case.transformer), "cache_context"):
        context = case.transformer.cache_context("cond", step_index=step, num_inference_steps=8)
    else:
        inputs[case.adapter.timestep] = inputs[case.adapter.timestep].float() * (1 - step * 1e-5)
    with torch.no_grad(), context:
        out = case.transformer(**inputs, return_dict=False)
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]


def controls(case, inputs, blocks):
    """Inputs with what a control network adds, as wide as the stream: once, not at all, and three times."""
    if "vace_layers" in case.transformer.config:
        return [{**inputs, "control_hidden_states_scale": torch.full((2,), scale)} for scale in (1.0, 0.0, 3.0)]
    first, streams = block_signature(blocks[0].list, type(blocks[0].module)), []
    blocks[0].module.register_forward_pre_hook(
        lambda *call: streams.append(first.read_call(*call[1:])), with_kwargs=True
    )
    run(case, inputs, 0)
    samples = {
        key: [torch.randn_like(streams[0][0]) for _ in range(2)]
        for key in inspect.signature(case.transformer.forward).parameters
        if "controlnet" in key and key.endswith(("samples", "states"))
    }
    return [{**inputs, **{key: [scale * s for s in own] for key, own in samples.items()}} for scale in (1, 0, 3)]


BETWEEN = [("flux", 0, False), ("chroma", 0, True), ("qwen-image", 0, True), ("sd3", 0, False), ("wan", 2, False)]


@pytest.mark.parametrize(("name", "index", "inference"), BETWEEN)
def test_what_is_added_between_blocks_is_this_steps_own(name, index, inference):
    """Of blocks that add nothing, what reaches the output is what was added, once; Chroma adds in place."""
    case = case_of(name, index)
    blocks = find_blocks(case.adapter, case.transformer)
    for block in blocks[1:]:
        let_add_nothing(block)
    steps = controls(case, case.inputs(), blocks)
    options = dict(threshold=1e9, warmup_steps=0, last_steps=0)
    cache = FirstBlockCache(**options) if name == "wan" else DBCache(first_blocks=1, last_blocks=0, **options)
    with torch.inference_mode(inference):
        plain = [run(case, inputs, 0) for inputs in steps]
        with dit_accel.attach(case.transformer, cache) as attachment:
            for step, inputs in enumerate(steps):  # time goes on a little
                torch.testing.assert_close(run(case, inputs, step), plain[step], rtol=0, atol=2e-3)
            assert attachment.report().section(cache.name).data["reused"] == 2
    assert max(float((one - other).abs().max()) for one, other in zip(*plain[:2], strict=True)) > 0.1
