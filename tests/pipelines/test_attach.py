"""Attaching to Wan: what it leaves as it was, what is refused, and compiled, offloaded and fine-tuned transformers."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from some_cases import some
from torch._dynamo.utils import counters
from wan_tiny import generate, tiny_transformer

import dit_accel as d
from dit_accel.attachment.backends import UnplannedRun

SPARSE = dict(block_size=16, decay_factor=0.2, near="half", sink=False, dense_steps=1, dense_layers=1)
RADIAL = d.RadialAttention(**SPARSE)


def test_neutral_is_bit_equal_and_detach_leaves_no_trace(pipe):
    transformer = pipe.transformer
    before, processors = generate(pipe), transformer.attn_processors
    keys = {name: set(module.__dict__) for name, module in transformer.named_modules()}
    for methods in ((), (d.RadialAttention(**{**SPARSE, "dense_steps": 1000}),)):
        attachment = d.attach(pipe, *methods, preset="none")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UnplannedRun)
            assert all(torch.equal(generate(pipe), before) for _ in range(2))
        assert len([one for one in caught if issubclass(one.category, UnplannedRun)]) == len(methods)  # once, not twice
        assert sum(step.dense_layers for step in attachment.report().steps) == 4 * 2 * 3
        attachment.detach()
    assert torch.equal(generate(pipe), before)
    assert all(transformer.attn_processors[name] is processors[name] for name in processors)
    assert {name: set(module.__dict__) for name, module in transformer.named_modules()} == keys
    assert not transformer._forward_pre_hooks


def test_the_report_tells_each_step_of_each_branch(pipe):
    with d.attach(pipe, RADIAL) as attachment:
        generate(pipe, num_inference_steps=2)
        report = attachment.report()
    assert [(s.step_index, s.branch, s.dense_layers, s.sparse_layers) for s in report.steps] == [
        (0, "cond", 3, 0), (0, "uncond", 3, 0), (1, "cond", 1, 2), (1, "uncond", 1, 2),
    ]  # fmt: skip
    layout = d.TokenLayout(frames=5, height=4, width=4)
    assert report.sparse_density == pytest.approx(RADIAL.filled().density(layout))
    assert report.to_dict()["methods"]["radial"]["block_size"] == 16
    assert "radial seldom pays below 20000 visual tokens" in str(report)


def test_two_pipelines_with_other_settings_do_not_meet(make_pipe):
    """Whether one runs between two steps of the other, or in another thread."""
    pipes, between = (make_pipe(0), make_pipe(1)), []
    other = d.RadialAttention(**{**SPARSE, "rest": "pooled", "dense_layers": 0})

    def run_other(pipe, step, timestep, tensors):
        between.append(generate(pipes[1]))
        return tensors

    with d.attach(pipes[0], RADIAL), d.attach(pipes[1], other), ThreadPoolExecutor() as pool:
        alone = [generate(pipe) for pipe in pipes]
        assert torch.equal(generate(pipes[0], callback_on_step_end=run_other), alone[0])
        assert all(torch.equal(one, alone[1]) for one in between)
        assert all(map(torch.equal, pool.map(generate, pipes), alone))


def test_half_precision_stays():
    for dtype in (torch.bfloat16, torch.float16):
        inputs = torch.randn(1, 12, 5, 8, 8).to(dtype), torch.tensor([500.0]), torch.randn(1, 6, 64).to(dtype)
        transformer = tiny_transformer(num_layers=2).to(dtype)
        with torch.no_grad(), d.attach(transformer, d.RadialAttention(**{**SPARSE, "dense_steps": 0})):
            out = transformer(*inputs).sample
        assert (out.dtype, bool(out.isfinite().all())) == (dtype, True)


def test_fused_projections_give_the_same_result_before_or_after(pipe):
    with d.attach(pipe, RADIAL):
        plain = generate(pipe)
        pipe.transformer.fuse_qkv_projections()
        after = generate(pipe)
    with d.attach(pipe, RADIAL):
        assert torch.equal(generate(pipe), after)
    torch.testing.assert_close(after, plain, rtol=1e-4, atol=1e-4)


def test_unsupported_transformers_are_named():
    near = type("WanTransformer3DModl", (torch.nn.Module,), {})  # a class is no word that was spelt wrong
    for model, name in ((torch.nn.Linear(2, 2), "Linear; `dit-accel models`"), (near(), near.__name__), (3, "int")):
        with pytest.raises(d.UnsupportedModel, match=f"got {name}"):
            d.attach(model, preset="none")


def test_foreign_processors_are_refused_and_one_set_meanwhile_stays(pipe):
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    class Foreign:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    module, mine = pipe.transformer.blocks[0].attn1, WanAttnProcessor()
    attachment = d.attach(pipe, RADIAL)
    module.set_processor(mine)
    attachment.detach()
    assert module.processor is mine
    module.set_processor(Foreign())
    processors = pipe.transformer.attn_processors
    with pytest.raises(d.UnsupportedModel, match=r"Foreign.*dispatch_attention_fn nor"):
        d.attach(pipe, RADIAL)
    assert pipe.transformer.attn_processors == processors
    assert "cache_context" not in pipe.transformer.__dict__


def test_methods_and_backends_that_do_not_fit(pipe, monkeypatch):
    def refused(error, match, *methods, **options):
        with pytest.raises(error, match=match):
            d.attach(pipe, *methods, preset="none", **options)

    refused(d.ConfigError, r"attach.*configs, got 'radial'", "radial")
    refused(d.ConfigError, "two RadialAttention", d.RadialAttention(), d.RadialAttention())
    refused(d.MissingBackend, r"backend 'tritn'.*'triton'\?", backend="tritn")
    for other in (7, None):
        refused(d.MissingBackend, rf"backend {other}.*auto, cudnn, fa4, flash", backend=other)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for built_for in (None, torch.device("cuda")):  # a torch for CUDA where no card is, as pip gives it
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda device=built_for: device)
        refused(d.MissingBackend, r"'triton'.*CUDA, ROCm.*XPU", backend="triton")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused(d.MissingBackend, r"'flex'.*C\+\+ compiler \(no-such", backend="flex")
    monkeypatch.setenv("CXX", "sh")
    refused(d.MissingBackend, r"'flex'.*votes.*lite.*'auto'", d.LiteAttention(), backend="flex")


# Compiled in three ways, offloaded in four, with a LoRA

ALWAYS = dict(threshold=1e9, warmup_steps=2, last_steps=1, max_consecutive=1, predictor="taylor")
EVERY_LAYER = d.RadialAttention(decay_factor=0.2, near="half", sink=False, block_size=16, dense_steps=1, dense_layers=0)
STEP_CACHES = {
    "easycache": d.EasyCache(**ALWAYS),
    "staticcache": d.StaticCache(every=2, warmup_steps=2, last_steps=1, predictor="taylor"),
}
BLOCK_CACHES = {
    "firstblockcache": d.FirstBlockCache(**ALWAYS),
    "dbcache": d.DBCache(first_blocks=1, last_blocks=1, **ALWAYS),
    "profilingcache": d.ProfilingCache(blocks="0, 2", every=2, warmup_steps=1, last_steps=1, predictor="taylor"),
    "dbprune": d.DBPrune(first_blocks=1, **ALWAYS),
}
CACHES = {**STEP_CACHES, **BLOCK_CACHES}
STEPS, DRAWN = 6, "##.#.#"
"""Steps of a run, and which of them a cache computes."""

FOREGROUND = d.DFA(every=2, warmup_steps=2, last_steps=1)
LITE = d.LiteAttention(block_size=16, threshold=-0.01, dense_steps=0)
WAYS = ("blocks", "compile", "torch.compile")
COMPILED = {
    "radial": ((EVERY_LAYER,), 2),
    "lite": ((LITE,), 1),
    "dfa": ((FOREGROUND,), 1),
    "radial, dfa": ((EVERY_LAYER, FOREGROUND), 1),
    **{name: ((EVERY_LAYER, cache), 2) for name, cache in CACHES.items()},
}
"""Methods, and their graphs: one of planned calls, and one of dense ones where there are any."""

QUICK = [("lite", "blocks", "before"), ("dfa", "blocks", "after"), ("firstblockcache", "blocks", "before")]
CASES = [
    pytest.param(name, how, when, marks=() if (name, how, when) in QUICK else pytest.mark.slow)
    for name in COMPILED
    for how in (WAYS[:1] if name in BLOCK_CACHES else WAYS)  # the others are refused: tests/core/test_places.py
    for when in (("before",) if how == "torch.compile" else ("before", "after"))
]


def made(pipe, *methods):
    """Return the latents of a run and its report."""
    with d.attach(pipe, *methods, preset="none") as attachment:
        return generate(pipe, num_inference_steps=STEPS), attachment.report()


def drawn(report, name):
    forwards = report.section(name).data["forwards"]
    return "".join("." if entry["reused"] else "#" for entry in forwards if entry["branch"] == "cond")


def compile_as(pipe, how):
    options = dict(fullgraph=True, backend="aot_eager")
    if how == "torch.compile":
        pipe.transformer = torch.compile(pipe.transformer, **options)
    else:
        (pipe.transformer.compile if how == "compile" else pipe.transformer.compile_repeated_blocks)(**options)


@pytest.fixture
def fresh_graphs():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "how", "when"), CASES)
def test_compiled_transformers_give_the_same_in_no_further_graph(make_pipe, fresh_graphs, name, how, when):
    """Caches add none, nor do the rows that attend or the tiles that are left, whichever they are."""
    methods, graphs = COMPILED[name]
    expected, eager = made(make_pipe(), *methods)
    pipe = make_pipe()
    if when == "before":
        compile_as(pipe, how)
    with d.attach(pipe, *methods, preset="none") as attachment:
        if when == "after":
            compile_as(pipe, how)
        for _ in range(2):
            latents = generate(pipe, num_inference_steps=STEPS)
            torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
            assert counters["stats"]["unique_graphs"] == graphs
        report = attachment.report()
    assert [step.density for step in report.steps] == pytest.approx([step.density for step in eager.steps])
    assert min(step.density for step in report.steps if step.density is not None) < 1
    if name in CACHES:
        assert drawn(report, name) == DRAWN


def offload(pipe, how):
    """Offload to and from the CPU itself: the hooks are diffusers' and accelerate's own, only nothing moves."""
    from accelerate import cpu_offload
    from accelerate.hooks import CpuOffload, add_hook_to_module
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    if how == "model":
        add_hook_to_module(pipe.transformer, CpuOffload(cpu))
    elif how == "sequential":
        cpu_offload(pipe.transformer, execution_device=cpu, offload_buffers=False)
    elif how == "group of leaves":
        apply_group_offloading(pipe.transformer, cpu, cpu, offload_type="leaf_level")
    else:
        apply_group_offloading(pipe.transformer, cpu, cpu, offload_type="block_level", num_blocks_per_group=1)


EACH = pytest.mark.parametrize("name", some(("radial", *CACHES), "radial", "dbcache"))


@EACH
def test_an_offloaded_model_gives_the_same(make_pipe, name):
    methods = COMPILED[name][0][-1:]
    expected, report = made(make_pipe(), *methods)
    assert name == "radial" or drawn(report, name) == DRAWN
    for how in ("model", "sequential", "group of leaves", "group of blocks"):
        for offload_first in (True, False):
            pipe = make_pipe()
            if offload_first:
                offload(pipe, how)
            with d.attach(pipe, *methods) as attachment:
                if not offload_first:
                    offload(pipe, how)
                assert torch.equal(generate(pipe, num_inference_steps=STEPS), expected), (how, offload_first)
                assert name == "radial" or drawn(attachment.report(), name) == DRAWN


@EACH
def test_a_lora_may_come_before_or_after(make_pipe, name):
    from peft import LoraConfig

    def add_lora(pipe):
        torch.manual_seed(3)
        pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))

    methods, pipe = COMPILED[name][0][-1:], make_pipe()
    add_lora(pipe)
    expected, _ = made(pipe, *methods)
    pipe = make_pipe()
    with d.attach(pipe, *methods):
        bare = generate(pipe, num_inference_steps=STEPS)
        add_lora(pipe)
        assert torch.equal(generate(pipe, num_inference_steps=STEPS), expected)
    assert not torch.equal(bare, expected)
