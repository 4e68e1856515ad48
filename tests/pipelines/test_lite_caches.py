"""LiteAttention beside diffusers' own caches: what a cache skips leaves its state and the report alone."""

import itertools

import diffusers
import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from dit_accel_kernels import unpack_bits
from tiny_stock import run_stock, stock_pipeline
from wan_tiny import generate

import dit_accel
from dit_accel import DeltaAttention, LiteAttention, SparseD
from dit_accel.testing.recording import recorded

STEPS = 10
LITE = LiteAttention(block_size=16, threshold=-0.01, dense_steps=0)

CACHES = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=0.08),
    "mag": lambda pipe: MagCacheConfig(
        threshold=10.0, max_skip_steps=2, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS
    ),
    "pyramid": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=3, spatial_attention_timestep_skip_range=(0, 1000),
        spatial_attention_block_identifiers=("attn1",), current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "taylor": lambda pipe: TaylorSeerCacheConfig(cache_interval=3, cache_identifiers=[r"blocks\.\d\.attn1"]),
    "taylor lite": lambda pipe: TaylorSeerCacheConfig(cache_interval=3, use_lite_mode=True),
    "sea": lambda pipe: SeaCacheConfig(threshold=0.5),
}  # fmt: skip
ALL = pytest.mark.parametrize("cache", CACHES)


def cached(pipe, cache):
    pipe.transformer.enable_cache(CACHES[cache](pipe))
    return pipe


def run(pipe, **options):
    return generate(pipe, num_inference_steps=STEPS, **options)


def states_after_each_step(pipe, attachment):
    """Run; return latents, states by key after each step as (calls, votes, bits), and keys that ran in each step."""
    ran, after = [set()], []
    (handler,) = attachment.engine.handlers

    def note(planned):
        assert planned.context.step_index == len(after)
        assert planned.context.key not in ran[-1]
        ran[-1].add(planned.context.key)

    def look(pipe, step, timestep, tensors):
        states = handler._states.items()
        after.append({key: (s.calls, s.votes, None if s.bits is None else s.bits.clone()) for key, s in states})
        ran.append(set())
        return tensors

    with attachment.observe(note):
        latents = run(pipe, callback_on_step_end=look)
    return latents, after, ran[:-1]


@ALL
def test_skipped_calls_leave_the_state_and_the_report_alone(make_pipe, cache):
    """Whether the cache is enabled before or after; beside neutral settings the run is the cache's alone."""
    alone, pipe = run(cached(make_pipe(), cache)), make_pipe()
    other = cached(make_pipe(), cache)
    with dit_accel.attach(other, LiteAttention(dense_steps=1000)) as attachment:
        assert torch.equal(run(other), alone)
        assert 0 < sum(step.dense_layers for step in attachment.report().steps) < STEPS * 2 * 3
    after = cache in ("mag", "taylor", "sea")
    if not after:
        cached(pipe, cache)
    attachment = dit_accel.attach(pipe, LITE)
    if after:
        cached(pipe, cache)
    latents, after, ran = states_after_each_step(pipe, attachment)
    assert 0 < sum(map(len, ran)) < STEPS * 2 * 3  # the cache skips some of the calls
    for step, (before, now) in enumerate(itertools.pairwise([{}, *after[:-1]])):  # the last call of a key frees it
        for key in before.keys() | now.keys():
            was, is_ = before.get(key, (0, 0, None)), now[key]
            assert is_[:2] == (was[0] + (key in ran[step]), was[1] + (key in ran[step]))
            if key not in ran[step]:
                assert torch.equal(was[2], is_[2])
            elif was[2] is not None:
                assert not (is_[2] & ~was[2]).any()
    for step in attachment.report().steps:
        keys = [key for key in ran[step.step_index] if key[2] == step.branch]
        assert (step.dense_layers, step.sparse_layers) == (0, len(keys))
    assert torch.equal(run(pipe), latents)
    assert not attachment.engine.handlers[0]._states
    attachment.detach()
    assert torch.equal(run(pipe), alone)


FASTER = dict(
    spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
    unconditional_batch_skip_range=3, unconditional_batch_timestep_skip_range=(-1, 1001), tensor_format="BFCHW",
    attention_weight_callback=lambda module: 0.3,
)  # fmt: skip


@pytest.mark.parametrize(
    "methods",
    [
        (LITE,),
        (SparseD(block_size=16, density=0.5, dense_steps=0, dense_layers=0), DeltaAttention(reuse=2)),
    ],
)
def test_faster_cache_leaves_a_branch_out_and_both_batches_keep_their_own_state(methods):
    pipe, call = stock_pipeline("CogVideoXPipeline")
    call = dict(call, num_inference_steps=8, output_type="latent")
    diffusers.utils.logging.set_verbosity_error()
    pipe.transformer.enable_cache(FasterCacheConfig(**FASTER, current_timestep_callback=lambda: pipe.current_timestep))
    with dit_accel.attach(pipe, *methods, preset="none") as attachment, recorded(attachment) as calls:
        first = run_stock(pipe, call)
        report = attachment.report()
        again = run_stock(pipe, call)
    assert torch.equal(again, first)
    assert report.sparse_density < 1
    batches = [called.q.shape[0] for called in calls]
    assert {1, 2} == set(batches)
    if methods == (LITE,):
        for batch in (1, 2):
            exact = [
                unpack_bits(called.exact, -(-called.k.shape[2] // 16)) for called in calls if len(called.q) == batch
            ]
            half = exact[: len(exact) // 2]  # of the first generation
            assert half[0].all()
            assert not half[-1].all()
