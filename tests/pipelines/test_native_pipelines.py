"""diffusers' own caches attached to whole pipelines, beside our methods, with and without contexts of their own."""

import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)
from dit_accel_kernels import unpack_bits
from tiny_stock import run_stock, stock_pipeline
from wan_tiny import generate

import dit_accel
from dit_accel import DeltaAttention, LiteAttention, SparseD
from dit_accel.testing.recording import recorded

STEPS = 6
LITE = LiteAttention(block_size=16, threshold=-0.01, dense_steps=0)
CACHES = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=0.2),
    "sea": lambda pipe: SeaCacheConfig(threshold=2.0),
    "mag": lambda pipe: MagCacheConfig(threshold=10.0, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS),
    "taylor lite": lambda pipe: TaylorSeerCacheConfig(cache_interval=2, use_lite_mode=True),
}


def counted(attachment):
    calls = attachment.report().section("diffusers-cache").data["calls"]
    return sum(call["layers_run"] for call in calls), sum(call["layers"] for call in calls)


@pytest.mark.parametrize("name", CACHES)
def test_wan_runs_as_under_enable_cache_and_votes_count_the_calls_that_run(make_pipe, name):
    pipe, native = make_pipe(), make_pipe()
    native.transformer.enable_cache(CACHES[name](native))
    with dit_accel.attach(native, LITE):
        expected = generate(native, num_inference_steps=STEPS)
    planned, votes = [], {}

    def look(pipe, step, timestep, tensors):
        votes.update({key: state.votes for key, state in lite._states.items()})
        return tensors

    with dit_accel.attach(pipe, CACHES[name](pipe), LITE) as attachment:
        (lite,) = [handler for handler in attachment.engine.handlers if isinstance(handler.settings, LiteAttention)]
        with attachment.observe(lambda one: planned.append((one.context.key, one.context.step_index))):
            assert torch.equal(generate(pipe, num_inference_steps=STEPS, callback_on_step_end=look), expected)
        ran, of = counted(attachment)
        assert 0 < ran == len(planned) < of == STEPS * 2 * 3
        assert sum(step.sparse_layers for step in attachment.report().steps) == ran
        early = [key for key, step in planned if step < STEPS - 1]  # the last call of a key frees its state
        assert votes == {key: early.count(key) for key in votes}
        assert torch.equal(generate(pipe, num_inference_steps=STEPS), expected)
    assert not pipe.transformer.is_cache_enabled


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("FluxImg2ImgPipeline", FirstBlockCacheConfig(threshold=1e9)),
        ("FluxKontextPipeline", TaylorSeerCacheConfig(disable_cache_before_step=1)),
    ],
)
def test_pipelines_without_contexts_are_given_some(name, config):
    pipe, call = stock_pipeline(name)
    with dit_accel.attach(pipe, config) as attachment:
        first = run_stock(pipe, call)
        ran, of = counted(attachment)
        assert 0 < ran < of
        run_stock(pipe, call, height=64, width=64)
        assert torch.equal(run_stock(pipe, call), first)
    pipe.transformer.enable_cache(config)
    with pytest.raises(ValueError, match="cache context"):
        run_stock(pipe, call)


FASTER = dict(
    spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
    unconditional_batch_skip_range=3, unconditional_batch_timestep_skip_range=(-1, 1001), tensor_format="BFCHW",
    attention_weight_callback=lambda module: 0.3,
)  # fmt: skip
BESIDE = [(), (LITE,), (SparseD(block_size=16, density=0.5, dense_steps=0, dense_layers=0), DeltaAttention(reuse=2))]


@pytest.mark.parametrize("methods", BESIDE, ids=["alone", "lite", "delta"])
def test_faster_cache_leaves_a_branch_out_and_both_batches_keep_their_own_state(methods):
    pipe, call = stock_pipeline("CogVideoXPipeline")
    native, _ = stock_pipeline("CogVideoXPipeline")
    call.update(num_inference_steps=8, output_type="latent")
    faster = FasterCacheConfig(**FASTER, current_timestep_callback=lambda: pipe.current_timestep)
    with dit_accel.attach(pipe, faster, *methods, preset="none") as attachment, recorded(attachment) as calls:
        first = run_stock(pipe, call)
        ran, of = counted(attachment)
        assert 0 < ran < of
        made = list(calls)
        assert torch.equal(run_stock(pipe, call), first)
    if methods:
        assert {len(one.q) for one in made} == {1, 2}
    for batch in (1, 2) if methods == (LITE,) else ():
        exact = [unpack_bits(one.exact, -(-one.k.shape[2] // 16)) for one in made if len(one.q) == batch]
        assert exact[0].all()
        assert not exact[-1].all()
    native.transformer.enable_cache(faster)
    pipe = native  # whose timestep the config asks for
    with dit_accel.attach(native, *methods, preset="none"):
        assert torch.equal(run_stock(native, call), first)


def test_the_text_cache_changes_nothing():
    pipe, call = stock_pipeline("NucleusMoEImagePipeline")
    plain = run_stock(pipe, call)
    with dit_accel.attach(pipe, TextKVCacheConfig()):
        torch.testing.assert_close(run_stock(pipe, call), plain)
    assert torch.equal(run_stock(pipe, call), plain)
