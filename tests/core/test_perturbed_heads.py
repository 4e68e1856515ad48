"""Which heads a spec names, and what is refused."""

import json

import pytest

from dit_accel import ConfigError
from dit_accel.methods.guidance.head_specs import Stacks, first_layer, read_heads, split_specs

NAMES = [f"transformer_blocks.{i}.attn" for i in range(3)] + [f"single_transformer_blocks.{i}.attn" for i in range(12)]
STACKS = Stacks(names=NAMES, heads=4, others={"transformer_blocks.0.cross", "refiner.attn"})
ALL = (0, 1, 2, 3)


def read(specs, **published):
    return read_heads(specs, STACKS, "softpag.heads", published)


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        ("L3H1", {3: (1,)}),
        ("L3H1, L3H0", {3: (0, 1)}),
        (("L3H1", "L0"), {0: ALL, 3: (1,)}),
        ("L1", {1: ALL}),  # and none of 10 to 14
        ("L1-3", {1: ALL, 2: ALL, 3: ALL}),
        ("L1-L2H0-2", {1: (0, 1, 2), 2: (0, 1, 2)}),
        ("transformer_blocks", dict.fromkeys((0, 1, 2), ALL)),
        ("single_transformer_blocks.L0H3", {3: (3,)}),
        ("transformer_blocks.1.attn", {1: ALL}),
        ("golden", {2: (3,), 14: (0,)}),
        ("", {}),
        ((), {}),
    ],
)
def test_specs_name_heads(specs, expected):
    assert read(specs, golden=("L14H0", "L2H3")) == expected


@pytest.mark.parametrize(
    ("specs", "text"),
    [
        ("L15", r"softpag\.heads 'L15'.*layers 0 to 14"),
        ("L2-1", "layers 0 to 14"),
        ("transformer_blocks.L3", r"transformer_blocks.*layers 0 to 2"),
        ("L1H4", r"15 attention layers.*heads 0 to 3"),
        ("blocks.L1", r"'blocks'.*transformer_blocks, single_transformer_blocks"),
        ("transformer_blocks.0.cross", r"transformer_blocks\.0\.cross.*cross-attention"),
        ("refiner.attn", r"refiner\.attn.*L0 to L14"),
        ("gold", r"'gold'.*L3H1 \(a head\).*'golden'"),
        ("3:1", r"'3:1'.*L3H1"),
        ("none.json", r"none\.json: No such file"),
    ],
)
def test_what_is_not_there_is_refused_with_the_counts(specs, text):
    with pytest.raises(ConfigError, match=text):
        read(specs, golden=("L14H0",))


def test_files_hold_lists(tmp_path):
    path = tmp_path / "heads.json"
    for content in (["L3H1", "L0"], {"heads": ["L3H1", "L0"], "objective": "sharpness"}):
        path.write_text(json.dumps(content))
        assert read(str(path)) == {0: ALL, 3: (1,)}
    for content, text in (("[", r"heads.*JSON"), ("{}", "got None"), ("[1]", r"got \[1\]")):
        path.write_text(content)
        with pytest.raises(ConfigError, match=text):
            read(str(path))
    path.write_text(json.dumps([str(path)]))
    with pytest.raises(ConfigError, match=r"heads\.json.*got \["):
        read(str(path))


def test_specs_without_a_model():
    assert first_layer("L5H1, L3", 12, 4) == 3
    assert first_layer("single_transformer_blocks", 12, 4) is None  # how many stand before it is not known
    assert split_specs(" L1 ,L2H3,") == ("L1", "L2H3")
