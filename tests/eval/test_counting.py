"""Counted work: what was skipped is not counted, whoever skips it; a pooled tile is a key; probes are rows."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig, WanTransformer3DModel
from dit_accel_eval.runs.counting import Counter, Counts, attended_share, work
from dit_accel_pipelines.families.wan import WAN
from wan_tiny import denoise, tiny_transformer

import dit_accel
from dit_accel import DeltaAttention, RadialAttention, SparseD

WAN_PLAIN = WAN.families[-1]


def forward(transformer: WanTransformer3DModel, rows: int = 1) -> None:
    with torch.no_grad(), transformer.cache_context("cond"):
        transformer(torch.ones(rows, 12, 5, 8, 8), torch.full((rows,), 500.0), torch.ones(rows, 6, 64))


def test_blocks_and_attention_are_counted_by_rows():
    transformer = tiny_transformer()
    counter, layers = Counter([transformer], WAN), transformer.config.num_layers
    forward(transformer)
    forward(transformer, rows=2)
    assert counter.take() == Counts(blocks=3 * layers, attention=3 * layers)
    assert counter.take() == Counts(blocks=0, attention=0)


def test_what_diffusers_caches_skip_is_not_counted():
    transformer = tiny_transformer()
    counter, layers = Counter([transformer], WAN), transformer.config.num_layers
    transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    forward(transformer)
    forward(transformer)
    assert counter.take() == Counts(blocks=layers + 1, attention=layers + 1)


def test_what_runs_inside_of_a_skipped_call_is_not_counted():
    """As a step cache of ours does, which skips the module's call and so never reaches its forward."""
    transformer = tiny_transformer()
    counter = Counter([transformer], WAN)
    with dit_accel.attach(transformer, RadialAttention(block_size=16, dense_steps=0, dense_layers=0)):
        ours = transformer.__dict__["_compiled_call_impl"]
        transformer.__dict__["_compiled_call_impl"] = lambda *args, **kwargs: None
        forward(transformer)
        transformer.__dict__["_compiled_call_impl"] = ours
        assert counter.take() == Counts(blocks=0, attention=0)
        denoise(transformer, 2)
    assert counter.take() == Counts(blocks=4 * 3, attention=4 * 3)


def test_a_pooled_tile_is_one_key_and_probes_are_rows():
    transformer, call = tiny_transformer(), {"height": 32, "width": 32, "num_frames": 9}
    options = {"block_size": 16, "density": 0.5, "dense_steps": 0, "dense_layers": 0}

    def run(*methods):
        with dit_accel.attach(transformer, *methods, preset="none") as attachment:
            denoise(transformer)
            report = attachment.report()
        return report, attended_share(report, WAN, WAN_PLAIN, call, methods)[0]

    report, skipped = run(SparseD(**options))
    assert skipped == pytest.approx(report.density)
    assert skipped < 1
    report, pooled = run(SparseD(**options, rest="pooled"))
    shares = [step.pooled / 16 * step.sparse_layers / 3 for step in report.steps]
    assert pooled == pytest.approx(report.density + sum(shares) / len(shares))
    assert pooled > report.density
    report, probed = run(SparseD(**options), DeltaAttention(stride=16))
    sparse = sum(step.sparse_layers for step in report.steps) / (3 * len(report.steps))
    assert probed == pytest.approx(report.density + 5 / 80 * sparse)  # 5 rows of 80
    assert attended_share(None, WAN, WAN_PLAIN, call, []) == (1.0, {})


def test_work_is_in_steps_of_the_dense_model():
    step = Counts(blocks=12, attention=24)
    assert work(Counts(blocks=120, attention=240), step, 1.0, 0.72) == pytest.approx(10)
    assert work(Counts(blocks=120, attention=240), step, 0.5, 0.72) == pytest.approx(10 * (0.28 + 0.36))
    assert work(Counts(blocks=60, attention=240), step, 1.0, 0.72) == pytest.approx(10 * (0.14 + 0.72))
    assert Counts(blocks=120, attention=240) / 10 == step
