"""Every family's block lists against its tiny models, and what the check says of lists that are wrong."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from tiny_models import MODELS

from dit_accel import UnsupportedModel
from dit_accel.adapters import installed
from dit_accel.adapters.block_lists import block_lists, blocks_of, registered_blocks
from dit_accel.adapters.blocks import JOINT, BlockList, block_signature
from dit_accel.testing.block_checks import Block, check_blocks
from dit_accel.testing.tiny_models import Case

FLUX = (
    BlockList(pattern="transformer_blocks.*", takes=JOINT, gives=(1, 0)),
    BlockList(pattern="single_transformer_blocks.*", takes=JOINT, gives=(1, 0)),
)


def case_of(name, index=0, **changes):
    return Case(replace(installed.adapters()[name], **changes), MODELS[name][index])


def listed_blocks(case):
    return [
        Block(name, module, listed, block_signature(listed, type(module)))
        for listed in block_lists(case.adapter, case.transformer)
        for name, module in blocks_of(listed, case.adapter, case.transformer)
    ]


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=pytest.mark.slow if index % 2 else ()) for index, one in enumerate(MODELS)]
)
def test_block_lists_describe_the_model(name):
    for model in MODELS[name]:
        assert check_blocks(Case(installed.adapters()[name], model)) is None


@pytest.mark.parametrize(
    ("name", "blocks", "message"),
    [
        (
            "flux",
            (replace(FLUX[0], gives=(0, 1)), FLUX[1]),
            r"transformer_blocks.0.*hidden_states \[2, 80, 32\]",
        ),
        (
            "flux",
            FLUX[:1],
            r"single_transformer_blocks.0.attn.*transformer_blocks.0",
        ),
        ("flux", FLUX[::-1], r"order transformer_blocks.0, .*lists say single_transformer_blo"),
        ("flux", (*FLUX, FLUX[0]), "lists overlap"),
        ("flux", (replace(FLUX[0], joined=True), FLUX[1]), r"80 of.*86 tokens.*joined=True"),
        (
            "z-image",
            (BlockList(pattern="layers.*", takes=("x",)),),
            r"160 of.*160 tokens.*joined=False",
        ),
        ("krea2", (BlockList(pattern="transformer_blocks.*", takes=("temb",)),), r"temb \[2, 1, 192\], gives"),
        (
            "krea2",
            (BlockList(pattern="transformer_blocks.*", takes=("attention_mask",)),),
            r"attention_mask \[2, 1, 1, 86\], gives",
        ),
        ("wan", (BlockList(pattern="blocks.*", takes=("rotary_emb",)),), r"rotary_emb.*a stream"),
        ("ernie-image", (BlockList(pattern="layers.*", takes=("x",), joined=True),), r"has 2 of.*86 tok"),
    ],
)
def test_wrong_lists_are_found(name, blocks, message):
    with pytest.raises(AssertionError, match=message):
        check_blocks(case_of(name, blocks=blocks))


def test_results_of_another_form_are_found():
    with pytest.raises(UnsupportedModel, match=r"FluxTransformerBlock.*tuple of 2"):
        check_blocks(case_of("flux", blocks=(BlockList(pattern="transformer_blocks.*"), FLUX[1])))


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


def test_an_argument_that_is_only_shaped_like_a_stream_is_found():
    wan = installed.adapters()["wan"].blocks
    wrong = (wan[0], replace(wan[1], takes=("hidden_states",)))
    with pytest.raises(AssertionError, match=r"vace_blocks\.1.*its hidden_states.*vace_blocks\.0"):
        check_blocks(case_of("wan", 2, blocks=wrong))


def test_blocks_that_change_their_streams_in_place_are_found():
    case = case_of("wan")

    def in_place(module, args):
        args[0].add_(0)

    case.transformer.blocks[1].register_forward_pre_hook(in_place)
    with pytest.raises(AssertionError, match=r"blocks\.1 changes hidden_states"):
        check_blocks(case)


def test_blocks_that_run_twice_are_found():
    case = case_of("wan")

    def again(module, args):
        case.transformer.blocks[0](*args)

    case.transformer.blocks[1].register_forward_pre_hook(again)
    with pytest.raises(AssertionError, match=r"blocks\.0.*than once"):
        check_blocks(case)


def test_an_adapter_without_blocks_is_told():
    assert check_blocks(case_of("wan", blocks=())) == "the adapter describes no blocks"


def test_diffusers_registry_is_right_but_for_two_block_classes():
    wrong, known = set(), set()
    for name, models in MODELS.items():
        for model in models:
            for block in listed_blocks(Case(installed.adapters()[name], model)):
                cls = type(block.module)
                if cls in TransformerBlockRegistry._registry:
                    known.add(cls.__name__)
                    told = registered_blocks(block.blocks.pattern, cls, name)
                    if (told.takes, told.gives) != (block.blocks.takes, block.blocks.gives):
                        wrong.add(cls.__name__)
    assert wrong <= {"BriaTransformerBlock", "ZImageTransformerBlock"}
    assert len(known) >= 24


def test_a_registry_that_names_no_text_argument_means_diffusers_own(monkeypatch):
    """As before diffusers 0.42, which servers still ask for."""
    known = SimpleNamespace(
        return_hidden_states_index=1, return_encoder_hidden_states_index=0, hidden_states_argument_name="hidden_states"
    )
    monkeypatch.setattr(TransformerBlockRegistry, "get", lambda block: known)
    blocks = registered_blocks("blocks.*", torch.nn.Linear, "any")
    assert (blocks.takes, blocks.gives) == (("hidden_states", "encoder_hidden_states"), (1, 0))
