"""The clips beside a report's page: files that browsers play, put there whole; a generation's report as a picture."""

import json
import math
import tomllib
from dataclasses import replace
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path
from unittest.mock import DEFAULT, Mock
from urllib.parse import unquote

import numpy as np
import pytest
from dit_accel_eval.report import heat_map, media
from dit_accel_eval.report.heat_map import report_html, write_heat_map
from dit_accel_eval.report.media import folder_of, kept_lines
from dit_accel_eval.report.report import quantile_clips
from dit_accel_eval.runs import results
from dit_accel_pipelines.generation.media import read_image, read_video
from fake_model import EARLIER, command, refuses, report_of, written
from PIL import Image

from dit_accel.errors import ConfigError, MissingBackend
from dit_accel.methods.caches.log import CachedForward, section_of
from dit_accel.methods.guidance.log import strips_of
from dit_accel.report import report as of_report
from dit_accel.report.clock import TimedForward, Timing
from dit_accel.report.report import CallReport, PredictedSpeedup, Report, StepReport
from dit_accel.report.sections import Section

ARMS = ("easycache hold 14", "sol 12", "unipc 8", "unipc 9", "unipc 11")


run = partial(command, "report")


def kept(folder: Path, frames: int = 3, clips: int = 2) -> Path:
    """Write result lines of which the frames of every run are kept, 64 x 48 pixels, each run of one grey."""
    lines = [line for line in results.read_lines(EARLIER) if line["arm"] in ARMS and line["clip"] < clips]
    for line in lines:
        paths = {key: results.kept_path(Path("frames"), name, line["clip"])
                 for key, name in (("kept", line["arm"]), ("kept_reference", results.REFERENCE))}  # fmt: skip
        grey = {"kept": (10 + 2 * ARMS.index(line["arm"])) / 100, "kept_reference": 0.1 + line["clip"] / 2}
        made = {"kept": results.run_of(line), "kept_reference": results.reference_of(line)}
        for key, path in paths.items():
            results.keep(folder / path, np.full((frames, 48, 64, 3), grey[key], np.float32), made[key])
        line |= {key: path.as_posix() for key, path in paths.items()}
    return written(folder / "r.jsonl", lines)


def data_of(page: Path) -> dict:
    """Return the data of a page's script."""
    _, _, rest = page.read_text().partition('<script type="application/json" id="data">')
    return json.loads(rest.partition("</script>")[0])


def test_frames_are_kept_without_loss_and_known_by_what_made_them(tmp_path):
    clip = (np.arange(5 * 4 * 6 * 3) % 256).reshape(5, 4, 6, 3).astype(np.float32) / 255
    line = results.read_lines(EARLIER)[0]
    results.keep(tmp_path / "a.png", clip, results.run_of(line))
    assert np.array_equal(results.read_kept(tmp_path / "a.png", results.run_of(line)), np.round(clip * 255))
    with pytest.raises(ConfigError, match=r"weights '.*', not 'other'"):
        results.read_kept(tmp_path / "a.png", results.run_of({**line, "weights": "other"}))
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    for name in ("b.png", "none.png"):
        with pytest.raises(ConfigError, match=r"no frames.*read"):
            results.read_kept(tmp_path / name, results.run_of(line))
    assert results.kept_path(tmp_path, "a, 1", 0) != results.kept_path(tmp_path, "a 1", 0)


def test_a_page_has_its_clips_beside_it(tmp_path):
    page = tmp_path / "my page.html"
    result = run(kept(tmp_path), "-o", page)
    assert (result.exit_code, result.stdout) == (0, f"{page}\n")
    data = data_of(page)
    assert data["root"] == "my%20page.media/"
    folder = tmp_path / unquote(data["root"])
    (part,) = data["parts"]
    arms = {arm["name"]: arm for arm in part["arms"]}
    assert (folder, part["fps"], {*arms}) == (folder_of(page), 8, {*ARMS[:2]})
    assert {(one["frames"], one["width"], one["height"]) for one in part["references"].values()} == {(3, 64, 48)}
    lines = {(line["arm"], line["clip"]): line for line in results.read_lines(tmp_path / "r.jsonl")}
    names = [one["file"] for one in part["references"].values()]
    names += [file for clips in part["rivals"].values() for file in clips.values()]
    for name, arm in arms.items():
        assert set(arm["clips"]) == {"0", "1"}
        for clip, entry in arm["clips"].items():
            names += [entry["own"], entry["difference"]]
            grey, other = 10 + 2 * ARMS.index(name), 10 + 50 * int(clip)
            shown = [np.asarray(frame).mean() / 2.55 for frame in read_video(folder / entry["own"])]
            assert shown == pytest.approx([grey] * 3, abs=1)
            frames = [np.asarray(frame).mean() / 2.55 for frame in read_video(folder / entry["difference"])]
            assert frames == pytest.approx([min(100, 5 * abs(grey - other))] * 3, abs=2)
            near = min((8, 9, 11), key=lambda steps: abs(steps - lines[name, int(clip)]["work"]))
            assert entry["rival"] == f"unipc {near}"
            assert clip in part["rivals"][entry["rival"]]
    posters = [Path(name).with_suffix(".webp").name for name in names]
    assert {one.name for one in folder.iterdir()} == {*names, *posters}
    assert max((folder / name).stat().st_size for name in posters) < 5000
    assert "<video" not in page.read_text()  # none is there before a clip is chosen


def test_pictures_lie_beside_the_page_as_pictures_however_large(tmp_path, monkeypatch):
    page = tmp_path / "r.html"
    path = kept(tmp_path, frames=1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow takes pictures of twice as many for an attack
    assert run(path, "-o", page).exit_code == 0
    assert Image.MAX_IMAGE_PIXELS == 1000
    entry = data_of(page)["parts"][0]["arms"][0]["clips"]["1"]["own"]
    assert entry.endswith(".png")
    monkeypatch.undo()
    assert np.unique(np.asarray(read_image(folder_of(page) / entry))).size == 1


def test_the_hardest_prompts_are_shown_and_all_by_default(tmp_path):
    path = kept(tmp_path)
    found = report_of(path)
    assert set(kept_lines(found, 9)) == {0, 1}
    assert list(kept_lines(found, 1)) == found.worst_first()[:1]
    assert run(path, "-o", tmp_path / "r.html", "--clips", 0).exit_code == 0
    assert not folder_of(tmp_path / "r.html").exists()
    (part,) = data_of(tmp_path / "r.html")["parts"]
    for arm in part["arms"]:
        worst, median = quantile_clips([line for line in found.results.lines if line.arm == arm["name"]])
        assert (arm["worst"], arm["median"], arm["even"]) == (worst.clip, median.clip, True)
        assert worst is median


def test_kept_frames_of_another_run_are_not_shown_but_named(tmp_path):
    path, page = kept(tmp_path), tmp_path / "r.html"
    gone, other = (line for line in results.read_lines(path) if line["arm"] == ARMS[0])
    (tmp_path / gone["kept"]).unlink()
    made = results.run_of({**other, "weights": "other"})
    results.keep(tmp_path / other["kept"], np.zeros((3, 48, 64, 3), np.float32), made)
    assert run(path, "-o", page).exit_code == 0
    text = page.read_text().replace("&#39;", "'")
    assert f"Clip {gone['clip']} of {ARMS[0]} is not shown: {tmp_path / gone['kept']} holds no frames that" in text
    assert f"Clip {other['clip']} of {ARMS[0]} is not shown: " in text
    assert "holds frames of weights 'other', not '2dcea21ec1f8'" in text
    shown = {arm["name"]: set(arm["clips"]) for arm in data_of(page)["parts"][0]["arms"]}
    assert shown == {ARMS[0]: set(), ARMS[1]: {"0", "1"}}


def test_a_folder_that_holds_something_else_is_refused_before_anything_is_encoded(tmp_path, monkeypatch):
    path, page = kept(tmp_path), tmp_path / "r.html"
    monkeypatch.setattr(media, "write_media", None)
    folder_of(page).mkdir()
    (folder_of(page) / "notes.txt").write_text("mine")
    refuses("r.media, which holds 'notes.txt' that no report wrote; move that away", "report", path, "-o", page)
    assert ((folder_of(page) / "notes.txt").read_text(), page.exists()) == ("mine", False)
    (folder_of(page) / "notes.txt").unlink()
    folder_of(page).rmdir()
    folder_of(page).write_text("a file")
    refuses("r.media, which is a file", "report", path, "-o", page)


def test_clips_that_can_not_be_encoded_leave_the_page_and_its_clips_as_they_were(tmp_path, monkeypatch):
    path, page = kept(tmp_path), tmp_path / "r.html"
    assert run(path, "-o", page).exit_code == 0
    before = {one: one.read_bytes() for one in (page, *folder_of(page).iterdir())}
    for line in results.read_lines(path):
        results.keep(tmp_path / line["kept"], np.full((3, 48, 64, 3), 0.7, np.float32), results.run_of(line))

    monkeypatch.setattr(media, "write_media", Mock(side_effect=RuntimeError("ffmpeg ended with exit code 1")))
    said = "a clip of 3 frames of 64 x 48 can't be encoded (ffmpeg ended"
    refuses(said, "report", path, "-o", page, "--json", tmp_path / "r.json")
    assert {one: one.read_bytes() for one in (page, *folder_of(page).iterdir())} == before
    assert not (tmp_path / "r.json").exists()
    assert not [one for one in tmp_path.iterdir() if one.name.startswith(".")]


def test_a_report_that_was_stopped_goes_on_and_clears_up(tmp_path, monkeypatch):
    path, page = kept(tmp_path), tmp_path / "r.html"
    stops = Mock(side_effect=[DEFAULT] * 3 + [KeyboardInterrupt], wraps=media.write_media)
    with monkeypatch.context() as patch:
        patch.setattr(media, "write_media", stops)
        run(path, "-o", page)
    assert not page.exists()
    left = {one.name: one.stat().st_ino for one in folder_of(page).iterdir()}
    assert len(left) == 2 * 3  # whole clips with their posters
    (folder_of(page) / ".dit-accel-piece.mp4").touch()  # of a process that was killed
    (folder_of(page) / "gone-0123456789ab.mp4").touch()
    assert run(path, "-o", page).exit_code == 0
    after = {one.name: one.stat().st_ino for one in folder_of(page).iterdir()}
    assert left.items() <= after.items()
    assert {name[:4] for name in after} == {"clip"}


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
