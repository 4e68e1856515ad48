"""Methods in whatever order they are given: the same latents bit for bit, the same report, or the same refusal."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from wan_tiny import denoise, sharp_transformer

import dit_accel
from dit_accel import (
    ConfigError,
    DeltaAttention,
    LiteAttention,
    RadialAttention,
    SolAttention,
    SparseD,
    UltraViCo,
)
from dit_accel.methods.attention.sparse import SparseConfig
from dit_accel.methods.config import MethodConfig

METHODS = {
    "radial": RadialAttention(
        decay_factor=0.2, near="half", sink=False, rest="pooled", order="tiles", dense_steps=0, dense_layers=0
    ),
    "sol": SolAttention(beta=0.3, dense_steps=1, dense_layers=0),
    "lite": LiteAttention(threshold=-1.0, dense_steps=0),
    "sparsed": SparseD(density=0.6, dense_steps=1, dense_layers=1),
    "delta": DeltaAttention(stride=8),
    "ultravico": UltraViCo(trained_frames=2, alpha=0.5, first_frame=True),
}
BLOCK = 16


def combinations(count: int) -> list[Any]:
    """Every choice of so many methods."""
    return [pytest.param(names, id=", ".join(names)) for names in itertools.combinations(METHODS, count)]


def sized(names: tuple[str, ...], **sizes: int) -> tuple[MethodConfig, ...]:
    """The configs of some methods, of which those named have a tile size."""
    return tuple(
        dataclasses.replace(METHODS[name], block_size=sizes[name]) if name in sizes else METHODS[name] for name in names
    )


def tiled(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if isinstance(METHODS[name], SparseConfig)]


CLOCKED = ("timing", "why_not_faster", "measured_speedup")
"""What a report says of its run's seconds, which no two runs share."""


def outcome(transformer: Any, methods: tuple[MethodConfig, ...], steps: int = 3) -> tuple[torch.Tensor, dict] | str:
    """The latents and the report of a short run, or why it is refused."""
    try:
        with dit_accel.attach(transformer, *methods, preset="none") as attachment:
            latents = denoise(transformer, steps, branches=("cond",))
            found = attachment.report().to_dict()
            return latents, {key: value for key, value in found.items() if key not in CLOCKED}
    except ConfigError as error:
        return str(error)


def outcome_of_every_order(
    transformer: Any, methods: tuple[MethodConfig, ...], steps: int = 3
) -> tuple[torch.Tensor, dict] | str:
    """What all orders of some methods have in common; one that differs fails."""
    first = outcome(transformer, methods, steps)
    for ordered in itertools.islice(itertools.permutations(methods), 1, None):
        found = outcome(transformer, ordered, steps)
        if isinstance(first, str) or isinstance(found, str):
            assert found == first
        else:
            assert torch.equal(found[0], first[0])
            assert found[1] == first[1]
    return first


@pytest.fixture(scope="module")
def transformer():
    return sharp_transformer(num_layers=2)


def check(transformer: Any, names: tuple[str, ...], *sizes: str) -> None:
    """Run all orders of some methods, of which ``sizes`` have a tile size set; what thins out does so."""
    found = outcome_of_every_order(transformer, sized(names, **dict.fromkeys(sizes, BLOCK)))
    if "delta" in names and not tiled(names):
        assert isinstance(found, str)
        assert "delta corrects what a sparse method leaves out" in found
        return
    assert not isinstance(found, str), found
    _, report = found
    assert set(report["methods"]) == {*names}
    assert {report["methods"][name]["block_size"] for name in tiled(names)} <= {BLOCK}
    assert not tiled(names) or report["density"] < 1
    assert report["calls"]


@pytest.mark.parametrize("names", combinations(2))
def test_pairs(transformer, names):
    """With a tile size set on each one alone, and on both."""
    with_tiles = tiled(names)
    for sizes in ([name] for name in with_tiles):
        check(transformer, names, *sizes)
    if len(with_tiles) != 1:
        check(transformer, names, *with_tiles)


@pytest.mark.slow
@pytest.mark.parametrize("names", combinations(3))
def test_triples(transformer, names):
    """With a tile size set on the one that acts last."""
    check(transformer, names, *tiled(names)[-1:])


@pytest.mark.parametrize("names", [x for x in combinations(2) if len(tiled(x.values[0])) == 2])
def test_two_tile_sizes_are_refused_in_the_same_words(transformer, names):
    found = outcome_of_every_order(transformer, sized(names, **dict(zip(names, (16, 32), strict=True))))
    assert isinstance(found, str)
    for name, size in zip(names, (16, 32), strict=True):
        assert f"{name}.block_size = {size}" in found
    assert "can't be attached together" in found


def test_methods_that_begin_at_different_steps(transformer):
    methods = (
        SolAttention(dense_steps=1, dense_layers=0),
        LiteAttention(dense_steps=4, threshold=-1.0),
        SparseD(block_size=BLOCK, dense_steps=4, dense_layers=0),
    )
    found = outcome_of_every_order(transformer, methods, steps=6)
    assert not isinstance(found, str), found
    density = [step["density"] for step in found[1]["steps"]]
    assert density[0] == 1.0
    assert density[1] < 1
    assert density[5] < density[4] <= density[3]


@pytest.mark.parametrize("rests", [*itertools.product(("skip", "pooled"), repeat=3)], ids="-".join)
def test_what_any_of_them_pools(transformer, rests):
    """Radial's list, the pattern's bits and the votes' bits, each with a rest of its own."""
    methods = tuple(
        dataclasses.replace(METHODS[name], rest=rest)
        for name, rest in zip(("radial", "sparsed", "lite"), rests, strict=True)
    )
    methods = (dataclasses.replace(methods[0], block_size=BLOCK), *methods[1:])
    found = outcome_of_every_order(transformer, methods)
    assert not isinstance(found, str), found
    pooled = [call["pooled"] for call in found[1]["calls"]]
    assert any(pooled) == ("pooled" in rests)
