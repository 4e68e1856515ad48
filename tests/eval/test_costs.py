"""What a run took: blocks and attention counted where they ran, work in dense steps, stages timed, and the report."""

import json
import mmap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from dit_accel_eval.report.charts import costs, step_map
from dit_accel_eval.report.writing import data_of, page
from dit_accel_eval.runs.counting import Counter, Counts, attended_share, work
from dit_accel_eval.runs.loaded import EmbeddedModel
from dit_accel_eval.runs.results import read_lines
from dit_accel_eval.suites.measuring import _cost
from dit_accel_eval.suites.reference import dense_run
from dit_accel_pipelines.families.wan import WAN
from dit_accel_pipelines.generation.memory import begin_peak, peak_memory
from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.timing import timed_steps
from fake_model import report_of
from wan_tiny import denoise, tiny_transformer

import dit_accel
from dit_accel import DeltaAttention, RadialAttention, SolAttention, SparseD, StaticCache

RESULTS = Path(__file__).parents[2] / "eval" / "results"
NOTHING = Counts(blocks=0, attention=0)


@pytest.fixture(scope="module")
def model():
    return EmbeddedModel("wan-plain", dict(num_frames=5, height=32, width=32))


def forward(transformer, rows: int = 1) -> None:
    with torch.no_grad(), transformer.cache_context("cond"):
        transformer(torch.ones(rows, 12, 5, 8, 8), torch.full((rows,), 500.0), torch.ones(rows, 6, 64))


def test_blocks_and_attention_that_ran_are_counted_by_rows_whoever_skips_others():
    transformer = tiny_transformer()
    counter, layers = Counter([transformer], WAN), transformer.config.num_layers
    forward(transformer)
    forward(transformer, rows=2)
    assert counter.take() == Counts(blocks=3 * layers, attention=3 * layers)
    assert counter.take() == NOTHING
    with dit_accel.attach(transformer, RadialAttention(block_size=16, dense_steps=0, dense_layers=0)):
        ours = transformer.__dict__["_compiled_call_impl"]  # a step cache of ours never reaches the forward
        transformer.__dict__["_compiled_call_impl"] = lambda *args, **kwargs: None
        forward(transformer)
        transformer.__dict__["_compiled_call_impl"] = ours
        assert counter.take() == NOTHING
    transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    forward(transformer)
    forward(transformer)
    assert counter.take() == Counts(blocks=layers + 1, attention=layers + 1)


def test_a_pooled_tile_is_one_key_and_probes_are_rows():
    transformer, call = tiny_transformer(), {"height": 32, "width": 32, "num_frames": 9}
    options = {"block_size": 16, "density": 0.5, "dense_steps": 0, "dense_layers": 0}

    def run(*methods):
        with dit_accel.attach(transformer, *methods, preset="none") as attachment:
            denoise(transformer)
            report = attachment.report()
        return report, attended_share(report, WAN, WAN.families[-1], call, methods)[0]

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
    assert attended_share(None, WAN, WAN.families[-1], call, []) == (1.0, {})


def test_work_is_in_steps_of_the_dense_model():
    step = Counts(blocks=12, attention=24)
    for blocks, attended, expected in ((120, 1.0, 10), (120, 0.5, 10 * (0.28 + 0.36)), (60, 1.0, 10 * (0.14 + 0.72))):
        assert work(Counts(blocks=blocks, attention=240), step, attended, 0.72) == pytest.approx(expected)
    assert Counts(blocks=120, attention=240) / 10 == step


def test_stages_are_timed_apart_and_what_is_done_after_a_step_is_in_none(monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: 0.0)
    monkeypatch.setattr("dit_accel_pipelines.generation.timing.time", clock)

    class Pipe:
        def __call__(self):
            now[0] += 3
            for _ in self.progress_bar([0, 1]):
                now[0] += 1
            now[0] += 4

    pipe = Pipe()
    with timed_steps(pipe, Stages(quiet=True), lambda: now.append(now.pop() + 20)) as timings:
        pipe()
    assert (timings.text, timings.steps, timings.denoise, timings.decode) == (3, [1, 1], 2, 4)


def test_the_peak_is_of_what_was_held_since_it_was_begun():
    if not begin_peak():
        pytest.skip("the system does not let a process reset its peak")
    with mmap.mmap(-1, 64 << 20) as held:  # an array may come to lie in memory that was freed, but is still held
        held.write(b"1" * (64 << 20))
        large = peak_memory()["host"]
    begin_peak()
    assert peak_memory()["host"] < large - (32 << 20)


def test_every_step_is_counted_where_it_ran_and_adds_up_to_the_runs_work(model):
    cache = StaticCache(every=2, warmup_steps=1, last_steps=1)
    whole = model.run(0, steps=5, solver="unipc").counts / 5
    made = model.run(0, steps=5, solver="unipc", methods=(cache,))
    assert [counts.blocks / whole.blocks for counts, _ in made.by_step] == [1, 0, 1, 0, 1]
    assert sum((counts for counts, _ in made.by_step), NOTHING) == made.counts
    line = _cost(made, whole, model.own_share)
    assert line["step_work"] == [1, 0, 1, 0, 1]
    assert set(line["times"]) == {"threads", "text", "denoise", "decode", "processor", "steps"}
    sparse = SolAttention(beta=0.4, block_size=16, dense_steps=2, dense_layers=0)
    made = model.run(0, steps=4, solver="unipc", methods=(sparse,))
    line = _cost(made, whole, model.own_share)
    assert line["step_work"][:2] == [1, 1] > line["step_work"][2:]
    assert sum(line["step_work"]) == pytest.approx(work(made.counts, whole, made.attended, model.own_share), abs=1e-3)
    density = np.array(line["density"], dtype=float)  # nan where a call was dense
    assert density.shape == (4, 6)
    assert np.isnan(density[:2]).all()
    assert ((density[2:] > 0) & (density[2:] <= 1)).all()
    assert density[2:].min() < 1


def test_dense_runs_keep_their_times_and_earlier_ones_have_none(model, tmp_path):
    first, again = (dense_run(model, 0, 2, tmp_path) for _ in range(2))
    assert first.times == again.times is not None
    assert [share for _, share in first.by_step] == [1.0, 1.0]
    (path,) = tmp_path.iterdir()
    with np.load(path) as saved:
        frames, meta = saved["frames"], json.loads(str(saved["meta"]))
    np.savez(path, frames=frames, meta=json.dumps({key: meta[key] for key in ("setting", "counts")}))
    old = dense_run(model, 0, 2, tmp_path)
    assert (old.times, old.memory, old.counts) == (None, None, first.counts)
    assert "times" not in _cost(old, old.counts / 2, 0.5)


def test_the_report_shows_steps_and_stages_where_lines_tell_them():
    timed, untimed = (RESULTS / f"{name}.jsonl" for name in ("schedules-wan-tiny", "profiling-wan-plain"))
    report, lines = report_of(timed), read_lines(timed)
    shown, text = step_map(report), page(report)
    for name, row in shown.rows.items():
        own = [line for line in lines if line["arm"] == name]
        assert row == pytest.approx(np.mean([line["step_work"] for line in own], 0))
        stages = {one: np.mean([line["times"][one] for line in own]) for one in ("text", "denoise", "decode")}
        stages["step"] = np.median([seconds for line in own for seconds in line["times"]["steps"]])
        stages["memory"] = max(line["peak_memory_bytes"]["host"] for line in own) / 2**20
        assert costs(report)[name] == pytest.approx(stages)
        assert f"<td>{stages['step']:.3f}</td>\n<td>{stages['decode']:.2f}</td>" in text
    assert "Step by step" in text
    assert "on 1 thread, beside whatever" in text
    run = next(line for line in data_of(report)["lines"] if line["arm"] == name)
    assert (run["step_work"], run["times"]["text"]) == (own[0]["step_work"], own[0]["times"]["text"])
    text = page(report_of(untimed))
    assert "Step by step" not in text
    assert "decoding, s" not in text
