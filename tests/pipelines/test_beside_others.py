"""Methods beside what other libraries do to a pipeline, as docs/beside.md says, and beside diffusers' own caches."""

from pathlib import Path

import foreign_processors as foreign
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
from dit_accel import (
    ConfigError,
    DeltaAttention,
    EasyCache,
    FirstBlockCache,
    LiteAttention,
    RadialAttention,
    SoftPAG,
    SparseD,
    UnsupportedModel,
)
from dit_accel.testing.recording import recorded

SPARSE = dict(block_size=16, dense_steps=0, dense_layers=0)
SKIPS = dict(threshold=1e9, warmup_steps=1, max_consecutive=1)
METHODS = {
    "RadialAttention": RadialAttention(decay_factor=0.2, near="half", sink=False, **SPARSE),
    "SparseD, cached rest": SparseD(density=0.3, rest="cached", **SPARSE),
    "EasyCache": EasyCache(**SKIPS),
    "FirstBlockCache": FirstBlockCache(**SKIPS),
    "SoftPAG": SoftPAG(heads="L1H1", scale=1.0),
}
PAGE = Path(__file__).parents[2] / "docs" / "beside.md"


def quantised(pipe):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(pipe.transformer, Int8WeightOnlyConfig())


def compiled(pipe):
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")


def cached(pipe):
    cache_dit = pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, residual_diff_threshold=1e9
    )
    cache_dit.enable_cache(pipe, cache_config=config)


OTHERS = {
    "torchao": quantised,
    "compile_repeated_blocks": compiled,
    "cache-dit": cached,
    "processors on torch's attention": lambda pipe: foreign.put(pipe, foreign.TorchAttention),
    "processors on their own attention": lambda pipe: foreign.put(pipe, foreign.ShardedAttention),
}
REFUSALS = {
    "cache-dit": (ConfigError, r"transformer.*cache_dit\.disable_cache\(pipe\)"),
    "processors on their own attention": (UnsupportedModel, r"ShardedAttention.*dispatch_attention_fn"),
}


def cells():
    """What the page says of each library, order and method."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    names = [name.strip() for name in lines[0].strip("|").split("|")][1:]
    for line in lines[2:]:
        what, *words = (part.strip() for part in line.strip("|").split("|"))
        other = next(name for name in OTHERS if what.startswith(name))
        marks = [pytest.mark.slow] if other == "compile_repeated_blocks" else []
        for name, word in zip(names, words, strict=True):
            yield pytest.param(other, "before" in what.split(",")[1], name, word, marks=marks, id=f"{what}-{name}")


def test_the_page_has_every_library_and_method_in_both_orders():
    seen = {cell.values[:3] for cell in cells()}
    assert seen == {(other, first, name) for other in OTHERS for first in (True, False) for name in METHODS}


@pytest.fixture
def wan():
    """A pipeline and its latents."""
    pipe, call = stock_pipeline("WanPipeline")
    call.update(num_inference_steps=4, output_type="latent")
    return pipe, lambda: run_stock(pipe, call)


@pytest.mark.parametrize(("other", "first", "name", "word"), [*cells()])
def test_each_cell_is_as_the_page_says(other, first, name, word, request, wan):
    pipe, run = wan
    if other == "cache-dit":
        import cache_dit

        request.addfinalizer(lambda: cache_dit.disable_cache(pipe))
    if first:
        OTHERS[other](pipe)
        plain = run()
    if word == "refused":
        error, said = REFUSALS[other]
        with pytest.raises(error, match=said):  # noqa: PT012
            dit_accel.attach(pipe, METHODS[name], preset="none")
            OTHERS[other](pipe)
            run()
        return
    with dit_accel.attach(pipe, METHODS[name], preset="none") as attachment:
        if not first:
            OTHERS[other](pipe)
        out, again = run(), run()
        replaced = any("3 of 3 attention processors" in note for note in attachment.report().notes)
    after = run()
    assert out.isfinite().all()
    assert torch.equal(out, again)
    assert word == ("reported" if torch.equal(out, after) else "works")
    assert replaced or word == "works"
    if first:
        assert torch.equal(after, plain)


def test_a_transformer_under_another_name_is_refused_by_it(wan):
    pipe, _ = wan
    pipe.transformer.__class__ = type("NunchakuWanTransformer3DModel", (type(pipe.transformer),), {})
    with pytest.raises(UnsupportedModel, match="NunchakuWanTransformer3DModel"):
        dit_accel.attach(pipe, METHODS["EasyCache"], preset="none")


def test_the_foreign_processors_compute_what_diffusers_own_do(wan):
    pipe, run = wan
    own = run()
    for processor in (foreign.TorchAttention, foreign.ShardedAttention):
        foreign.put(pipe, processor)
        torch.testing.assert_close(run(), own, rtol=1e-5, atol=1e-3)


# Caches of diffusers attached to whole pipelines, with and without contexts of their own

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
