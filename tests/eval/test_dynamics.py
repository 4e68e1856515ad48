"""Dynamics: a method that freezes motion gains PSNR, and is seen."""

from pathlib import Path

import numpy as np
import pytest
from dit_accel_eval.comparing import arms_table
from dit_accel_eval.metrics.metric import Clip, Sample
from dit_accel_eval.metrics.pixels import psnr
from dit_accel_eval.metrics.registered import dynamics
from dit_accel_eval.report import writing
from dit_accel_eval.report.lines import read_results
from dit_accel_eval.report.report import suite_report
from dit_accel_eval.report.writing import page
from dit_accel_eval.runs.results import read_lines
from fake_model import written

LINES = Path(__file__).parents[2] / "eval" / "results" / "sparse-wan-tiny.jsonl"
CLIPS, KINDS = 6, ("late", "still", "unsteady")


def moving(seed: int, start: int, step: int = 3) -> Clip:
    """Return 9 frames in which blocks of a random texture go right, from so many pixels on."""
    texture = np.random.default_rng(seed).random((8, 16, 3), dtype=np.float32).repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(texture, start + step * frame, 1)[:, :64] for frame in range(9)])


def changed(reference: Clip, seed: int) -> dict[str, Clip]:
    """Return how three methods change a clip: its motion is late, it stands still at its mean, it flickers."""
    late, still = moving(seed, 4), np.repeat(reference.mean(0, keepdims=True), len(reference), 0)
    steps = np.linspace(0, 0.2, len(reference), dtype=np.float32) * (-1) ** np.arange(len(reference))
    return {"late": late, "still": still, "unsteady": (reference * 0.6 + 0.2 + steps[:, None, None, None]).clip(0, 1)}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report whose arms' dynamics and PSNR are those of such clips."""
    raw = [line for line in read_lines(LINES) if line["clip"] < CLIPS]
    arms = dict.fromkeys(line["arm"] for line in raw if line["methods"])
    names = dict(zip(arms, KINDS, strict=False))
    lines = []
    for line in raw:
        line["arm"] = names.get(line["arm"], line["arm"])
        if line["arm"] in names.values():
            reference = moving(line["clip"], 0)
            clip = changed(reference, line["clip"])[line["arm"]]
            line |= {"psnr": psnr(clip, reference), "dynamics": dynamics(Sample(frames=clip, reference=reference))}
        lines.append(line)
    return suite_report(read_results(written(tmp_path_factory.mktemp("moved") / "m.jsonl", lines)))


def test_a_frozen_clip_gains_psnr_and_is_told(report):
    arms = {arm.name: arm for arm in report.arms}
    assert arms["still"].psnr.mean > arms["late"].psnr.mean
    words = {name: [arms[name].dynamic_words(metric) for metric in arms[name].dynamics] for name in KINDS}
    assert words["still"] == ["moves less", "changes less"]
    assert words["late"] == ["open", "open"]
    assert words["unsteady"][1] == "flickers more"
    assert arms["still"].dynamics["dynamic@dis"].mean == -100
    [warning] = [text for text in report.warnings if "still moves less (dynamic degree -100.0 points)" in text]
    assert "late" not in warning


def test_every_table_of_verdicts_has_it(report):
    row = next(line for line in writing.markdown_text(report).splitlines() if line.startswith("| still |"))
    assert "| -100.0 [-100.0, -100.0] moves less |" in row
    assert "moves less</small>" in page(report)
    heads = [column.header for column in arms_table(report).columns]
    assert "dynamic degree, flicker score" in heads
    [arm] = [arm for arm in writing.data_of(report)["arms"] if arm["name"] == "still"]
    assert arm["dynamics"]["dynamic@dis"]["verdict"] == "behind"


def test_pictures_and_clips_without_a_reference_have_none():
    clip = moving(0, 0)
    assert not dynamics(Sample(frames=clip))
    assert not dynamics(Sample(frames=clip[:1], reference=clip[:1]))
    assert [*dynamics(Sample(frames=clip[:, :8, :8], reference=clip[:, :8, :8]))] == ["flickering"]  # too small for DIS
