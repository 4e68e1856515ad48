"""diffusers' own caches attached to whole pipelines, with and without contexts of their own."""

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
from tiny_stock import run_stock, stock_pipeline
from wan_tiny import generate

import dit_accel
from dit_accel import ConfigError, LiteAttention

STEPS = 6
LITE = LiteAttention(block_size=16, threshold=-0.01, dense_steps=0)


def counted(attachment):
    calls = attachment.report().section("diffusers-cache").data["calls"]
    return sum(call["layers_run"] for call in calls), sum(call["layers"] for call in calls)


@pytest.mark.parametrize(
    "config",
    [
        FirstBlockCacheConfig(threshold=0.2),
        SeaCacheConfig(threshold=2.0),
        MagCacheConfig(threshold=10.0, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS),
        TaylorSeerCacheConfig(cache_interval=2, use_lite_mode=True),
    ],
    ids=lambda config: type(config).__name__,
)
def test_wan_runs_as_under_enable_cache_and_is_itself_again_after(make_pipe, config):
    pipe, native = make_pipe(), make_pipe()
    plain = generate(pipe, num_inference_steps=STEPS)
    native.transformer.enable_cache(config)
    with dit_accel.attach(pipe, config, LITE) as attachment, dit_accel.attach(native, LITE):
        assert torch.equal(generate(pipe, num_inference_steps=STEPS), generate(native, num_inference_steps=STEPS))
        ran, of = counted(attachment)
        assert 0 < ran < of == STEPS * 2 * 3
        assert attachment is dit_accel.attachment_of(pipe)
    assert torch.equal(generate(pipe, num_inference_steps=STEPS), plain)
    assert not pipe.transformer.is_cache_enabled


@pytest.mark.parametrize("name", ["FluxImg2ImgPipeline", "FluxKontextPipeline"])
@pytest.mark.parametrize(
    "config",
    [FirstBlockCacheConfig(threshold=1e9), TaylorSeerCacheConfig(disable_cache_before_step=1)],
    ids=lambda config: type(config).__name__,
)
def test_pipelines_without_contexts_are_given_some(name, config):
    pipe, call = stock_pipeline(name)

    def stop(pipe, step, timestep, tensors):
        raise RuntimeError("stopped")

    with dit_accel.attach(pipe, config) as attachment:
        first = run_stock(pipe, call)
        ran, of = counted(attachment)
        assert 0 < ran < of
        with pytest.raises(RuntimeError, match="stopped"):
            run_stock(pipe, call, callback_on_step_end=stop)
        run_stock(pipe, call, height=64, width=64)
        assert torch.equal(run_stock(pipe, call), first)
    pipe.transformer.enable_cache(config)
    with pytest.raises(ValueError, match="cache context"):
        run_stock(pipe, call)


def test_faster_cache_skips_the_unconditional_half():
    pipe, call = stock_pipeline("CogVideoXPipeline")
    call = dict(call, num_inference_steps=8, output_type="latent")
    faster = FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 1001), unconditional_batch_timestep_skip_range=(-1, 1001),
        tensor_format="BFCHW", attention_weight_callback=lambda module: 0.3,
        current_timestep_callback=lambda: pipe.current_timestep,
    )  # fmt: skip
    native, _ = stock_pipeline("CogVideoXPipeline")
    with dit_accel.attach(pipe, faster) as attachment:
        first = run_stock(pipe, call)
        ran, of = counted(attachment)
        assert 0 < ran < of
        assert torch.equal(run_stock(pipe, call), first)
        with pytest.raises(ConfigError, match=r"FasterCacheConfig.*batched call"):
            run_stock(pipe, call, guidance_scale=1.0)
        assert torch.equal(run_stock(pipe, call), first)
    native.transformer.enable_cache(faster)
    pipe = native  # whose timestep the config asks for
    assert torch.equal(run_stock(native, call), first)


def test_the_text_cache_changes_nothing():
    pipe, call = stock_pipeline("NucleusMoEImagePipeline")
    plain = run_stock(pipe, call)
    with dit_accel.attach(pipe, TextKVCacheConfig()):
        torch.testing.assert_close(run_stock(pipe, call), plain)
    assert torch.equal(run_stock(pipe, call), plain)


def test_sea_cache_is_refused_where_the_scheduler_tells_no_sigma():
    pipe, _ = stock_pipeline("CogVideoXPipeline")
    sea = SeaCacheConfig(raw_vision_callback=lambda module, args, kwargs: list(kwargs["hidden_states"].mT))
    with pytest.raises(ConfigError, match=r"SeaCacheConfig.*noise level.*CogVideoXDDIMScheduler does"):
        dit_accel.attach(pipe, sea)
