"""Configs: checked on creation, the same after TOML and the command line, and clear about what is wrong."""

import dataclasses
import inspect
import math
import pathlib
import typing

import numpy as np
import pytest
import torch
from wan_tiny import tiny_transformer

import dit_accel
from dit_accel import ConfigError, LiteAttention, MagCache, RadialAttention, RoPE, SolAttention, StaticCache, UltraImage
from dit_accel.methods.config import MethodConfig, _fits
from dit_accel.methods.options import JSON_FILE, NO_FILE, may_name
from dit_accel.methods.registry import methods
from dit_accel.methods.toml import from_toml, parse_value, to_toml


def options_of(kind: type) -> list[tuple[type[MethodConfig], str]]:
    """Every option of every installed method that takes a value of a kind."""
    options = []
    for config in methods().values():
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            if kind in (hints[field.name], *typing.get_args(hints[field.name])):
                options.append((config, field.name))
    return options


def test_numbers_are_finite():
    numbers = options_of(float)
    assert {config.name for config, _ in numbers} >= {"radial", "sol", "lite", "sparsed", "delta", "ultravico"}
    for config, option in numbers:
        for value in (math.nan, math.inf, -math.inf):
            for number in (value, np.float32(value), np.float64(value)):
                with pytest.raises(ConfigError, match=rf"{config.name}\.{option} .*finite.*got .*{value}"):
                    config(**{option: number})
            with pytest.raises(ConfigError, match=rf"the file: {config.name}\.{option} .*finite.*got {value}"):
                from_toml(f"[{config.name}]\n{option} = {value}", "the file")


def test_a_text_may_name_a_file_unless_its_option_says_otherwise():
    """A stranger's method too, of which nobody here knows what it reads."""

    @dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
    class Stranger(MethodConfig):
        name: typing.ClassVar[str] = "stranger"
        number: float = 0.5
        kind: typing.Literal["a", "b"] = "a"
        table: str | tuple[str, ...] | None = None
        place: pathlib.Path | None = None
        words: typing.Annotated[str, NO_FILE] | None = None
        heads: typing.Annotated[str | tuple[str, ...], JSON_FILE] | None = None

    assert Stranger(words="a.json", heads=["L1", "L2"]).outside() == {}
    files = dict(table=("a", "b"), place=pathlib.Path("c"), heads=("L1", "x.json, L2"))
    assert Stranger(**files).outside() == files
    assert Stranger(table="a").outside() == {"table": "a"}
    hints = {config: typing.get_type_hints(config, include_extras=True) for config in methods().values()}
    readers = [(kind, option) for kind, option in options_of(str) if may_name("x.json", hints[kind][option], _fits)]
    assert {f"{config.name}.{option}" for config, option in readers} == {
        "autoguidance.weak", "lite.thresholds_file", "profilingcache.blocks", "softpag.heads", "pag.layers",
        "seg.layers", "slg.layers",
    }  # fmt: skip


def test_numbers_of_numpy_become_python_s_own():
    config = RadialAttention(
        block_size=np.int64(64), dense_steps=np.int32(3), decay_factor=np.float32(0.5), dense_layers=np.uint8(2)
    )
    same = RadialAttention(block_size=64, dense_steps=3, decay_factor=0.5, dense_layers=2)
    assert (config, hash(config), from_toml(to_toml([config]))) == (same, hash(same), [same])
    assert {type(config.block_size), type(config.dense_steps), type(config.dense_layers)} == {int}
    assert type(config.decay_factor) is float
    ranges = LiteAttention(must_keep=(np.int64(0), 16), threshold=np.float64(-3.0))
    assert ranges == LiteAttention(must_keep=(0, 16), threshold=-3.0)
    assert [type(number) for number in ranges.must_keep] == [int, int]


def test_lists_are_taken_and_can_t_change_the_config_afterwards():
    steps = [1, np.int64(0), 1]
    config = StaticCache(steps=steps)
    steps[1] = 1
    assert config.steps == (1, 0, 1)
    assert config == StaticCache(steps=(1, 0, 1))
    assert hash(MagCache(ratios=[1.0, 0.9])) == hash(MagCache(ratios=(1.0, 0.9)))
    assert dit_accel.ProfilingCache(blocks=[0, 2]).to_dict()["blocks"] == [0, 2]


NO_INTEGERS = r"lite\.must_keep.*integers.*got "
NO_INTEGER = r"radial\.block_size.*integer.*got "


def test_values_of_another_kind_are_refused():
    for config_type, options, message in (
        (RoPE, dict(axes="frames"), r"""rope\.axes.*got 'frames'.*--set 'rope\.axes=\["frames"\]'$"""),
        (UltraImage, dict(indices=9), r"got 9.*--set 'ultraimage\.indices=\[9\]'$"),
        (StaticCache, dict(steps=[1, "x"]), r"staticcache\.steps.*integers.*got \[1, 'x'\].*'staticcache\.steps="),
        *((RadialAttention, dict(block_size=x), NO_INTEGER) for x in (True, "64", 64.0, np.float64(64))),
        (RadialAttention, dict(block_size=torch.tensor(64)), NO_INTEGER),
        *((LiteAttention, dict(must_keep=x), NO_INTEGERS) for x in ((0, 1.5), (0, "1"), [0, 1.5], 16, (True, 16))),
        (RadialAttention, dict(dense_steps=2.5), r"radial\.dense_steps.*got 2\.5"),
        (RadialAttention, dict(decay_facter=1), r"radial.*'decay_facter'.*'decay_factor'"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_type(**options)


def test_what_is_no_config_gets_a_hint():
    for value, hint in (
        (RadialAttention, r"got <class .*RadialAttention'>; .*instance.*RadialAttention\(\)"),
        ([RadialAttention(), SolAttention()], r"got \[RadialAttention.*\]; .*attach\(pipe, \*"),
        ((RadialAttention(),), r"got \(RadialAttention.*\); .*attach\(pipe, \*"),
        ("radial", r"got 'radial'; known: AutoGuidance, CFGCache, DBCache, DBPrune, DFA.*RadialAttention.*UltraViCo"),
        (None, r"got None; known: .*DeltaAttention"),
    ):
        transformer = tiny_transformer(num_layers=1)
        with pytest.raises(ConfigError, match=rf"attach.*{hint}"):
            dit_accel.attach(transformer, value)
        assert dit_accel.attachment_of(transformer) is None


def test_errors_of_toml_name_their_source():
    for text, message in (
        ("[radial", r"^the file.*TOML"),
        ("version = 7", r"^the file.*version 7.*version 1"),
        ("sink = true", r"^the file: sink = True.*\[radial\]"),
        ("[radiol]", r"^the file.*method.*'radiol'.*'radial'\?"),
        ("[radial]\nsnik = true", r"^the file: radial.*'snik'.*'sink'\?"),
        ("[radial]\nblock_size = 17", r"^the file: radial\.block_size.*got 17"),
        ("[radial]\nsink = 3", r"^the file: radial\.sink.*got 3"),
        ("[radial]\nblock_size = 1.5", r"^the file: radial\.block_size.*got 1\.5"),
        ("[radial]\nnear = 'nowhere'", r"^the file: radial\.near.*'full'.*'half'.*got 'nowhere'"),
        # what is out of range says what is usual
        ("[easycache]\nthreshold = -1", r"easycache\.threshold.*>= 0, got -1; 0\.05"),
        ("[radial]\ndecay_factor = 0.0", r"radial\.decay_factor.*above 0, got 0\.0; 1 "),
        ("[sparsed]\nmass = 1.0", r"sparsed\.mass.*above 0.*below 1, got 1\.0; 0\.95 "),
        ("[dfa]\nevery = 0", r"dfa\.every.*>= 1, got 0; 2 "),
        ("[lvsa]\ntrained_frames = 0", r"lvsa\.trained_frames.*>= 1, got 0$"),
        ("[staticcache]\nsteps = [1, 2]", r"staticcache\.steps.*0 to 1, got 2; 1 .*0 "),
        ("[staticcache]\nsteps = [0, 1]", r"staticcache\.steps.*with 1, got \[0, 1\]$"),
        ("[lite]\ndense_steps = 2.5", r"lite\.dense_steps.*from 0.*share.*below 1, got 2\.5; 0\.1 .*5.*0\.2"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            from_toml(text, "the file")
        assert str(error.value).startswith("the file")


def test_toml_without_a_source_with_a_mark_or_of_one_method_twice():
    with pytest.raises(ConfigError, match=r"method config.*TOML"):
        from_toml("[radial")
    assert from_toml("\ufeff" + to_toml([RadialAttention(sink=False)])) == [RadialAttention(sink=False)]
    with pytest.raises(ConfigError, match="two radial"):
        to_toml([RadialAttention(), RadialAttention()])


def test_values_of_the_command_line_are_of_one_line():
    values = {"0.5": 0.5, "3": 3, "true": True, "half": "half", "'half'": "half", "[1, 2]": [1, 2], "0.5\n": 0.5}
    assert {text: parse_value(text) for text in values} == values
    for text in ("1\nradial.near = 2", "1\n2", "'a'\n\n'b'", "[1,\n2]"):
        with pytest.raises(ConfigError, match=r"one value.*--set"):
            parse_value(text)


def test_no_method_takes_an_option_that_it_does_not_list():
    for config_type in methods().values():
        with pytest.raises(ConfigError, match=rf"{config_type.name}.*option 'nothing'"):
            config_type(nothing=1)
        assert [*inspect.signature(config_type).parameters] == [one.name for one in dataclasses.fields(config_type)]
