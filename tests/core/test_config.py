"""Configs: frozen, checked on creation, the same after TOML, and clear about what is wrong."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_accel import ConfigError, RadialAttention
from dit_accel.methods.config import from_dict
from dit_accel.methods.toml import from_toml, parse_value, to_toml

options = st.fixed_dictionaries(
    {},
    optional={
        "decay_factor": st.floats(0.01, 4),
        "block_size": st.sampled_from([16, 32, 64, 128]),
        "near": st.sampled_from(["full", "half"]),
        "sink": st.booleans(),
        "rest": st.sampled_from(["skip", "pooled"]),
        "dense_steps": st.integers(0, 50) | st.floats(0.01, 0.99),
        "dense_layers": st.integers(0, 9),
    },
)


@given(options)
def test_toml_round_trip(values):
    config = RadialAttention(**values)
    assert from_toml(to_toml([config])) == [config]


def test_configs_are_frozen_slotted_and_keyword_only():
    config = RadialAttention()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.decay_factor = 1.0
    with pytest.raises(TypeError):
        RadialAttention(0.2)
    assert not hasattr(config, "__dict__")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[radial]\ndecay_facto = 1", r"radial has no option 'decay_facto'; did you mean 'decay_factor'\?"),
        ("[radiol]\n", r"no method is called 'radiol'; did you mean 'radial'\?"),
        ("decay_factor = 1", r"decay_factor = 1 stands outside a method's table"),
        ("version = 7", "has version 7, this release reads version 1"),
        ("[radial", "is no valid TOML"),
        ("[radial]\nsink = 3", "radial.sink must be true or false or unset, got 3"),
        ("[radial]\nblock_size = 1.5", r"radial.block_size must be an integer or unset, got 1.5"),
        ("[radial]\nnear = 'nowhere'", "radial.near must be 'full' or 'half' or unset, got 'nowhere'"),
    ],
)
def test_bad_toml_says_what_is_wrong(text, message):
    with pytest.raises(ConfigError, match=message):
        from_toml(text)


def test_two_configs_of_one_method_have_no_toml():
    with pytest.raises(ConfigError, match="two radial configs were given"):
        to_toml([RadialAttention(), RadialAttention()])


def test_values_of_the_command_line():
    assert [parse_value(text) for text in ("0.5", "3", "true", "half", "'half'", "[1, 2]")] == [
        0.5, 3, True, "half", "half", [1, 2],
    ]  # fmt: skip
    assert from_dict(RadialAttention, {"near": parse_value("half")}).near == "half"


def test_share_of_steps():
    config = RadialAttention(dense_steps=0.24, dense_layers=0, dense_last_steps=1).resolve()
    assert [step for step in range(8) if config.is_dense(step, 8, 5)] == [0, 1, 7]
    with pytest.raises(ConfigError, match="dense_last_steps = 1 needs the number of steps"):
        config.is_dense(0, None, 5)
    with pytest.raises(ConfigError, match=r"must be a whole number of steps or a share below 1, got 2.5"):
        RadialAttention(dense_steps=2.5)
