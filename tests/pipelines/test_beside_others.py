"""Methods on pipelines that other libraries act on too, before or after: every cell of the table in docs/beside.md."""

from pathlib import Path

import foreign_processors as foreign
import pytest
import torch
from tiny_stock import run_stock, stock_pipeline

import dit_accel
from dit_accel import ConfigError, EasyCache, FirstBlockCache, RadialAttention, SoftPAG, SparseD, UnsupportedModel

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
