"""The public face: names, handles and layers of an attachment, and what is refused before anything is touched."""

import ast
import dataclasses
import gc
import weakref
from pathlib import Path

import pytest
import torch
from wan_tiny import RADIAL, denoise, tiny_transformer

import dit_accel
import dit_accel.adapters
import dit_accel.methods
from dit_accel import AttachError, ConfigError
from dit_accel.public import HOMES


def test_public_names_are_those_of_the_stub_and_typos_are_not_swallowed():
    stub = ast.parse(Path(dit_accel.__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    assert {name.name: node.module for node in stub if isinstance(node, ast.ImportFrom) for name in node.names} == HOMES
    assert "__getattr__" not in {getattr(node, "name", "") for node in stub}  # a type checker sees a misspelt name
    assert all(getattr(dit_accel, name).__name__ == name for name in HOMES)
    assert {*HOMES, "__version__"} <= set(dir(dit_accel))
    assert dit_accel.__version__.count(".") >= 1
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        dit_accel.atach  # noqa: B018


@pytest.mark.parametrize("module", [dit_accel, dit_accel.adapters, dit_accel.methods])
def test_public_classes_name_their_fields(module):
    for kind in filter(dataclasses.is_dataclass, (getattr(module, name) for name in module.__all__)):
        fields = [field.name for field in dataclasses.fields(kind) if field.name in kind.__annotations__]
        assert not [name for name in fields if name not in kind.__doc__], kind


def test_a_lost_handle_is_found_and_holds_nothing_alive():
    transformer = tiny_transformer()
    assert dit_accel.attachment_of(transformer) is None
    dit_accel.attach(transformer, RADIAL)
    with pytest.raises(AttachError, match=r"transformer already.*attachment_of"):
        dit_accel.attach(transformer, RADIAL)
    found = dit_accel.attachment_of(transformer)
    assert repr(found) == "<Attachment: radial on transformer (wan, sizes of no released model)>"
    found.detach()
    assert repr(found).endswith("; detached>")
    for again in (found.detach, found.__enter__):
        with pytest.raises(AttachError, match="detached already"):
            again()
    model = tiny_transformer()
    dit_accel.attach(model, RADIAL, dit_accel.EasyCache(), dit_accel.SLG(layers="L0"))
    denoise(model, 1)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_only_chosen_layers_change():
    transformer = tiny_transformer()
    for layers, chosen in (("0, 2", {0, 2}), (lambda name, module: name == "blocks.1.attn1", {1})):
        with dit_accel.attach(transformer, RADIAL, layers=layers) as attachment:
            denoise(transformer, 1)
            assert {call.layer for call in attachment.report().calls} == chosen
            assert attachment.report().steps[0].dense_layers == 0
    for layers, text in (
        ("1-3", r"layers = '1-3'.*3,.*0-2"),
        ("one", r"layers = 'one'.*'one'"),
        ("2-1", r"layers = '2-1'.*'2-1'"),
        (7, r"'0, 3-20'.*got 7"),
        (lambda name, module: False, r"3 attention layers \(blocks\.0\.attn1"),
    ):
        with pytest.raises(ConfigError, match=text):
            dit_accel.attach(transformer, RADIAL, layers=layers)
        assert dit_accel.attachment_of(transformer) is None


def test_what_an_observer_raises_ends_the_forward():
    transformer = tiny_transformer()
    with dit_accel.attach(transformer, RADIAL) as attachment:
        sparse = denoise(transformer, 1)
        with pytest.raises(ZeroDivisionError), attachment.observe(lambda call: 1 / 0):
            denoise(transformer, 1)
        assert attachment.engine.observers == []
        assert torch.equal(denoise(transformer, 1), sparse)


def test_thirty_times_on_and_off_leave_nothing_behind():
    transformer = tiny_transformer(num_layers=2)
    held = []
    lite, cache = dit_accel.LiteAttention(block_size=16, dense_steps=0), dit_accel.EasyCache(threshold=0.1)
    for time in range(30):
        with dit_accel.attach(transformer, lite, *((cache, RADIAL) if time % 2 else (dit_accel.SLG(layers="L0"),))):
            denoise(transformer, 1, branches=("cond",))
        if time in (9, 19, 29):
            gc.collect()
            held.append(sum(type(one) is torch.Tensor for one in gc.get_objects()))
    assert max(held) == held[0] > 0, held
