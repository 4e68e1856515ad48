"""Sizes read off transformer configs, under any names."""

from fractions import Fraction
from functools import partial

import pytest

from dit_accel import ConfigError
from dit_accel.adapters.adapter import Adapter
from dit_accel.adapters.sizes import Sizes, patch_sizes, read_sizes

USUAL = dict(num_layers=4, num_attention_heads=3, attention_head_dim=64)


@pytest.mark.parametrize(
    ("size", "frames", "expected"),
    [
        (2, None, (1, 2, 2)),
        (2, 4, (4, 2, 2)),
        ((2, 4), None, (1, 2, 4)),
        ((2, 4), 3, (3, 2, 4)),
        ([3, 2, 4], 9, (3, 2, 4)),
    ],
)
def test_patches_of_one_to_three_numbers(size, frames, expected):
    assert patch_sizes(size, frames) == expected


@pytest.mark.parametrize(
    ("config", "names", "expected"),
    [
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
    ],
)
def test_sizes_are_read_by_the_usual_names_or_others(config, names, expected):
    found = read_sizes({**USUAL, **config}, **names)
    wanted = {"layers": 4, "heads": 3, "head_dim": 64, **expected}
    assert {name: getattr(found, name) for name in wanted} == wanted


@pytest.mark.parametrize("name", USUAL)
def test_an_entry_that_is_not_there_is_named(name):
    config = {key: value for key, value in USUAL.items() if key != name}
    for lacking in (config, {**config, name: None}):
        with pytest.raises(KeyError, match=f"'{name}'"):
            read_sizes(lacking)


def test_two_of_three_widths_are_needed():
    with pytest.raises(ConfigError, match=r"read_sizes.*heads, head_dim and width"):
        read_sizes(USUAL, head_dim=None)


def test_an_adapter_reads_sizes_its_own_way():
    mine = partial(Adapter, name="mine", transformers=("Mine",), self_attention=("blocks.*.attn",))
    assert mine().sizes(USUAL) == Sizes(layers=4, heads=3, head_dim=64)
    assert mine(sizes=lambda config: Sizes(layers=1, heads=2, head_dim=config["d"])).sizes({"d": 3}).head_dim == 3
    with pytest.raises(ConfigError, match=r"sizes\(config\).*got \(4, 3, 64\)"):
        mine(sizes=(4, 3, 64))
