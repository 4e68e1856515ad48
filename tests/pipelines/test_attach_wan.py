"""Attaching to Wan: what it leaves as it was, two pipelines beside each other, and what is refused."""

import threading
import warnings

import pytest
import torch
from wan_tiny import generate, tiny_transformer

import dit_accel
from dit_accel import ConfigError, MissingBackend, RadialAttention, UnsupportedModel
from dit_accel.attachment.backends import UnplannedRun

SPARSE = dict(block_size=16, decay_factor=0.2, near="half", sink=False, dense_steps=1, dense_layers=1)
RADIAL = RadialAttention(**SPARSE)


def test_neutral_is_bit_equal_and_detach_leaves_no_trace(pipe):
    transformer = pipe.transformer
    before, processors = generate(pipe), transformer.attn_processors
    keys = {name: set(module.__dict__) for name, module in transformer.named_modules()}
    for methods in ((), (RadialAttention(**{**SPARSE, "dense_steps": 1000}),)):
        attachment = dit_accel.attach(pipe, *methods, preset="none")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UnplannedRun)
            assert all(torch.equal(generate(pipe), before) for _ in range(2))
        assert len([one for one in said if issubclass(one.category, UnplannedRun)]) == len(methods)  # once, not twice
        assert sum(step.dense_layers for step in attachment.report().steps) == 4 * 2 * 3
        attachment.detach()
    assert torch.equal(generate(pipe), before)
    assert all(transformer.attn_processors[name] is processors[name] for name in processors)
    assert {name: set(module.__dict__) for name, module in transformer.named_modules()} == keys
    assert not transformer._forward_pre_hooks


def test_the_report_tells_each_step_of_each_branch(pipe):
    with dit_accel.attach(pipe, RADIAL) as attachment:
        generate(pipe, num_inference_steps=2)
        report = attachment.report()
    assert [(s.step_index, s.branch, s.dense_layers, s.sparse_layers) for s in report.steps] == [
        (0, "cond", 3, 0), (0, "uncond", 3, 0), (1, "cond", 1, 2), (1, "uncond", 1, 2),
    ]  # fmt: skip
    layout = dit_accel.TokenLayout(frames=5, height=4, width=4)
    assert report.sparse_density == pytest.approx(RADIAL.filled().density(layout))
    assert report.to_dict()["methods"]["radial"]["block_size"] == 16
    assert "radial seldom pays below 20000 visual tokens" in str(report)


def test_two_pipelines_with_other_settings_do_not_meet(make_pipe):
    pipes, between, results = (make_pipe(0), make_pipe(1)), [], {}
    other = RadialAttention(**{**SPARSE, "rest": "pooled", "dense_layers": 0})

    def run_other(pipe, step, timestep, tensors):
        between.append(generate(pipes[1]))
        return tensors

    with dit_accel.attach(pipes[0], RADIAL), dit_accel.attach(pipes[1], other):
        alone = [generate(pipe) for pipe in pipes]
        assert torch.equal(generate(pipes[0], callback_on_step_end=run_other), alone[0])
        assert all(torch.equal(one, alone[1]) for one in between)
        threads = [
            threading.Thread(target=lambda i=i, pipe=pipe: results.update({i: generate(pipe)}))
            for i, pipe in enumerate(pipes)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(results[i], alone[i]) for i in range(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays(dtype):
    transformer = tiny_transformer().to(dtype)
    inputs = torch.randn(1, 12, 5, 8, 8).to(dtype), torch.tensor([500.0]), torch.randn(1, 6, 64).to(dtype)
    with torch.no_grad(), dit_accel.attach(transformer, RadialAttention(**{**SPARSE, "dense_steps": 0})):
        out = transformer(*inputs, return_dict=False)[0]
    assert out.dtype == dtype
    assert out.isfinite().all()


def test_fused_projections_give_the_same_result_before_or_after(pipe):
    with dit_accel.attach(pipe, RADIAL):
        plain = generate(pipe)
        pipe.transformer.fuse_qkv_projections()
        after = generate(pipe)
    with dit_accel.attach(pipe, RADIAL):
        assert torch.equal(generate(pipe), after)
    torch.testing.assert_close(after, plain, rtol=1e-4, atol=1e-4)


def test_unsupported_transformers_are_named():
    near = type("WanTransformer3DModl", (torch.nn.Module,), {})  # a class is no word that was spelt wrong
    for model, name in ((torch.nn.Linear(2, 2), "Linear; `dit-accel models`"), (near(), near.__name__), (3, "int")):
        with pytest.raises(UnsupportedModel, match=f"got {name}"):
            dit_accel.attach(model, preset="none")


def test_foreign_processors_are_refused_and_one_set_meanwhile_stays(pipe):
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    class Foreign:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    module, mine = pipe.transformer.blocks[0].attn1, WanAttnProcessor()
    attachment = dit_accel.attach(pipe, RADIAL)
    module.set_processor(mine)
    attachment.detach()
    assert module.processor is mine
    module.set_processor(Foreign())
    processors = pipe.transformer.attn_processors
    with pytest.raises(UnsupportedModel, match=r"Foreign.*dispatch_attention_fn nor"):
        dit_accel.attach(pipe, RADIAL)
    assert pipe.transformer.attn_processors == processors
    assert "cache_context" not in pipe.transformer.__dict__


def test_methods_and_backends_that_do_not_fit(pipe, monkeypatch):
    def refused(error, match, *methods, **options):
        with pytest.raises(error, match=match):
            dit_accel.attach(pipe, *methods, preset="none", **options)

    refused(ConfigError, r"attach.*configs, got 'radial'", "radial")
    refused(ConfigError, "two RadialAttention", RadialAttention(), RadialAttention())
    refused(MissingBackend, "backend 'tritn'", backend="tritn")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for built_for in (None, torch.device("cuda")):  # a torch for CUDA where no card is, as pip gives it
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda device=built_for: device)
        refused(MissingBackend, r"'triton'.*CUDA, ROCm.*XPU", backend="triton")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused(MissingBackend, r"'flex'.*C\+\+ compiler \(no-such", backend="flex")
    monkeypatch.setenv("CXX", "sh")
    refused(MissingBackend, r"'flex'.*votes.*lite.*'auto'", dit_accel.LiteAttention(), backend="flex")
