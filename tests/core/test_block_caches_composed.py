"""DBCache beside each sparse method: what runs is planned and counted, what is skipped is neither."""

import pytest
import torch
from wan_tiny import denoise, sharp_transformer

import dit_accel
from dit_accel import DBCache, DeltaAttention, LiteAttention, RadialAttention, SolAttention, SparseD, UltraViCo

LAYERS = 4
TILES = dict(block_size=16, dense_steps=0, dense_layers=0)
SPARSED = SparseD(density=0.5, **TILES)
SPARSE = {
    "radial": (RadialAttention(decay_factor=0.2, near="half", sink=False, **TILES),),
    "sparsed": (SPARSED,),
    "lite": (LiteAttention(threshold=-0.5, **TILES),),
    "sol": (SolAttention(beta=0.0, **TILES),),
    "delta": (SPARSED, DeltaAttention(stride=8)),
    "ultravico": (UltraViCo(trained_frames=2, alpha=0.5),),
}
CACHE = DBCache(first_blocks=1, last_blocks=1, threshold=1e9, warmup_steps=2, last_steps=0, max_consecutive=1)


def drawn(attachment):
    forwards = attachment.report().section("dbcache").data["forwards"]
    return "".join("." if entry["reused"] else "#" for entry in forwards if entry["branch"] == "cond")


@pytest.mark.parametrize("sparse", SPARSE.values(), ids=SPARSE)
def test_each_plans_in_the_layers_that_run(sparse):
    transformer = sharp_transformer(num_layers=LAYERS)
    plain = denoise(transformer, 6)
    with dit_accel.attach(transformer, *sparse, preset="none") as attachment:
        alone = denoise(transformer, 6)
        planned = {step.step_index: step.sparse_layers for step in attachment.report().steps}
    with dit_accel.attach(transformer, *sparse, DBCache(first_blocks=1, threshold=0.0)):
        assert torch.equal(denoise(transformer, 6), alone)
    ran = []
    with dit_accel.attach(transformer, *sparse, CACHE) as attachment:
        with attachment.observe(lambda call: ran.append((call.context.step_index, call.context.layer))):
            both = denoise(transformer, 6, branches=("cond",))
        assert drawn(attachment) == "##.#.#"
        for step in attachment.report().steps:
            skipped = step.step_index in (2, 4)
            assert step.sparse_layers + step.dense_layers == (2 if skipped else LAYERS)
            assert step.sparse_layers == min(planned[step.step_index], 2 if skipped else LAYERS)
            assert step.sparse_layers == sum(at == step.step_index for at, _ in ran)
            assert not skipped or {layer for at, layer in ran if at == step.step_index} <= {0, LAYERS - 1}
        assert torch.equal(denoise(transformer, 6, branches=("cond",)), both)
    with dit_accel.attach(transformer, CACHE, *reversed(sparse)):
        assert torch.equal(denoise(transformer, 6, branches=("cond",)), both)
    assert torch.equal(denoise(transformer, 6), plain)


def test_a_pattern_is_found_in_all_layers_when_it_is_due():
    transformer = sharp_transformer(num_layers=LAYERS)
    late = SparseD(block_size=16, density=0.5, dense_steps=4, dense_layers=0)
    with dit_accel.attach(transformer, late, CACHE) as attachment:
        denoise(transformer, 8)
        assert drawn(attachment) == "##.##.#."  # step 4, where the pattern is found, is not skipped
        assert len(next(one for one in attachment.engine.handlers if one.name == "sparsed").bits) == 2 * LAYERS


def test_lite_counts_the_calls_of_each_layer():
    transformer = sharp_transformer(num_layers=LAYERS)
    ran = []
    with dit_accel.attach(transformer, *SPARSE["lite"], CACHE) as attachment:
        with attachment.observe(lambda call: ran.append(call.context.key)):
            denoise(transformer, 6, until=5)
        lite = next(one for one in attachment.engine.handlers if one.name == "lite")
        counted = {key: state.calls for key, state in lite._states.items()}
    assert counted == {key: ran.count(key) for key in ran}
    assert set(counted.values()) == {3, 5}
