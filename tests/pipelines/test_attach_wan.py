"""Attaching to Wan: bit-exact where nothing changes, isolated where it does, and the same under every wrapping."""

import threading
import warnings

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from wan_tiny import generate, tiny_transformer

import dit_accel
from dit_accel import RadialAttention
from dit_accel.attachment.backends import UnplannedRun

SPARSE = dict(block_size=16, decay_factor=0.2, near="half", sink=False, dense_steps=1, dense_layers=1)
NEUTRAL = dict(SPARSE, dense_steps=1000)


def test_neutral_is_bit_equal_and_detach_leaves_no_trace(pipe):
    transformer = pipe.transformer
    before = generate(pipe)
    keys = {name: set(module.__dict__) for name, module in transformer.named_modules()}
    processors = transformer.attn_processors
    for methods in ((), (RadialAttention(**NEUTRAL),)):
        attachment = dit_accel.attach(pipe, *methods, preset="none")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UnplannedRun)
            assert torch.equal(generate(pipe), before)
            assert torch.equal(generate(pipe), before)
        assert len([one for one in said if issubclass(one.category, UnplannedRun)]) == len(methods)  # once, not twice
        report = attachment.report()
        assert report.density == 1.0
        assert sum(step.dense_layers for step in report.steps) == 4 * 2 * 3
        attachment.detach()
    assert torch.equal(generate(pipe), before)
    assert all(transformer.attn_processors[name] is processors[name] for name in processors)
    assert {name: set(module.__dict__) for name, module in transformer.named_modules()} == keys
    assert not transformer._forward_pre_hooks


def test_sparse_changes_the_output_then_detach_restores_it(pipe):
    dense = generate(pipe)
    with dit_accel.attach(pipe, RadialAttention(**SPARSE)) as attachment:
        sparse = generate(pipe)
        report = attachment.report()
    assert not torch.equal(sparse, dense)
    assert torch.equal(generate(pipe), dense)
    assert [(s.step_index, s.branch, s.dense_layers, s.sparse_layers) for s in report.steps[:4]] == [
        (0, "cond", 3, 0),
        (0, "uncond", 3, 0),
        (1, "cond", 1, 2),
        (1, "uncond", 1, 2),
    ]
    layout = dit_accel.TokenLayout(frames=5, height=4, width=4)
    assert report.sparse_density == pytest.approx(RadialAttention(**SPARSE).filled().density(layout))
    assert report.to_dict()["methods"]["radial"]["block_size"] == 16
    assert "radial seldom pays below 20000 visual tokens" in str(report)


def test_two_pipelines_with_other_settings_do_not_meet(make_pipe):
    one, two = make_pipe(0), make_pipe(1)
    settings = RadialAttention(**SPARSE), RadialAttention(**dict(SPARSE, rest="pooled", dense_layers=0))
    with dit_accel.attach(one, settings[0]), dit_accel.attach(two, settings[1]):
        alone = generate(one), generate(two)
        between = []

        def run_other(pipe, step, timestep, tensors):
            between.append(generate(two))
            return tensors

        assert torch.equal(generate(one, callback_on_step_end=run_other), alone[0])
        assert all(torch.equal(other, alone[1]) for other in between)

        results: dict[int, torch.Tensor] = {}
        threads = [
            threading.Thread(target=lambda i=i, p=p: results.update({i: generate(p)})) for i, p in enumerate((one, two))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.equal(results[0], alone[0])
        assert torch.equal(results[1], alone[1])


def test_guidance_batched_in_one_call_and_steps_counted_without_a_context():
    transformer = tiny_transformer()
    inputs = dict(hidden_states=torch.randn(4, 12, 5, 8, 8), encoder_hidden_states=torch.randn(4, 6, 64))
    with dit_accel.attach(transformer, RadialAttention(**SPARSE)) as attachment, torch.no_grad():
        with transformer.cache_context("cond_uncond", step_index=1, num_inference_steps=4):
            told = transformer(timestep=torch.full((4,), 500.0), return_dict=False, **inputs)[0]
        for timestep in (900.0, 500.0):
            counted = transformer(timestep=torch.full((4,), timestep), return_dict=False, **inputs)[0]
        assert torch.equal(told, counted)
        steps = attachment.report().steps
        assert [(s.step_index, s.branch, s.sparse_layers) for s in steps] == [(0, "call 0", 0), (1, "call 0", 2)]
        transformer(timestep=torch.full((4,), 999.0), return_dict=False, **inputs)
        assert [s.step_index for s in attachment.report().steps] == [0]


def test_every_dtype_runs_and_keeps_its_output_type():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        transformer = tiny_transformer().to(dtype)
        inputs = torch.randn(1, 12, 5, 8, 8).to(dtype), torch.tensor([500.0]), torch.randn(1, 6, 64).to(dtype)
        with torch.no_grad(), dit_accel.attach(transformer, RadialAttention(**dict(SPARSE, dense_steps=0))):
            out = transformer(*inputs, return_dict=False)[0]
        assert out.dtype == dtype
        assert out.isfinite().all()


def test_fused_projections_give_the_same_result_before_or_after(pipe):
    config = RadialAttention(**SPARSE)
    with dit_accel.attach(pipe, config):
        plain = generate(pipe)
        pipe.transformer.fuse_qkv_projections()
        after = generate(pipe)
    with dit_accel.attach(pipe, config):
        before = generate(pipe)
    torch.testing.assert_close(after, plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(after, before)


def test_lora_gives_the_same_result_loaded_before_or_after(make_pipe):
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    results = []
    for lora_first in (True, False):
        pipe = make_pipe()
        torch.manual_seed(3)
        if lora_first:
            pipe.transformer.add_adapter(lora)
        with dit_accel.attach(pipe, RadialAttention(**SPARSE)):
            if not lora_first:
                bare = generate(pipe)
                torch.manual_seed(3)
                pipe.transformer.add_adapter(lora)
            results.append(generate(pipe))
    assert torch.equal(*results)
    assert not torch.equal(results[1], bare)


def test_offload_hooks_before_and_after(make_pipe):
    from accelerate.hooks import CpuOffload, add_hook_to_module, remove_hook_from_module
    from diffusers.hooks import apply_group_offloading

    pipe = make_pipe()
    with dit_accel.attach(pipe, RadialAttention(**SPARSE)):
        plain = generate(pipe)
        add_hook_to_module(pipe.transformer, CpuOffload(torch.device("cpu")))
        assert torch.equal(generate(pipe), plain)
        remove_hook_from_module(pipe.transformer)
    for attach_first in (True, False):
        pipe = make_pipe()
        offload = dict(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level")
        if not attach_first:
            apply_group_offloading(pipe.transformer, **offload)
        with dit_accel.attach(pipe, RadialAttention(**SPARSE)):
            if attach_first:
                apply_group_offloading(pipe.transformer, **offload)
            assert torch.equal(generate(pipe), plain)


@attention_backend("native")  # diffusers keeps the last choice for the whole process: this puts it back
def test_dense_calls_use_the_backend_the_user_set(pipe):
    pipe.transformer.set_attention_backend("_native_math")
    expected = generate(pipe)
    pipe.transformer.set_attention_backend("native")
    with dit_accel.attach(pipe, RadialAttention(**NEUTRAL)):
        pipe.transformer.set_attention_backend("_native_math")
        assert torch.equal(generate(pipe), expected)
    backends = {getattr(p._attention_backend, "value", None) for p in pipe.transformer.attn_processors.values()}
    assert backends == {"_native_math"}
    assert torch.equal(generate(pipe), expected)


@pytest.mark.parametrize("how", ["blocks", pytest.param("whole", marks=pytest.mark.slow)])
def test_compiled_full_graph_makes_two_graphs_and_the_same_video(make_pipe, how):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    pipe, config = make_pipe(), RadialAttention(**dict(SPARSE, dense_steps=3))
    with dit_accel.attach(pipe, config):
        eager = generate(pipe, num_inference_steps=10)
    if how == "blocks":
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    else:
        pipe.transformer.compile(fullgraph=True, backend="aot_eager")
    counters.clear()
    with dit_accel.attach(pipe, config) as attachment:
        torch.testing.assert_close(generate(pipe, num_inference_steps=10), eager, rtol=1e-5, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == 2
        generate(pipe, num_inference_steps=10)
        assert counters["stats"]["unique_graphs"] == 2
        assert attachment.report().sparse_density < 1
    torch._dynamo.reset()


class TestBadInput:
    def test_unsupported_transformer_names_near_ones_and_where_all_are_listed(self):
        near = type("WanTransformer3DModl", (torch.nn.Module,), {})  # a class is no word that was spelt wrong
        for module in (torch.nn.Linear(2, 2), near()):
            with pytest.raises(dit_accel.UnsupportedModel, match=rf"got {type(module).__name__}; `dit-accel models`"):
                dit_accel.attach(module, preset="none")
        with pytest.raises(dit_accel.UnsupportedModel, match="got int"):
            dit_accel.attach(3, preset="none")

    def test_foreign_processor_is_refused_and_nothing_stays(self, pipe):
        class Foreign:
            def __call__(self, attn, hidden_states, *args, **kwargs):
                return hidden_states

        module = pipe.transformer.blocks[2].attn1
        module.set_processor(Foreign())
        processors = pipe.transformer.attn_processors
        with pytest.raises(dit_accel.UnsupportedModel, match=r"Foreign.*dispatch_attention_fn nor"):
            dit_accel.attach(pipe, RadialAttention())
        assert pipe.transformer.attn_processors == processors
        assert "cache_context" not in pipe.transformer.__dict__

    def test_methods_that_do_not_fit(self, pipe, monkeypatch):
        with pytest.raises(dit_accel.ConfigError, match=r"attach.*configs, got 'radial'"):
            dit_accel.attach(pipe, "radial")
        with pytest.raises(dit_accel.ConfigError, match="two RadialAttention"):
            dit_accel.attach(pipe, RadialAttention(), RadialAttention())
        with pytest.raises(dit_accel.MissingBackend, match="backend 'tritn'"):
            dit_accel.attach(pipe, preset="none", backend="tritn")
        with monkeypatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "0")
            patch.setattr(torch.accelerator, "is_available", lambda: False)
            for built_for in (None, torch.device("cuda")):  # a torch for CUDA where no card is, as pip gives it
                patch.setattr(torch.accelerator, "current_accelerator", lambda device=built_for: device)
                with pytest.raises(dit_accel.MissingBackend, match=r"'triton'.*CUDA, ROCm.*XPU"):
                    dit_accel.attach(pipe, preset="none", backend="triton")
            patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
            patch.setenv("CXX", "no-such-compiler")
            with pytest.raises(dit_accel.MissingBackend, match=r"'flex'.*C\+\+ compiler \(no-such"):
                dit_accel.attach(pipe, preset="none", backend="flex")
            patch.setenv("CXX", "sh")
            with pytest.raises(dit_accel.MissingBackend, match=r"'flex'.*votes.*lite.*'auto'"):
                dit_accel.attach(pipe, dit_accel.LiteAttention(), backend="flex")
        assert torch.equal(generate(pipe), generate(pipe))

    def test_a_processor_set_by_the_user_meanwhile_stays(self, pipe):
        from diffusers.models.transformers.transformer_wan import WanAttnProcessor

        attachment = dit_accel.attach(pipe, RadialAttention(**SPARSE))
        mine = WanAttnProcessor()
        pipe.transformer.blocks[0].attn1.set_processor(mine)
        attachment.detach()
        assert pipe.transformer.blocks[0].attn1.processor is mine
