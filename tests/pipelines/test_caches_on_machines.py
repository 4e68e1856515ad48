"""Caches under what users do to a transformer: compiled in four ways, offloaded, with LoRA."""

import pytest
import torch
from torch._dynamo.utils import counters
from wan_tiny import generate

import dit_accel
from dit_accel import DFA, DBCache, DBPrune, EasyCache, FirstBlockCache, ProfilingCache, RadialAttention, StaticCache

ALWAYS = dict(threshold=1e9, warmup_steps=3, last_steps=1, max_consecutive=1, predictor="taylor")
RADIAL = RadialAttention(decay_factor=0.2, near="half", sink=False, block_size=16, dense_steps=1, dense_layers=0)
STEP_CACHES = {
    "easycache": EasyCache(**ALWAYS),
    "staticcache": StaticCache(every=2, warmup_steps=3, last_steps=1, predictor="taylor"),
}
BLOCK_CACHES = {
    "firstblockcache": FirstBlockCache(**ALWAYS),
    "dbcache": DBCache(first_blocks=1, last_blocks=1, **ALWAYS),
    "profilingcache": ProfilingCache(blocks="0, 2", every=2, warmup_steps=2, last_steps=1, predictor="taylor"),
    "dbprune": DBPrune(first_blocks=1, **ALWAYS),
}
CACHES = {**STEP_CACHES, **BLOCK_CACHES}
STEPS = 8
DRAWN = "###.#.##"
QUICK = [(name, "blocks", "before") for name in ("firstblockcache",)]


def made(pipe, *methods):
    """Return the latents of a run, and which of its steps the cache computed."""
    with dit_accel.attach(pipe, *methods, preset="none") as attachment:
        out = generate(pipe, num_inference_steps=STEPS)
        return out, drawn(attachment, methods[-1].name)


def drawn(attachment, name):
    forwards = attachment.report().section(name).data["forwards"]
    return "".join("." if entry["reused"] else "#" for entry in forwards if entry["branch"] == "cond")


@pytest.fixture
def fresh_graphs():
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "how", "when"),
    [  # others are refused with the reason: tests/core/test_places.py
        pytest.param(name, how, when, marks=() if (name, how, when) in QUICK else pytest.mark.slow)
        for name in CACHES
        for how in (("blocks",) if name in BLOCK_CACHES else ("blocks", "compile", "torch.compile"))
        for when in (("before",) if how == "torch.compile" else ("before", "after"))
    ],
)
def test_a_cache_adds_no_graph(make_pipe, fresh_graphs, name, how, when):
    """With a cache the graphs are those of the sparse method alone: one of dense calls, one of planned ones."""
    cache = CACHES[name]
    expected, steps = made(make_pipe(), RADIAL, cache)
    assert steps == DRAWN
    pipe = make_pipe()
    if when == "before":
        compile_as(pipe, how)
    with dit_accel.attach(pipe, RADIAL, cache) as attachment:
        if when == "after":
            compile_as(pipe, how)
        torch.testing.assert_close(generate(pipe, num_inference_steps=STEPS), expected, rtol=1e-4, atol=1e-4)
        assert fresh_graphs() == 2
        generate(pipe, num_inference_steps=STEPS)
        assert fresh_graphs() == 2
        assert drawn(attachment, name) == DRAWN


FOREGROUND = DFA(every=2, warmup_steps=3, last_steps=1)


@pytest.mark.parametrize(
    ("how", "when", "methods"),
    [
        ("blocks", "before", (FOREGROUND,)),
        pytest.param("compile", "after", (RADIAL, FOREGROUND), marks=pytest.mark.slow),
        pytest.param("blocks", "after", (RADIAL, FOREGROUND), marks=pytest.mark.slow),
        pytest.param("compile", "before", (FOREGROUND,), marks=pytest.mark.slow),
        pytest.param("torch.compile", "before", (RADIAL, FOREGROUND), marks=pytest.mark.slow),
    ],
)
def test_the_foreground_alone_adds_no_graph(make_pipe, fresh_graphs, how, when, methods):
    """Full steps, and those in which some rows attend, run the one graph of planned calls, whatever the rows."""
    with dit_accel.attach(pipe := make_pipe(), *methods, preset="none") as attachment:
        expected = generate(pipe, num_inference_steps=STEPS)
        eager = attachment.report()
    pipe = make_pipe()
    if when == "before":
        compile_as(pipe, how)
    with dit_accel.attach(pipe, *methods, preset="none") as attachment:
        if when == "after":
            compile_as(pipe, how)
        for _ in range(2):
            torch.testing.assert_close(generate(pipe, num_inference_steps=STEPS), expected, rtol=1e-4, atol=1e-4)
            assert fresh_graphs() == 1
        report = attachment.report()
    assert [step.density for step in report.steps] == pytest.approx([step.density for step in eager.steps])
    shares = [share for entry in report.section("dfa").data["foreground"] for share in entry["foreground"]]
    assert len({*shares}) > 1
    assert all(0 < share < 1 for share in shares)


def compile_as(pipe, how):
    options = dict(fullgraph=True, backend="aot_eager")
    if how == "blocks":
        pipe.transformer.compile_repeated_blocks(**options)
    elif how == "compile":
        pipe.transformer.compile(**options)
    else:
        pipe.transformer = torch.compile(pipe.transformer, **options)


EACH = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("easycache", "dbcache") else pytest.mark.slow) for name in CACHES],
)


@EACH
def test_an_offloaded_model_gives_the_same(make_pipe, name):
    expected, steps = made(make_pipe(), CACHES[name])
    assert steps == DRAWN
    for how in ("model", "sequential", "group of leaves", "group of blocks"):
        for first in ("cache", "offload"):
            pipe = make_pipe()
            if first == "offload":
                offload(pipe, how)
            with dit_accel.attach(pipe, CACHES[name]) as attachment:
                if first == "cache":
                    offload(pipe, how)
                assert torch.equal(generate(pipe, num_inference_steps=STEPS), expected), (how, first)
                assert drawn(attachment, name) == DRAWN


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


@EACH
def test_lora_before_or_after_and_another_scale(make_pipe, name):
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    results = []
    for lora_first in (True, False):
        pipe = make_pipe()
        torch.manual_seed(3)
        if lora_first:
            pipe.transformer.add_adapter(lora)
        with dit_accel.attach(pipe, CACHES[name]):
            if not lora_first:
                bare = generate(pipe, num_inference_steps=STEPS)
                torch.manual_seed(3)
                pipe.transformer.add_adapter(lora)
            results.append(generate(pipe, num_inference_steps=STEPS))
    assert torch.equal(*results)
    assert not torch.equal(results[1], bare)
