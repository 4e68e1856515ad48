"""Block lists as data, and the streams in the calls and results of a block."""

import re
from types import SimpleNamespace

import pytest
import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from torch import nn

from dit_accel import ConfigError, UnsupportedModel
from dit_accel.adapters.adapter import Adapter
from dit_accel.adapters.block_lists import block_lists, blocks_of, registered_blocks
from dit_accel.adapters.blocks import JOINT, BlockList, block_signature

H, E, OTHER = torch.zeros(1, 4, 2), torch.ones(1, 3, 2), torch.full((1, 5, 2), 2.0)


class Joint(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(2, 2)
        self.attn.processor = object()

    def forward(self, hidden_states, encoder_hidden_states=None, temb=None, *, extra=None):
        return encoder_hidden_states, hidden_states


class Toy(nn.Module):
    def __init__(self, **config):
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.blocks = nn.ModuleList([Joint() for _ in range(12)])
        self.inner = nn.ModuleList([nn.ModuleList([Joint()])])


FLUX_LIKE = BlockList(pattern="blocks.*", takes=JOINT, gives=(1, 0))
SIGNATURE = block_signature(FLUX_LIKE, Joint)


def adapter(**changes):
    return Adapter(**{"name": "mine", "transformers": ("Toy",), "self_attention": ("blocks.*.attn",), **changes})


def same(found, expected):
    return all(one is two for one, two in zip(found, expected, strict=True))


def test_what_is_no_block_list_is_refused():
    for option, *values in (
        ("pattern", "blocks", None), ("takes", "hidden_states", (), ("x", "x")), ("gives", (0, 1), [0], (0, 0)),
    ):  # fmt: skip
        for value in values:
            with pytest.raises(ConfigError, match=rf"got {re.escape(repr(value))}"):
                BlockList(**{"pattern": "blocks.*", option: value})
    for gives in ((0,), (0, 0)):
        with pytest.raises(ConfigError, match=r"gives.*2 streams"):
            BlockList(pattern="blocks.*", takes=JOINT, gives=gives)
    with pytest.raises(ConfigError, match=r"blocks.*BlockList.*got BlockList"):
        adapter(blocks=FLUX_LIKE)


def test_streams_are_read_and_written_however_they_are_given():
    for args, kwargs, expected in (
        ((H, E), {}, (H, E)),
        ((H,), dict(encoder_hidden_states=E), (H, E)),
        ((), dict(temb=OTHER, encoder_hidden_states=E, hidden_states=H), (H, E)),
        ((H,), dict(temb=OTHER), (H, None)),
    ):
        assert same(SIGNATURE.read_call(args, kwargs), expected)
        before = (tuple(args), dict(kwargs))
        new_args, new_kwargs = SIGNATURE.write_call((OTHER, expected[1]), args, kwargs)
        assert same(SIGNATURE.read_call(new_args, new_kwargs), (OTHER, expected[1]))
        assert same((*args, *kwargs.values()), (*before[0], *before[1].values()))
        assert (len(new_args), set(new_kwargs)) == (len(args), set(kwargs))
    assert SIGNATURE.write_call((H, E), (H,), {}) == ((H,), {"encoder_hidden_states": E})  # a stream that it lacks
    by_keyword = block_signature(BlockList(pattern="blocks.*", takes=("extra",)), Joint)
    assert by_keyword.read_call((H, E, OTHER), {}) == (None,)
    assert by_keyword.write_call((H,), (OTHER, E, E), {"extra": E})[1]["extra"] is H


def test_results_are_read_and_built_in_the_blocks_order():
    assert same(SIGNATURE.read_result((E, H)), (H, E))
    assert same(SIGNATURE.write_result((H, E)), (E, H))
    assert same(SIGNATURE.write_result((H, None), like=(None, OTHER)), (None, H))
    alone = block_signature(BlockList(pattern="blocks.*"), Joint)
    assert alone.read_result(H) == (H,)
    assert alone.write_result((H,)) is H
    assert alone.write_result((H,), like=E) is H
    listed = BlockList(pattern="blocks.*", gives=(None, 0))  # what is no stream is kept, and can't be made up
    signature = block_signature(listed, Joint)
    assert (listed.gives_streams_only, FLUX_LIKE.gives_streams_only) == (False, True)
    assert same(signature.read_result((E, H)), (H,))
    assert same(signature.write_result((OTHER,), like=(E, H)), (E, OTHER))
    with pytest.raises(ConfigError, match=r"Joint.*streams"):
        signature.write_result((OTHER,))


def test_a_result_of_another_form_and_a_stream_of_another_name_are_refused():
    for gives, result, message in (
        ((1, 0), H, r"Joint.*Tensor.*tuple of 2"),
        ((1, 0), (H, E, H), r"Joint.*tuple of 3.*tuple of 2"),
        ((0,), (H,), r"Joint.*tuple of 1.*tensor"),
    ):
        signature = block_signature(BlockList(pattern="blocks.*", takes=JOINT[: len(gives)], gives=gives), Joint)
        with pytest.raises(UnsupportedModel, match=message):
            signature.read_result(result)
        with pytest.raises(UnsupportedModel, match=message):
            signature.write_result((H, E), like=result)
    with pytest.raises(UnsupportedModel, match=r"Joint.*'x'.*'blocks\.\*'.*hidden_st"):
        block_signature(BlockList(pattern="blocks.*", takes=("x",)), Joint)


def test_the_lists_of_an_adapter_are_those_that_the_model_has():
    def names(listed, model=None, **changes):
        return [name for name, _ in blocks_of(listed, adapter(**changes), model or Toy())]

    assert block_lists(adapter(blocks=(BlockList(pattern="vace_blocks.*"), FLUX_LIKE)), Toy()) == (FLUX_LIKE,)
    assert names(FLUX_LIKE) == [f"blocks.{i}" for i in range(12)]  # no blocks.0.attn, nor in the order of letters
    assert names(BlockList(pattern="inner.*.*", takes=JOINT, gives=(1, 0))) == ["inner.0.0"]
    dense = lambda config: tuple(f"blocks.{i}.attn" for i in range(config.encoder, 12))  # noqa: E731
    assert names(FLUX_LIKE, Toy(encoder=3), always_dense=dense) == ["blocks.0", "blocks.1", "blocks.2"]


def test_a_model_without_blocks_is_refused():
    for changes, message in (
        (dict(blocks=()), r"'mine' describes.*Toy"),
        (dict(blocks=(BlockList(pattern="layers.*"),)), r"layers\.\* in Toy"),
        ({}, r"Joint \(blocks\.\*\).*'mine'.*blocks=\(BlockList"),
        (dict(self_attention=("layers.*.attn",)), r"layers\.\*\.attn.*Toy"),
    ):
        with pytest.raises(UnsupportedModel, match=message):
            block_lists(adapter(**changes), Toy())


def test_diffusers_registry_is_read_where_an_adapter_tells_nothing():
    found = registered_blocks("transformer_blocks.*", FluxTransformerBlock, "flux")
    assert found == BlockList(pattern="transformer_blocks.*", takes=JOINT, gives=(1, 0))
    TransformerBlockRegistry.get(FluxTransformerBlock)  # private to diffusers: what is read of it is still there
    fields = set(TransformerBlockRegistry._registry[FluxTransformerBlock].__dataclass_fields__)
    assert fields >= {
        "return_hidden_states_index", "return_encoder_hidden_states_index",
        "hidden_states_argument_name", "encoder_hidden_states_argument_name",
    }  # fmt: skip
