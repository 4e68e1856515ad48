"""Caches beside what surrounds them: sparse methods, loops that write in place, batches that shrink."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from block_calls import six_blocks
from torch import Tensor
from torch.utils._pytree import tree_leaves
from wan_tiny import denoise, sharp_transformer

import dit_accel as d

# Sparse methods count computed layers, and the steps they need are not skipped.

TILES = dict(block_size=16, dense_steps=0, dense_layers=0)
SPARSED = d.SparseD(density=0.5, **TILES)
LITE = d.LiteAttention(threshold=-0.5, **TILES)
LATER = dict(threshold=1e9, warmup_steps=3, last_steps=0, max_consecutive=1)
PAIRS = {
    "radial": ((d.RadialAttention(decay_factor=0.2, near="half", sink=False, **TILES),), d.EasyCache(**LATER), 0),
    "sparsed": ((SPARSED,), d.FirstBlockCache(**LATER), 1),
    "lite": ((LITE,), d.DBCache(first_blocks=1, last_blocks=1, **LATER), 2),
    "sol": ((d.SolAttention(beta=0.0, **TILES),), d.TeaCache(polynomial=(1.0, 0.0), **LATER), 0),
    "delta": ((SPARSED, d.DeltaAttention(stride=8)), d.MagCache(ratios=(1.0,) * 6, **LATER), 0),
    "ultravico": ((d.UltraViCo(trained_frames=2, alpha=0.5),), d.DBCache(first_blocks=1, last_blocks=1, **LATER), 2),
}
"""Sparse methods, a cache, and the blocks that a step it skips still runs."""


def drawn(attachment, cache="staticcache"):
    forwards = attachment.report().section(cache).data["forwards"]
    return "".join("." if entry["reused"] else "#" for entry in forwards if entry["branch"] == "cond")


@pytest.mark.parametrize("pair", PAIRS)
def test_each_plans_in_the_layers_that_run(pair):
    sparse, cache, kept = PAIRS[pair]
    transformer, ran = sharp_transformer(), []
    with d.attach(transformer, *sparse, preset="none") as attachment:
        alone = denoise(transformer, 6, branches=("cond",))
        planned = {step.step_index: step.sparse_layers for step in attachment.report().steps}
    with d.attach(transformer, *sparse, cache) as attachment:
        with attachment.observe(lambda call: ran.append((call.context.step_index, call.context.layer))):
            both = denoise(transformer, 6, branches=("cond",))
        assert drawn(attachment, cache.name) == "###.#."
        steps = attachment.report().steps
    layers = {step.step_index: step.sparse_layers + step.dense_layers for step in steps}
    assert layers == {0: 3, 1: 3, 2: 3, 4: 3} | ({3: kept, 5: kept} if kept else {})
    for step in steps:
        assert step.sparse_layers == min(planned[step.step_index], layers[step.step_index])
    assert len(ran) == sum(step.sparse_layers for step in steps)
    assert {layer for at, layer in ran if at in (3, 5)} <= {0, 2}
    assert not torch.equal(both, alone)


REST = dict(every=100, last_steps=0)
LATE = replace(SPARSED, dense_steps=4)
NEEDED = {
    "pattern": ((LATE,), d.StaticCache(every=2, warmup_steps=2, last_steps=0), "##.###.#"),  # it is found in step 4
    "pattern, blocks": (
        (LATE,), d.DBCache(first_blocks=1, last_blocks=1, **{**LATER, "warmup_steps": 2}), "##.##.#."
    ),
    "refresh": ((replace(LITE, refresh_every=3),), d.StaticCache(warmup_steps=3, **REST), "####...."),
    # steps 0 and 1 share one correction, 2 is probed
    "probe": ((SPARSED, d.DeltaAttention(stride=8, reuse=2)), d.StaticCache(warmup_steps=2, **REST), "###....."),
}  # fmt: skip


@pytest.mark.parametrize(("sparse", "cache", "expected"), NEEDED.values(), ids=NEEDED)
def test_a_step_that_a_sparse_method_needs_is_computed(sparse, cache, expected):
    transformer = sharp_transformer()
    with d.attach(transformer, *sparse, cache) as attachment:
        denoise(transformer, 8)
        assert drawn(attachment, cache.name) == expected
        if delta := attachment.report().section("delta"):
            assert {entry["step_index"] for entry in delta.data["measured"]} == {0, 2}


def test_lite_refreshes_every_so_many_of_the_steps_that_are_computed():
    transformer, afresh = sharp_transformer(), set()
    methods = replace(LITE, refresh_every=3), d.StaticCache(every=2, warmup_steps=2, last_steps=0)
    with d.attach(transformer, *methods) as attachment:
        with attachment.observe(lambda call: call.plan.selection.keep is None and afresh.add(call.context.step_index)):
            denoise(transformer, 9, until=8)
        computed = [step for step, mark in enumerate(drawn(attachment)) if mark == "#"]
    assert sorted(afresh) == computed[::3]


STEPS = 10
ALL = dict(warmup_steps=1, last_steps=1)
CACHES = {
    "easycache": d.EasyCache(threshold=0.3, **ALL),
    "easycache, error": d.EasyCache(error=0.5, predictor="taylor", **ALL),
    "teacache": d.TeaCache(threshold=2.0, polynomial=(1.0, 0.0), **ALL),
    "magcache": d.MagCache(ratios=(1.0,) + (0.98,) * (STEPS - 1), **ALL),
    "staticcache": d.StaticCache(every=3, stored="output", **ALL),
    "dbcache": d.DBCache(threshold=0.5, first_blocks=2, last_blocks=1, **ALL),
    "dbprune": d.DBPrune(threshold=0.05, **ALL),
    "profilingcache": d.ProfilingCache(blocks="1-3", every=3, warmup_steps=1, last_steps=1),
}
EACH = pytest.mark.parametrize("name", CACHES)
MOVES: dict[str, Any] = {
    "plainly": lambda x, v: x - 0.02 * v,
    "latents in place": lambda x, v: x.sub_(0.02 * v),
    "output in place": lambda x, v: x - v.mul_(0.02),
    "in inference mode": lambda x, v: x.sub_(0.02 * v),
}


def prompts(count: int) -> Tensor:
    return torch.randn(count, 6, 64, generator=torch.Generator().manual_seed(1))


def denoised(model: Any, move: str = "plainly", rows: tuple[int, ...] = (1,) * STEPS) -> list[tuple[Tensor, Tensor]]:
    """Return the latents and output of each step of a hand-written loop; ``rows`` are the batch's, step by step."""
    x = torch.randn(rows[0], 12, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = []
    for step, count in enumerate(rows):
        x = x[:count]
        with torch.no_grad(), model.cache_context("cond", step_index=step, num_inference_steps=len(rows)):
            v = model(x, torch.full((count,), 1000.0 - 50 * step), prompts(rows[0])[:count], return_dict=False)[0]
        seen.append((x.clone(), v.clone()))
        x = MOVES[move](x, v)
    return seen


def decided(attachment: Any) -> tuple[list[bool], list[float], Any]:
    """Return which forwards a cache reused, what it measured, and what share of the blocks ran."""
    data = attachment.report().sections[0].data
    values = [entry["value"] for entry in data["forwards"] if entry["value"] is not None]
    return [entry["reused"] for entry in data["forwards"]], values, data.get("computed_blocks")


@EACH
def test_loops_that_write_in_place_are_cached_like_others(name):
    model, passed = six_blocks(), []
    with d.attach(model, CACHES[name]) as attachment:
        expected = denoised(model)
        reused, values, blocks = decided(attachment)
        assert any(reused)
        assert blocks is None or blocks < 1
        for move in [*MOVES][1:]:
            with torch.inference_mode(move == "in inference mode"):
                outputs = denoised(model, move)
            assert decided(attachment) == (reused, pytest.approx(values), blocks), move
            for (_, found), (_, plain) in zip(outputs, expected, strict=True):
                torch.testing.assert_close(found, plain)
        # what is kept shares no memory with latents, outputs and streams, which a caller may write into later
        for module in (model, *model.blocks):
            module.register_forward_hook(lambda _, args, output: passed.append((args, output)))
        passed.extend(denoised(model, rows=(1,) * 4))
        (handler,) = attachment.engine.handlers
        kept = [decision._attributes() for decision in handler._decisions.values()]
        kept += [[point.values for point in history.points] for history in handler._histories.values()]
    memory = [
        {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(what) if isinstance(leaf, Tensor)}
        for what in (kept, passed)
    ]
    assert memory[0]
    assert not memory[0] & memory[1]


@EACH
def test_rows_that_leave_midway_begin_anew(name):
    """As where a callback switches guidance off: the first step with fewer rows is an untouched model's."""
    model, rows = six_blocks(), (4,) * 5 + (2,) * 5
    with d.attach(model, CACHES[name]) as attachment:
        seen = denoised(model, rows=rows)
        reused, _, _ = decided(attachment)
    assert not reused[5]
    assert any(reused[6:])
    x, output = seen[5]
    with torch.no_grad():
        expected = model(x, torch.full((2,), 750.0), prompts(4)[:2], return_dict=False)[0]
    assert torch.equal(output, expected)
