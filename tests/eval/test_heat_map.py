"""A generation's report as a picture and in a notebook, and how the report finds what draws it."""

import math
import tomllib
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from dit_accel_eval.report import heat_map
from dit_accel_eval.report.heat_map import report_html, write_heat_map
from PIL import Image

from dit_accel.errors import ConfigError, MissingBackend
from dit_accel.methods.caches.log import CachedForward, section_of
from dit_accel.methods.guidance.log import strips_of
from dit_accel.report import report as of_report
from dit_accel.report.clock import TimedForward, Timing
from dit_accel.report.report import CallReport, PredictedSpeedup, Report, StepReport
from dit_accel.report.sections import Section

STEPS = tuple(
    StepReport(
        transformer="transformer", step_index=step, branch=branch, dense_layers=1 if step else 3,
        sparse_layers=2 if step else 0, density=0.5, pooled=0.0,
    )
    for step in (0, 1, 3) for branch in ("cond", "uncond")
)  # fmt: skip
CALLS = tuple(
    CallReport(
        transformer="transformer", step_index=step, branch=branch, layer=layer, density=0.5, pooled=0.0,
        by_head=(0.25, 0.75),
    )
    for step in (1, 3) for branch in ("cond", "uncond") for layer in (1, 2)
)  # fmt: skip
REPORT = Report(methods={"lite": {}}, backend="torch", model={}, steps=STEPS, calls=CALLS)


def test_shares_by_layer_head_and_step():
    shares = heat_map.kept_shares(REPORT, "transformer", "cond")
    assert shares.shape == (3, 2, 4)
    assert shares[1:, :, [1, 3]].tolist() == [[[0.25] * 2, [0.75] * 2]] * 2
    assert np.argwhere(shares == heat_map.STAYED)[:, [0, 2]].tolist() == [
        [0, 0], [0, 1], [0, 3], [0, 0], [0, 1], [0, 3], [1, 0], [1, 0], [2, 0], [2, 0],
    ]  # fmt: skip
    assert np.isnan(shares[:, :, 2]).all()


def test_it_is_a_png_written_whole(tmp_path):
    path = tmp_path / "map.png"
    write_heat_map(REPORT, path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        colours = {pixel[:3] for _, pixel in image.convert("RGB").getcolors(1 << 20)}
    assert (209, 209, 209) in colours  # dense calls, grey
    assert [p.name for p in tmp_path.iterdir()] == ["map.png"]


def bars_of(report, path):
    """Return where the bars of a drawn report's strip begin, and whether a line of what decided is there."""
    write_heat_map(report, path)
    with Image.open(path) as image:
        drawn = np.asarray(image.convert("RGB"))
    bars = (drawn == (0x3B, 0x52, 0x8B)).all(-1)
    line = bars[bars.any(1)][-1]
    return np.flatnonzero(line[1:] & ~line[:-1]), (drawn == (0xD9, 0x5F, 0x02)).all(-1).any()


def test_skipped_steps_and_guidance_stand_below_and_alone(tmp_path):
    forwards = [
        CachedForward(transformer="transformer", step_index=step, branch="cond", reused=step == 2, reason="", value=one)
        for step, one in enumerate([None, 0.3, 0.05, math.nan])
    ]
    section = section_of("easycache", forwards, 0.1)
    (strip,) = section.strips
    assert (strip.steps, strip.reused, strip.threshold) == ((0, 1, 2, 3), (False, False, True, False), 0.1)
    for calls in ((), CALLS):
        starts, decided = bars_of(replace(REPORT, calls=calls, sections=(section,)), tmp_path / "a.png")
        assert (len(starts), decided) == (3, True)  # the third step did not run
        assert starts[2] - starts[1] == pytest.approx(2 * (starts[1] - starts[0]), abs=2)
    log = [("transformer", step, "cond", 0.1 * (1 + step)) for step in range(2)]
    strips = strips_of("perturbed", log, "how far apart")
    assert [(strip.branch, strip.steps, strip.values) for strip in strips] == [("cond", (0, 1), (0.1, 0.2))]
    section = Section(method="pag", title="pag", strips=strips)
    starts, decided = bars_of(replace(REPORT, calls=(), sections=(section,)), tmp_path / "pag.png")
    assert (len(starts), decided) == (2, True)


def test_what_can_t_be_drawn(tmp_path):
    with pytest.raises(ConfigError, match=r"PNG, got .*map\.pdf"):
        write_heat_map(REPORT, tmp_path / "map.pdf")
    with pytest.raises(ConfigError, match=r"nowhere.*folder"):
        write_heat_map(REPORT, tmp_path / "nowhere" / "map.png")
    with pytest.raises(ConfigError, match=r"nothing.*no cache"):
        write_heat_map(Report(methods={}, backend="torch", model={}), tmp_path / "map.png")
    assert not list(tmp_path.iterdir())


def test_the_report_finds_what_draws_it_by_entry_point(monkeypatch, tmp_path):
    group = "dit_accel.drawings"
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    entries = [EntryPoint(name, value, group) for name, value in project["entry-points"][group].items()]

    def declared(group, name):
        return [entry for entry in entries if (entry.group, entry.name) == (group, name)]

    monkeypatch.setattr(of_report, "entry_points", declared)
    REPORT.plot(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size
    assert REPORT._repr_html_() == report_html(REPORT)
    entries.clear()
    assert REPORT._repr_html_() is None
    with pytest.raises(MissingBackend, match=r"plot.*package"):
        REPORT.plot(tmp_path / "other.png")


def test_a_notebook_reads_first_whether_it_helped_and_escapes_the_rest():
    one = dict(transformer="transformer", branch="cond", before=0.0)
    forwards = tuple(
        TimedForward(step_index=step, kind=kind, seconds=seconds, **one)
        for step, (kind, seconds) in enumerate([("dense", 1.0), ("skipped", 0.01)])
    )
    report = replace(REPORT, timing=Timing(forwards), predicted=PredictedSpeedup(speedup=1.8), notes=("a < b",))
    page = report_html(report)
    assert page.startswith("<div><b>measured speed-up: 1.98 of the denoising loop (predicted 1.80); forwards")
    assert "a &lt; b" in page
    assert "color:#" not in page  # the page's own colours, light or dark
    page = report_html(REPORT)
    assert page.startswith("<div><b>lite</b>")
    assert page.count("<tr>") == 1 + len(STEPS)
    assert 'src="data:image/png;base64,iVBOR' in page
    assert "<script" not in page
    assert "&lt;" in report_html(Report(methods={}, backend="a<b", model={}))
