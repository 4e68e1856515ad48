"""Methods in whatever order they are given: the same latents bit for bit, the same report, or the same refusal."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from wan_tiny import denoise, sharp_transformer

import dit_accel
from dit_accel import ConfigError, DeltaAttention, LiteAttention, RadialAttention, SolAttention, SparseD, UltraViCo
from dit_accel.adapters.installed import adapter_for
from dit_accel.methods.attention.sparse import SparseConfig
from dit_accel.methods.base import Model
from dit_accel.methods.compose import make_handlers
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
TILED = [name for name, config in METHODS.items() if isinstance(config, SparseConfig)]
CLOCKED = ("timing", "why_not_faster", "measured_speedup")
"""What a report says of its run's seconds, which no two runs share."""


def sized(names: tuple[str, ...], **sizes: int) -> tuple[MethodConfig, ...]:
    """The configs of some methods, of which those named have a tile size."""
    return tuple(
        dataclasses.replace(METHODS[name], block_size=sizes[name]) if name in sizes else METHODS[name] for name in names
    )


def arranged(methods: tuple[MethodConfig, ...]) -> list[tuple[str, Any]] | str:
    """The methods in the order in which they act, and the tiles of each; or why they are refused."""
    model = Model(adapter=adapter_for("WanTransformer3DModel"), family=None, heads=2, layers=2)
    try:
        return [(handler.name, handler.model.tiling.block_size) for handler in make_handlers(methods, model)]
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("names", [*itertools.combinations(METHODS, 2)], ids=" ".join)
def test_pairs_agree_on_tiles_or_are_refused_alike(names):
    """With a tile size set on each one alone, on both, and on both in two sizes."""
    tiled = [name for name in names if name in TILED]
    for sizes in [{name: 16} for name in tiled] + [dict.fromkeys(tiled, 16), dict(zip(tiled, (16, 32), strict=False))]:
        acting = arranged(sized(names, **sizes))
        assert acting == arranged(sized(names[::-1], **sizes))
        if len({*sizes.values()}) == 2:
            assert all(f"{name}.block_size = {size}" in acting for name, size in sizes.items())
            assert "attached together" in acting
        elif names == ("delta", "ultravico"):
            assert "delta corrects" in acting
        else:
            assert {*acting} == {(name, 16) for name in names}


@pytest.fixture(scope="module")
def transformer():
    return sharp_transformer(num_layers=2)


def outcome(transformer: Any, *methods: MethodConfig, steps: int = 3) -> dict[str, Any]:
    """The report of a short run, which either order of the methods gives with the same latents."""
    runs = []
    for ordered in (methods, methods[::-1]):
        with dit_accel.attach(transformer, *ordered, preset="none") as attachment:
            latents, report = denoise(transformer, steps, branches=("cond",)), attachment.report().to_dict()
        runs.append((latents, {key: value for key, value in report.items() if key not in CLOCKED}))
    (first, report), (second, other) = runs
    assert torch.equal(first, second)
    assert report == other
    assert report["density"] < 1
    return report


@pytest.mark.slow
@pytest.mark.parametrize("names", [*itertools.combinations(METHODS, 3)], ids=" ".join)
def test_triples(transformer, names):
    """With a tile size set on the tiled one that acts last."""
    report = outcome(transformer, *sized(names, **{[name for name in names if name in TILED][-1]: 16}))
    assert set(report["methods"]) == {*names}
    assert {report["methods"][name]["block_size"] for name in names if name in TILED} == {16}


def test_methods_that_begin_at_different_steps(transformer):
    sol, lite = SolAttention(dense_steps=1, dense_layers=0), LiteAttention(dense_steps=4, threshold=-1.0)
    sparsed = SparseD(block_size=16, dense_steps=4, dense_layers=0)
    density = [step["density"] for step in outcome(transformer, sol, lite, sparsed, steps=6)["steps"]]
    assert density[0] == 1.0
    assert density[1] < 1
    assert density[5] < density[4] <= density[3]
