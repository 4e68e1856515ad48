"""Methods under what users do to a transformer: compiled in three ways, offloaded in four, with a LoRA."""

import pytest
import torch
from torch._dynamo.utils import counters
from wan_tiny import generate

import dit_accel
from dit_accel import (
    DFA,
    DBCache,
    DBPrune,
    EasyCache,
    FirstBlockCache,
    LiteAttention,
    ProfilingCache,
    RadialAttention,
    StaticCache,
)

ALWAYS = dict(threshold=1e9, warmup_steps=2, last_steps=1, max_consecutive=1, predictor="taylor")
RADIAL = RadialAttention(decay_factor=0.2, near="half", sink=False, block_size=16, dense_steps=1, dense_layers=0)
STEP_CACHES = {
    "easycache": EasyCache(**ALWAYS),
    "staticcache": StaticCache(every=2, warmup_steps=2, last_steps=1, predictor="taylor"),
}
BLOCK_CACHES = {
    "firstblockcache": FirstBlockCache(**ALWAYS),
    "dbcache": DBCache(first_blocks=1, last_blocks=1, **ALWAYS),
    "profilingcache": ProfilingCache(blocks="0, 2", every=2, warmup_steps=1, last_steps=1, predictor="taylor"),
    "dbprune": DBPrune(first_blocks=1, **ALWAYS),
}
CACHES = {**STEP_CACHES, **BLOCK_CACHES}
STEPS, DRAWN = 6, "##.#.#"
"""Steps of a run, and which of them a cache computes."""

FOREGROUND = DFA(every=2, warmup_steps=2, last_steps=1)
LITE = LiteAttention(block_size=16, threshold=-0.01, dense_steps=0)
WAYS = ("blocks", "compile", "torch.compile")
COMPILED = {
    "radial": ((RADIAL,), 2),
    "lite": ((LITE,), 1),
    "dfa": ((FOREGROUND,), 1),
    "radial, dfa": ((RADIAL, FOREGROUND), 1),
    **{name: ((RADIAL, cache), 2) for name, cache in CACHES.items()},
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
    with dit_accel.attach(pipe, *methods, preset="none") as attachment:
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
    with dit_accel.attach(pipe, *methods, preset="none") as attachment:
        if when == "after":
            compile_as(pipe, how)
        for _ in range(2):
            found = generate(pipe, num_inference_steps=STEPS)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
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


EACH = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("radial", "dbcache") else pytest.mark.slow)
        for name in ("radial", *CACHES)
    ],
)


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
            with dit_accel.attach(pipe, *methods) as attachment:
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
    with dit_accel.attach(pipe, *methods):
        bare = generate(pipe, num_inference_steps=STEPS)
        add_lora(pipe)
        assert torch.equal(generate(pipe, num_inference_steps=STEPS), expected)
    assert not torch.equal(bare, expected)
