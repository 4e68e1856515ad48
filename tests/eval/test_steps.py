"""What each step and stage of a run took: counted where it ran, kept in its line, timed, shown by the report."""

import dataclasses
import json
import mmap
import time

import numpy as np
import pytest
import torch
from dit_accel_eval.report.charts import costs, step_map
from dit_accel_eval.report.lines import read_results
from dit_accel_eval.report.page import page
from dit_accel_eval.report.report import suite_report
from dit_accel_eval.report.writing import data_of
from dit_accel_eval.runs.counting import Counts, work
from dit_accel_eval.runs.loaded import EmbeddedModel
from dit_accel_eval.suites.measuring import _cost
from dit_accel_eval.suites.reference import dense_run
from dit_accel_pipelines.generation.memory import begin_peak, peak_memory
from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.timing import timed_steps

from dit_accel import SolAttention, StaticCache

SMALL = dict(num_frames=5, height=32, width=32)
CACHE = StaticCache(every=2, warmup_steps=1, last_steps=1)


@pytest.fixture(scope="module")
def model():
    return EmbeddedModel("wan-plain", SMALL)


def test_stages_are_timed_apart():
    class Pipe:
        def __call__(self):
            time.sleep(0.03)
            for _ in self.progress_bar([0, 1]):
                time.sleep(0.01)
            time.sleep(0.02)

    pipe, after = Pipe(), []
    with timed_steps(pipe, Stages(quiet=True), lambda: after.append(time.sleep(0.2))) as timings:
        pipe()
    assert len(after) == len(timings.steps) == 2
    assert 0.03 <= timings.text < 0.2
    assert timings.denoise == sum(timings.steps) < 0.2  # what is done after a step is none of it
    assert 0.02 <= timings.decode < 0.2


def test_the_peak_is_of_what_was_held_since_it_was_begun():
    if not begin_peak():
        pytest.skip("the system does not let a process reset its peak")
    with mmap.mmap(-1, 64 << 20) as held:  # an array may come to lie in memory that was freed, but is still held
        held.write(b"1" * (64 << 20))
        large = peak_memory()["host"]
    begin_peak()
    assert peak_memory()["host"] < large - (32 << 20)


def test_every_step_is_counted_where_it_ran(model):
    whole = model.run(0, steps=5, solver="unipc").counts / 5
    made = model.run(0, steps=5, solver="unipc", methods=(CACHE,))
    assert [counts.blocks / whole.blocks for counts, _ in made.by_step] == [1, 0, 1, 0, 1]
    assert sum((counts for counts, _ in made.by_step), Counts(blocks=0, attention=0)) == made.counts
    assert made.times.threads == torch.get_num_threads()
    assert len(made.times.steps) == 5
    assert min(made.times.text, made.times.decode, *made.times.steps) > 0
    assert made.times.steps[1] < min(made.times.steps[0], made.times.steps[2])
    line = _cost(made, whole, model.own_share)
    assert line["step_work"] == [1, 0, 1, 0, 1]
    assert set(line["times"]) == {"threads", "text", "denoise", "decode", "processor", "steps"}


def test_the_steps_work_adds_up_to_the_runs(model):
    sparse = SolAttention(beta=0.4, block_size=16, dense_steps=2, dense_layers=0)
    whole = model.run(0, steps=4, solver="unipc").counts / 4
    made = model.run(0, steps=4, solver="unipc", methods=(sparse,))
    line = _cost(made, whole, model.own_share)
    assert line["step_work"][:2] == [1, 1] > line["step_work"][2:]
    assert sum(line["step_work"]) == pytest.approx(work(made.counts, whole, made.attended, model.own_share), abs=1e-3)
    density = np.array(line["density"], dtype=float)  # nan where a call was dense
    assert density.shape == (4, 6)
    assert np.isnan(density[:2]).all()
    assert (density[2:] < 1).any()
    assert (density[2:] > 0).all()


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
    assert "times" not in _cost(dataclasses.replace(old), old.counts / 2, 0.5)


def written(tmp_path, **changed):
    """Write the lines of two arms on two clips, and of a dense run that tells nothing of its steps."""
    lines = []
    for clip in range(2):
        for arm, work_of in (("whole 4", [1, 1, 1, 1]), ("skips 4", [1, 0, clip, 1])):
            lines.append(line(arm, clip, sum(work_of)) | {
                "step_work": work_of, "peak_memory_bytes": {"host": (300 + clip) << 20},
                "times": {"threads": 1, "text": 0.5, "denoise": 4.0, "decode": 0.25, "steps": [1.0, 1.0, 0.5, 1.5]},
            })  # fmt: skip
        lines.append(line("unipc 4", clip, 4))
    lines[0] |= changed
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def line(arm: str, clip: int, amount: float) -> dict:
    return {
        "arm": arm, "clip": clip, "prompt": f"prompt {clip}", "model": "wan-plain", "weights": "w", "call": {},
        "reference": "r", "reference_steps": 32, "reference_agreement": 50.0, "num_inference_steps": 4,
        "solver": "unipc" if arm == "unipc 4" else "euler", "flow_shift": None, "methods": {}, "psnr": 30.0 + clip,
        "ssim": 0.9, "score": 1.0, "work": amount, "work_real": amount, "attended": 1.0,
    }  # fmt: skip


def test_the_report_shows_steps_and_stages(tmp_path):
    report = suite_report(read_results(written(tmp_path)))
    work = step_map(report)
    assert work.rows == {"whole 4": [1, 1, 1, 1], "skips 4": [1, 0, 0.5, 1]}
    assert (work.ends, work.share(0.5)) == ((0, 1), 0.5)
    stages = {"text": 0.5, "denoise": 4.0, "decode": 0.25, "step": 1.0, "memory": 301.0}
    assert costs(report) == {"whole 4": stages, "skips 4": stages}
    text = page(report)
    assert "Step by step" in text
    assert "on 1 thread, beside whatever" in text
    assert "<td>0.500</td>\n<td>4.00</td>\n<td>1.000</td>\n<td>0.25</td>\n<td>301</td>" in text
    (run, *_) = data_of(report)["arms"][1]["runs"]
    assert (run["step_work"], run["times"]["text"]) == ([1, 1, 1, 1], 0.5)


def test_results_without_steps_are_reported_as_before(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(line(arm, 0, 4)) + "\n" for arm in ("whole 4", "unipc 4")))
    text = page(suite_report(read_results(path)))
    assert "Step by step" not in text
    assert "decoding, s" not in text
