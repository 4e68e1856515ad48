"""Adapters: what they say of a model's grid, layout and sizes, what is refused, and one that is proposed."""

from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from torch import nn

from dit_accel import ConfigError
from dit_accel.adapters.adapter import Adapter, latents_grid
from dit_accel.adapters.installed import adapters
from dit_accel.adapters.sizes import Sizes, patch_sizes, read_sizes
from dit_accel.attachment.forward import _read_grid
from dit_accel.plan.layout import TokenLayout, layout_of, with_valid_text
from dit_accel.testing import TinyModel, propose_adapter

adapter = partial(Adapter, name="mine", transformers=("Mine",), self_attention=("blocks.*.attn",))


def test_what_is_no_adapter_is_refused():
    for changes, message in (
        (dict(transformers="Mine"), r"'mine': transformers.*got 'Mine'"),
        (dict(self_attention="a.*"), r"self_attention.*got 'a\.\*'.*\(entry,\)"),
        (dict(side_attention="b.*"), r"side_attention.*got 'b\.\*'"),
        (dict(transformers=(SimpleNamespace,)), r"transformers.*SimpleNamespace"),
        (dict(families=("mine-1b",)), r"families.*Family.*got \('mine-1b',\)"),
        (dict(grid=(1, 2, 3, 0, 0)), r"grid\(config, inputs\).*got \(1, 2, 3, 0, 0\)"),
        (dict(sizes=(4, 3, 64)), r"sizes\(config\).*got \(4, 3, 64\)"),
        (dict(always_dense=("blocks.0.attn",)), r"always_dense\(config\).*got \('blocks.0.attn',\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            adapter(**changes)


LATENTS = {"hidden_states": torch.zeros(1, 4, 7, 8, 16), "timestep": torch.zeros(1)}
CONFIG = SimpleNamespace(patch_size=2)


def test_a_grid_is_that_of_the_latents_or_a_sentence():
    assert latents_grid(CONFIG, LATENTS) == _read_grid(adapter(), CONFIG, LATENTS) == (7, 4, 8, 0, 0)
    assert _read_grid(adapter(grid=lambda config, inputs: "no grid here"), CONFIG, LATENTS) == "no grid here"
    with pytest.raises(ConfigError, match=r"text='none', 'before'.*'after', got text='behind'"):
        latents_grid(CONFIG, LATENTS, text="behind")


def test_what_is_no_grid_is_refused():
    for changes, message in (
        (dict(grid=lambda c, x: (7, 4, 8)), r"'mine' gave \(7, 4, 8\)"),
        (dict(grid=lambda c, x: (7, 4, 8 / 2, 0, 0)), r"gave \(7, 4, 4.0, 0, 0\)"),
        (dict(grid=lambda c, x: None), "'mine' gave None"),
        (dict(grid=lambda c, x: x["txt"]), r"grid.*'txt'.*hidden_states, timestep"),
        (dict(latents="x"), r"'mine'.*'x'.*hidden_states.*latents"),
    ):
        with pytest.raises(ConfigError, match=message):
            _read_grid(adapter(**changes), CONFIG, LATENTS)


LAYOUT = TokenLayout(frames=2, height=3, width=4, text_before=5, text_after=7)


def test_a_layout_counts_its_tokens():
    assert (LAYOUT.tokens_per_frame, LAYOUT.visual_tokens, LAYOUT.tokens) == (12, 24, 36)
    assert LAYOUT.visual == slice(5, 29)
    assert LAYOUT.lengths == {"frames": 2, "height": 3, "width": 4}
    assert layout_of([2.0, 3, 4, 5, 7]) == LAYOUT
    assert TokenLayout(frames=1, height=1, width=1).tokens == 1


@pytest.mark.parametrize("name", ["frames", "height", "width", "text_before", "text_after"])
def test_sizes_that_are_none_are_refused(name):
    least = 0 if name.startswith("text") else 1
    sizes = {"frames": 2, "height": 3, "width": 4, name: least}
    assert getattr(TokenLayout(**sizes), name) == least
    for value in (least - 1, 1.0, True, "2", None, torch.tensor(2)):
        with pytest.raises(ConfigError, match=rf"layout.*{name}.*>= {least}, got "):
            TokenLayout(**{**sizes, name: value})


@pytest.mark.parametrize(
    ("length", "before", "after"),
    [(36, 5, 7), (35, 5, 6), (29, 5, 0), (24, 0, 0), (28, 5, 7), (37, 5, 7), (23, 5, 7)],
)
def test_text_that_a_sequence_left_out(length, before, after):
    """It is missing from the end; a video alone has none; what fits neither is left to be refused."""
    valid = with_valid_text(LAYOUT, length)
    assert (valid.text_before, valid.text_after, valid.visual_tokens) == (before, after, 24)


USUAL = dict(num_layers=4, num_attention_heads=3, attention_head_dim=64)


@pytest.mark.parametrize(
    ("size", "frames", "expected"),
    [(2, None, (1, 2, 2)), (2, 4, (4, 2, 2)), ((2, 4), None, (1, 2, 4)), ((2, 4), 3, (3, 2, 4)),
     ([3, 2, 4], 9, (3, 2, 4))],
)  # fmt: skip
def test_patches_of_one_to_three_numbers(size, frames, expected):
    assert patch_sizes(size, frames) == expected


def test_sizes_are_read_by_the_usual_names_or_others():
    for config, names, expected in (
        ({}, {}, dict(ffn_dim=None, patch=None)),
        (dict(ffn_dim=500, patch_size=2, patch_size_t=3), {}, dict(ffn_dim=500, patch=(3, 2, 2))),
        (dict(num_single_layers=5, mlp_ratio=2.5), {}, dict(layers=9, ffn_dim=480)),
        (dict(num_single_layers=None), {}, dict(layers=4)),
        (dict(vace_layers=[0, 2]), dict(layers=("num_layers", "vace_layers")), dict(layers=6)),
        (dict(ffn_dim=500, mlp_ratio=4.0), dict(gated=True), dict(ffn_dim=750)),
        (dict(mlp_ratio=9.0, patch_size=1), dict(mlp_ratio=4.0, patch=(1, 2, 2)), dict(ffn_dim=768, patch=(1, 2, 2))),
        ({}, dict(mlp_ratio=Fraction(8, 3), multiple_of=256, gated=True), dict(ffn_dim=768)),
        ({}, dict(mlp_ratio=Fraction(1, 5)), dict(ffn_dim=38)),
        (dict(dim=96), dict(head_dim=None, width="dim", mlp_ratio=4), dict(head_dim=32, ffn_dim=384)),
        (dict(dim=96), dict(width="dim", mlp_ratio=4), dict(head_dim=64, ffn_dim=192)),  # narrower than its attention
        (dict(dim=96, axes=(4, 6, 6)), dict(heads=None, head_dim="axes", width="dim"), dict(heads=6, head_dim=16)),
        (dict(wide=7), dict(ffn_dim="wide", mlp_ratio=4.0), dict(ffn_dim=7)),
    ):
        sizes = read_sizes({**USUAL, **config}, **names)
        wanted = {"layers": 4, "heads": 3, "head_dim": 64, **expected}
        assert {name: getattr(sizes, name) for name in wanted} == wanted


def test_sizes_that_are_not_there_are_named_and_an_adapter_may_read_them_its_own_way():
    for name in USUAL:
        config = {key: value for key, value in USUAL.items() if key != name}
        for lacking in (config, {**config, name: None}):
            with pytest.raises(KeyError, match=f"'{name}'"):
                read_sizes(lacking)
    with pytest.raises(ConfigError, match=r"read_sizes.*heads, head_dim and width"):
        read_sizes(USUAL, head_dim=None)
    assert adapter().sizes(USUAL) == Sizes(layers=4, heads=3, head_dim=64)
    assert adapter(sizes=lambda config: Sizes(layers=1, heads=2, head_dim=config["d"])).sizes({"d": 3}).head_dim == 3


def test_of_families_of_one_size_the_patches_tell():
    config = {"num_layers": 42, "num_attention_heads": 48, "attention_head_dim": 64, "patch_size": 2}
    for patch, name in ((None, "cogvideox-5b"), (2, "cogvideox1.5-5b")):
        assert adapters()["cogvideox"].family({**config, "patch_size_t": patch}).name == name


def test_a_proposal_has_the_attention_text_and_blocks_of_the_family_s_adapter():
    for name, grid, alone in (
        ("wan", {}, ("blocks.*.attn2",)),
        ("cogvideox", {"frames_axis": 1, "text": "before"}, ()),
        ("hunyuan-video", {"text": "after"}, ("context_embedder.token_refiner.refiner_blocks.*.attn",)),
        ("sd3", {"frames_axis": None, "text": "after"}, ()),
        ("cogview", {"frames_axis": None, "text": "before"}, ()),
        ("ltx", None, ("transformer_blocks.*.attn2",)),
    ):
        proposal, known = propose_adapter(tiny_models.MODELS[name][0]), adapters()[name]
        assert set(proposal.adapter.self_attention) == {*known.self_attention}
        assert (proposal.left_alone, proposal.grid_found) == (alone, grid is not None)
        assert getattr(proposal.adapter.grid, "keywords", {}) == (grid or {})
        assert ("grid=..." in proposal.source()) == (grid is None)
        streams = [{(block.pattern, block.takes, block.gives) for block in one.blocks or ()}
                   for one in (proposal.adapter, known)]  # fmt: skip
        assert streams[0] <= streams[1]
        assert proposal.rope_of in (None, name)


def test_a_model_without_attention_is_refused():
    class Plain(nn.Module):
        config = None

        def forward(self, hidden_states, return_dict=True):
            return (hidden_states,)

    tiny = TinyModel(transformer=Plain, config={}, inputs=lambda batch: dict(hidden_states=torch.zeros(batch, 4)))
    with pytest.raises(ConfigError, match=r"Plain.*scaled_dot_product_attention"):
        propose_adapter(tiny)
