"""diffusers' own caches beside each sparse method: what is reused is not planned, counted or learned from."""

import pytest
import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from wan_tiny import sharp_transformer

import dit_accel
from dit_accel import DeltaAttention, LiteAttention, RadialAttention, SolAttention, SparseD, UltraViCo

STEPS = 6
SPARSE = {
    "lite": (LiteAttention(block_size=16, threshold=-0.01, dense_steps=0),),
    "radial": (
        RadialAttention(block_size=16, decay_factor=0.2, near="half", sink=False, dense_steps=0, dense_layers=0),
    ),
    "sol": (SolAttention(block_size=16, dense_steps=0, dense_last_steps=0, dense_layers=0),),
    "sparsed, delta": (
        SparseD(block_size=16, density=0.5, dense_steps=0, dense_last_steps=0, dense_layers=0),
        DeltaAttention(stride=8, reuse=2),
    ),
    "ultravico": (UltraViCo(trained_frames=2, alpha=0.5, beta=0.2, period=3, gamma=0.5),),
}  # fmt: skip
CACHES = {
    "first block": FirstBlockCacheConfig(threshold=0.4),
    "mag": MagCacheConfig(threshold=10.0, max_skip_steps=1, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS),
    "pyramid": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    ),
    "sea": SeaCacheConfig(threshold=0.5),
    "taylor": TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=2, cache_identifiers=[r"blocks\.\d\.attn1"]
    ),
}  # fmt: skip
BRANCHES = ("cond", "uncond")


def denoise(transformer, until=STEPS, branches=BRANCHES):
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(1, 12, 5, 8, 8, generator=noise)
    texts = {name: torch.randn(1, 6, 64, generator=noise) for name in BRANCHES}
    with torch.no_grad():
        for step in range(until):
            told, found = dict(step_index=step, num_inference_steps=STEPS, sigma=1 - step / STEPS), []
            for branch in branches:
                with transformer.cache_context(branch, **told):
                    time = torch.tensor([1000.0 - 100 * step])
                    found.append(transformer(x, time, texts[branch], return_dict=False)[0])
            x = x - 0.3 * sum(found)
    return x


@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("sparse", SPARSE)
def test_reused_layers_are_neither_planned_nor_counted(sparse, cache):
    transformer = sharp_transformer()
    planned = []
    with dit_accel.attach(transformer, *SPARSE[sparse], CACHES[cache]) as attachment:
        with attachment.observe(lambda call: planned.append((call.context.step_index, call.context.branch))):
            first = denoise(transformer)
        report = attachment.report()
        calls = report.section("diffusers-cache").data["calls"]
        assert 0 < sum(call["layers_run"] for call in calls) < STEPS * 2 * 3  # something is reused
        assert [(step.step_index, step.branch, step.dense_layers + step.sparse_layers) for step in report.steps] == [
            (call["step_index"], call["branch"], call["layers_run"]) for call in calls
        ]
        for step in report.steps:
            assert planned.count((step.step_index, step.branch)) == step.sparse_layers
        assert sum(step.sparse_layers for step in report.steps) > 0
        assert torch.equal(denoise(transformer), first)
        denoise(transformer, until=3)
        assert torch.equal(denoise(transformer), first), "after a run that was stopped"


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("sparse", SPARSE)
def test_attached_together_is_the_sparse_model_under_diffusers_cache(sparse, cache):
    branches = BRANCHES[:1] if cache == "pyramid" else BRANCHES  # which mixes the branches by itself
    native, ours = sharp_transformer(), sharp_transformer()
    native.enable_cache(CACHES[cache])
    with (
        dit_accel.attach(native, *SPARSE[sparse], preset="none"),
        dit_accel.attach(ours, CACHES[cache], *SPARSE[sparse]),
    ):
        assert torch.equal(denoise(ours, branches=branches), denoise(native, branches=branches))


@pytest.mark.parametrize("cache", CACHES)
def test_lite_counts_computed_steps_only(cache):
    transformer = sharp_transformer()
    with dit_accel.attach(transformer, *SPARSE["lite"], CACHES[cache]) as attachment:
        ran = []
        with attachment.observe(lambda call: ran.append(call.context.key)):
            denoise(transformer, until=STEPS - 1)
        handler = next(one for one in attachment.engine.handlers if one.name == "lite")
        assert {key: state.calls for key, state in handler._states.items()} == {key: ran.count(key) for key in ran}
        assert len(ran) < (STEPS - 1) * 2 * 3
