"""Step caches beside sparse methods: these count computed steps, and the steps they need are not skipped."""

import dataclasses

import pytest
import torch
from wan_tiny import denoise, sharp_transformer

import dit_accel
from dit_accel import (
    DBCache,
    DeltaAttention,
    EasyCache,
    FirstBlockCache,
    LiteAttention,
    MagCache,
    RadialAttention,
    SolAttention,
    SparseD,
    StaticCache,
    TeaCache,
    UltraViCo,
)  # fmt: skip

TILES = dict(block_size=16, dense_steps=0, dense_layers=0)
SPARSED = SparseD(density=0.5, **TILES)
LITE = LiteAttention(threshold=-0.5, **TILES)
SPARSE = {
    "radial": (RadialAttention(decay_factor=0.2, near="half", sink=False, **TILES),),
    "sparsed": (SPARSED,),
    "lite": (LITE,),
    "sol": (SolAttention(beta=0.0, **TILES),),
    "delta": (SPARSED, DeltaAttention(stride=8)),
    "ultravico": (UltraViCo(trained_frames=2, alpha=0.5),),
}
CACHE = StaticCache(every=2, warmup_steps=2, last_steps=0)


ALL = dict(threshold=1e9, warmup_steps=3, last_steps=0, max_consecutive=1)
CACHES = {
    "easycache": (EasyCache(**ALL), 0),
    "teacache": (TeaCache(polynomial=(1.0, 0.0), **ALL), 0),
    "magcache": (MagCache(ratios=(1.0,) * 6, **ALL), 0),
    "firstblockcache": (FirstBlockCache(**ALL), 1),
    "dbcache": (DBCache(first_blocks=1, last_blocks=1, **ALL), 2),
}
"""Cache, and the blocks that a skipped step still runs."""


def drawn(attachment, cache="staticcache"):
    forwards = attachment.report().section(cache).data["forwards"]
    return "".join("." if entry["reused"] else "#" for entry in forwards if entry["branch"] == "cond")


def handler(attachment, name):
    return next(one for one in attachment.engine.handlers if one.name == name)


@pytest.mark.parametrize("sparse", SPARSE.values(), ids=SPARSE)
def test_each_plans_in_computed_steps_alone(sparse):
    transformer = sharp_transformer()
    plain = denoise(transformer, 6)
    with dit_accel.attach(transformer, *sparse, preset="none") as attachment:
        alone = denoise(transformer, 6)
        planned = {step.step_index: step.sparse_layers for step in attachment.report().steps}
    with dit_accel.attach(transformer, *sparse, StaticCache(steps=(1,) * 6)):
        assert torch.equal(denoise(transformer, 6), alone)
    with dit_accel.attach(transformer, *sparse, CACHE) as attachment:
        both = denoise(transformer, 6)
        report = attachment.report()
        assert drawn(attachment) == "##.#.#"
        assert {step.step_index for step in report.steps} == {0, 1, 3, 5}
        assert all(step.sparse_layers == planned[step.step_index] for step in report.steps)
        assert torch.equal(denoise(transformer, 6), both)
    with dit_accel.attach(transformer, CACHE, *reversed(sparse)):
        assert torch.equal(denoise(transformer, 6), both)
    assert not torch.equal(both, alone)
    assert torch.equal(denoise(transformer, 6), plain)


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize(
    "sparse",
    [
        pytest.param(methods, id=name, marks=() if name == "lite" else pytest.mark.slow)
        for name, methods in SPARSE.items()
    ],
)
def test_each_cache_beside_each_method(sparse, cache):
    config, kept = cache
    transformer = sharp_transformer()
    with dit_accel.attach(transformer, *sparse, preset="none") as attachment:
        alone = denoise(transformer, 6)
        planned = {step.step_index: step.sparse_layers for step in attachment.report().steps}
    with dit_accel.attach(transformer, *sparse, dataclasses.replace(config, threshold=0.0)):
        assert torch.equal(denoise(transformer, 6), alone)
    with dit_accel.attach(transformer, *sparse, config) as attachment:
        both = denoise(transformer, 6)
        assert drawn(attachment, config.name) == "###.#."
        ran = {step.step_index: step.sparse_layers + step.dense_layers for step in attachment.report().steps}
        layers = ran[0]
        assert ran == {0: layers, 1: layers, 2: layers, 4: layers} | ({3: kept, 5: kept} if kept else {})
        assert all(
            step.sparse_layers == min(planned[step.step_index], ran[step.step_index])
            for step in attachment.report().steps
        )
        assert torch.equal(denoise(transformer, 6), both)
    with dit_accel.attach(transformer, config, *reversed(sparse)):
        assert torch.equal(denoise(transformer, 6), both)
    assert not torch.equal(both, alone)


def test_a_pattern_is_found_when_it_is_due():
    transformer = sharp_transformer()
    late = SparseD(block_size=16, density=0.5, dense_steps=4, dense_layers=0)
    with dit_accel.attach(transformer, late, CACHE) as attachment:
        denoise(transformer, 8)
        assert drawn(attachment) == "##.###.#"  # step 4, where the pattern is found, is not skipped


def test_lite_counts_computed_steps():
    transformer = sharp_transformer()
    lite = LiteAttention(threshold=-0.5, refresh_every=3, **TILES)
    seen = []
    with dit_accel.attach(transformer, lite, CACHE) as attachment, attachment.observe(seen.append):
        denoise(transformer, 9)
        computed = [step for step, mark in enumerate(drawn(attachment)) if mark == "#"]
    afresh = sorted({call.context.step_index for call in seen if call.plan.selection.keep is None})
    assert afresh == computed[::3]


def test_a_refresh_is_not_put_off():
    transformer = sharp_transformer()
    cache = StaticCache(every=100, warmup_steps=3, last_steps=0)
    lite = LiteAttention(threshold=-0.5, refresh_every=3, **TILES)
    with dit_accel.attach(transformer, lite, cache) as attachment:
        denoise(transformer, 8)
        assert drawn(attachment) == "####...."  # step 3 is the refresh, and after one call more are kept


def test_delta_measures_when_a_correction_has_served():
    transformer = sharp_transformer()
    cache = StaticCache(every=100, warmup_steps=2, last_steps=0)
    with dit_accel.attach(transformer, SPARSED, DeltaAttention(stride=8, reuse=2), cache) as attachment:
        denoise(transformer, 6)
        assert drawn(attachment) == "###..."  # steps 0 and 1 share one correction, 2 is probed
        measured = attachment.report().section("delta").data["measured"]
        assert {entry["step_index"] for entry in measured} == {0, 2}
