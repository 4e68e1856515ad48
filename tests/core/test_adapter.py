"""Adapters: what is no adapter is refused where it is written, and the grid it gives where it is read."""

from types import SimpleNamespace

import pytest
import torch

from dit_accel import ConfigError
from dit_accel.adapters.adapter import Adapter, latents_grid
from dit_accel.attachment.forward import _read_grid


def adapter(**changes):
    return Adapter(**{"name": "mine", "transformers": ("Mine",), "self_attention": ("blocks.*.attn",), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(transformers="Mine"), r"'mine': transformers.*got 'Mine'"),
        (dict(self_attention="a.*"), r"self_attention.*got 'a\.\*'.*\(entry,\)"),
        (dict(side_attention="b.*"), r"side_attention.*got 'b\.\*'"),
        (dict(transformers=(SimpleNamespace,)), r"transformers.*SimpleNamespace"),
        (dict(families=("mine-1b",)), r"families.*Family.*got \('mine-1b',\)"),
        (dict(grid=(1, 2, 3, 0, 0)), r"grid\(config, inputs\).*got \(1, 2, 3, 0, 0\)"),
        (dict(always_dense=("blocks.0.attn",)), r"always_dense\(config\).*got \('blocks.0.attn',\)"),
    ],
)
def test_what_is_no_adapter_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        adapter(**changes)


LATENTS = {"hidden_states": torch.zeros(1, 4, 7, 8, 16), "timestep": torch.zeros(1)}
CONFIG = SimpleNamespace(patch_size=2)


def test_latents_grid_knows_three_places_of_text():
    assert latents_grid(CONFIG, LATENTS) == (7, 4, 8, 0, 0)
    with pytest.raises(ConfigError, match=r"text='none', 'before'.*'after', got text='behind'"):
        latents_grid(CONFIG, LATENTS, text="behind")


def test_a_grid_or_a_sentence_is_read_as_it_is():
    assert _read_grid(adapter(), CONFIG, LATENTS) == (7, 4, 8, 0, 0)
    assert _read_grid(adapter(grid=lambda config, inputs: "no grid here"), CONFIG, LATENTS) == "no grid here"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(grid=lambda c, x: (7, 4, 8)),
            r"'mine' gave \(7, 4, 8\)",
        ),
        (dict(grid=lambda c, x: (7, 4, 8 / 2, 0, 0)), r"gave \(7, 4, 4.0, 0, 0\)"),
        (dict(grid=lambda c, x: None), "'mine' gave None"),
        (
            dict(grid=lambda c, x: x["txt"]),
            r"grid.*'txt'.*hidden_states, timestep",
        ),
        (
            dict(latents="x"),
            r"'mine'.*'x'.*hidden_states.*latents",
        ),
    ],
)
def test_what_is_no_grid_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        _read_grid(adapter(**changes), CONFIG, LATENTS)


def test_of_families_of_one_size_the_patches_tell():
    from dit_accel.adapters.installed import adapters

    config = {"num_layers": 42, "num_attention_heads": 48, "attention_head_dim": 64, "patch_size": 2}
    cogvideox = adapters()["cogvideox"]
    for patch, name in ((None, "cogvideox-5b"), (2, "cogvideox1.5-5b")):
        family = cogvideox.family({**config, "patch_size_t": patch})
        assert family is not None
        assert family.name == name
