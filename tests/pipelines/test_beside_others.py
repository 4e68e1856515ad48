"""Methods beside what other libraries do to a pipeline (docs/beside.md): processors, weights in few bits, caches."""

import shutil
from pathlib import Path

import foreign_processors as foreign
import pytest
import torch
from diffusers import BitsAndBytesConfig, TorchAoConfig, WanTransformer3DModel, hooks
from dit_accel_assets import model_path
from dit_accel_kernels import unpack_bits
from dit_accel_pipelines.generation.loading import open_pipeline
from dit_accel_pipelines.generation.lora import check_lora
from safetensors.torch import load_file
from tiny_stock import run_stock, stock_pipeline
from wan_tiny import denoise, generate, tiny_transformer

import dit_accel as d
from dit_accel.testing.recording import recorded

SPARSE = dict(block_size=16, dense_steps=0, dense_layers=0)
SKIPS = dict(threshold=1e9, warmup_steps=1, max_consecutive=1)
METHODS = {
    "RadialAttention": d.RadialAttention(decay_factor=0.2, near="half", sink=False, **SPARSE),
    "SparseD, cached rest": d.SparseD(density=0.3, rest="cached", **SPARSE),
    "EasyCache": d.EasyCache(**SKIPS),
    "FirstBlockCache": d.FirstBlockCache(**SKIPS),
    "SoftPAG": d.SoftPAG(heads="L1H1", scale=1.0),
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
    "cache-dit": (d.ConfigError, r"transformer.*cache_dit\.disable_cache\(pipe\)"),
    "processors on their own attention": (d.UnsupportedModel, r"ShardedAttention.*dispatch_attention_fn"),
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
        error, words = REFUSALS[other]
        with pytest.raises(error, match=words):  # noqa: PT012
            d.attach(pipe, METHODS[name], preset="none")
            OTHERS[other](pipe)
            run()
        return
    with d.attach(pipe, METHODS[name], preset="none") as attachment:
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
    with pytest.raises(d.UnsupportedModel, match="NunchakuWanTransformer3DModel"):
        d.attach(pipe, METHODS["EasyCache"], preset="none")


def test_the_foreign_processors_compute_what_diffusers_own_do(wan):
    pipe, run = wan
    expected = run()
    for processor in (foreign.TorchAttention, foreign.ShardedAttention):
        foreign.put(pipe, processor)
        torch.testing.assert_close(run(), expected, rtol=1e-5, atol=1e-3)


# Caches of diffusers attached to whole pipelines, with and without contexts of their own

STEPS = 6
LITE = d.LiteAttention(block_size=16, threshold=-0.01, dense_steps=0)
CACHES = {
    "first block": lambda pipe: hooks.FirstBlockCacheConfig(threshold=0.2),
    "sea": lambda pipe: hooks.SeaCacheConfig(threshold=2.0),
    "mag": lambda pipe: hooks.MagCacheConfig(threshold=10.0, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS),
    "taylor lite": lambda pipe: hooks.TaylorSeerCacheConfig(cache_interval=2, use_lite_mode=True),
}


def counted(attachment):
    calls = attachment.report().section("diffusers-cache").data["calls"]
    return sum(call["layers_run"] for call in calls), sum(call["layers"] for call in calls)


@pytest.mark.parametrize("name", CACHES)
def test_wan_runs_as_under_enable_cache_and_votes_count_the_calls_that_run(make_pipe, name):
    pipe, native = make_pipe(), make_pipe()
    native.transformer.enable_cache(CACHES[name](native))
    with d.attach(native, LITE):
        expected = generate(native, num_inference_steps=STEPS)
    planned, votes = [], {}

    def look(pipe, step, timestep, tensors):
        votes.update({key: state.votes for key, state in lite._states.items()})
        return tensors

    with d.attach(pipe, CACHES[name](pipe), LITE) as attachment:
        (lite,) = [handler for handler in attachment.engine.handlers if isinstance(handler.settings, d.LiteAttention)]
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
        ("FluxImg2ImgPipeline", hooks.FirstBlockCacheConfig(threshold=1e9)),
        ("FluxKontextPipeline", hooks.TaylorSeerCacheConfig(disable_cache_before_step=1)),
    ],
)
def test_pipelines_without_contexts_are_given_some(name, config):
    pipe, call = stock_pipeline(name)
    with d.attach(pipe, config) as attachment:
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
DELTA = (d.SparseD(block_size=16, density=0.5, dense_steps=0, dense_layers=0), d.DeltaAttention(reuse=2))


@pytest.mark.parametrize("methods", [(), (LITE,), DELTA], ids=["alone", "lite", "delta"])
def test_faster_cache_leaves_a_branch_out_and_both_batches_keep_their_own_state(methods):
    pipe, call = stock_pipeline("CogVideoXPipeline")
    native, _ = stock_pipeline("CogVideoXPipeline")
    call.update(num_inference_steps=8, output_type="latent")
    faster = hooks.FasterCacheConfig(**FASTER, current_timestep_callback=lambda: pipe.current_timestep)
    with d.attach(pipe, faster, *methods, preset="none") as attachment, recorded(attachment) as calls:
        first = run_stock(pipe, call)
        ran, of = counted(attachment)
        assert 0 < ran < of
        of_first = list(calls)
        assert torch.equal(run_stock(pipe, call), first)
    if methods:
        assert {len(one.q) for one in of_first} == {1, 2}
    for batch in (1, 2) if methods == (LITE,) else ():
        exact = [unpack_bits(one.exact, -(-one.k.shape[2] // 16)) for one in of_first if len(one.q) == batch]
        assert exact[0].all()
        assert not exact[-1].all()
    native.transformer.enable_cache(faster)
    pipe = native  # whose timestep the config asks for
    with d.attach(native, *methods, preset="none"):
        assert torch.equal(run_stock(native, call), first)


def test_the_text_cache_changes_nothing():
    pipe, call = stock_pipeline("NucleusMoEImagePipeline")
    plain = run_stock(pipe, call)
    with d.attach(pipe, hooks.TextKVCacheConfig()):
        torch.testing.assert_close(run_stock(pipe, call), plain)
    assert torch.equal(run_stock(pipe, call), plain)


# Weights that are stored in fewer bits or cast layer by layer, and files of weights that are refused

EVERYWHERE = dict(block_size=16, dense_steps=0, dense_layers=0)
ON_WEIGHTS = {
    "radial, pooled": (d.RadialAttention(decay_factor=0.2, near="half", sink=False, rest="pooled", **EVERYWHERE),),
    "lite": (d.LiteAttention(threshold=-0.05, **EVERYWHERE),),
    "softpag": (d.SoftPAG(heads="L1H1", scale=1.0),),
    "caches": (d.EasyCache(threshold=1e9, warmup_steps=1, max_consecutive=1),),
    "block caches": (d.FirstBlockCache(threshold=1e9, warmup_steps=1, max_consecutive=1),),
}
SIZES = dict(num_attention_heads=2, attention_head_dim=32, ffn_dim=128)


def cast_by_layer(_folder, transformer=None):
    transformer = transformer or tiny_transformer(**SIZES)
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return transformer


def by_torchao(folder):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig

    return loaded(folder, TorchAoConfig(Int8WeightOnlyConfig()))


def by_bitsandbytes(folder):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return loaded(folder, BitsAndBytesConfig(**config))


def loaded(folder, config):
    tiny_transformer(**SIZES).save_pretrained(folder)
    return WanTransformer3DModel.from_pretrained(folder, quantization_config=config, torch_dtype=torch.float32).eval()


def kept(transformer):
    """What each weight is kept as: its class and format."""
    return {name: (type(weight), weight.dtype) for name, weight in transformer.named_parameters()}


@pytest.mark.parametrize("make", [cast_by_layer, by_torchao, pytest.param(by_bitsandbytes, marks=pytest.mark.gpu)])
def test_methods_act_and_leave_no_trace(tmp_path, make):
    transformer = make(tmp_path)
    before, plain = kept(transformer), denoise(transformer)
    assert before != kept(tiny_transformer(**SIZES))
    for name, methods in ON_WEIGHTS.items():
        with d.attach(transformer, *methods, preset="none"):
            out = denoise(transformer)
        assert out.isfinite().all(), name
        assert not torch.equal(out, plain), name
        assert torch.equal(denoise(transformer), plain), name
        assert kept(transformer) == before, name


@pytest.mark.parametrize("name", ["lite", "block caches"])
def test_casting_by_layer_may_come_after_attaching(name):
    expected, transformer = cast_by_layer(None), tiny_transformer(**SIZES)
    with d.attach(expected, *ON_WEIGHTS[name], preset="none"):
        wanted = denoise(expected)
    with d.attach(transformer, *ON_WEIGHTS[name], preset="none"):
        cast_by_layer(None, transformer)
        assert torch.equal(denoise(transformer), wanted)
    assert torch.equal(denoise(transformer), denoise(expected))


PICKLES = {"text_encoder": "pytorch_model.bin", "transformer": "diffusion_pytorch_model.bin"}


def test_weights_in_torch_files_are_refused(tmp_path):
    refused = pytest.raises((d.UnsupportedModel, d.ConfigError), match="safetensors")
    for part, name in PICKLES.items():
        folder = shutil.copytree(model_path("flux-tiny"), tmp_path / part)
        (file,) = (folder / part).glob("*.safetensors")
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
        with refused:
            open_pipeline(str(folder), dtype="float32")
    transformer = tiny_transformer(**SIZES)
    with refused:
        d.attach(transformer, d.AutoGuidance(weak=str(tmp_path / "transformer/transformer")))
    torch.save({}, tmp_path / "lora.bin")
    for path in (tmp_path / "lora.bin", tmp_path):
        with refused:
            check_lora(str(path))
