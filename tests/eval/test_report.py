"""The report: figures as the table's, a page that stands alone, errors by name; two results side by side."""

import functools
import json
import math
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from dit_accel_eval.report import writing
from dit_accel_eval.report.charts import forest
from dit_accel_eval.report.report import diff_of
from dit_accel_eval.report.writing import page, score_leads, summary
from dit_accel_eval.runs.results import read_lines, result_lines
from dit_accel_eval.suites.figures import suite_figures, suite_table
from dit_accel_eval.suites.suite import read_suite
from fake_model import EARLIER, command, refuses, report_of, told, written

EVAL = Path(__file__).parents[2] / "eval"
WAN, FLUX = (EVAL / "results" / f"{name}.jsonl" for name in ("profiling-wan-plain", "knee-flux-tiny"))
TAGS_WITHOUT_END = {"meta", "img", "input", "br", "link", "hr"}


run = partial(command, "report")


@functools.cache
def committed():
    return report_of(WAN)


def report(path: Path = WAN):
    return committed() if path == WAN else report_of(path)


def few(tmp_path: Path, name: str, clips: int) -> Path:
    lines = read_lines(EARLIER if name == EARLIER.stem else EVAL / "results" / f"{name}.jsonl")
    return written(tmp_path / f"{name}.jsonl", [line for line in lines if line["clip"] < clips])


class Page(HTMLParser):
    """Reads a page: elements with attributes, texts, and whether every element is closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in TAGS_WITHOUT_END:
            self._open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("li", "dt", "dd"):
            assert self._open[-1] == tag, (self._open, tag)
        self._open.pop()

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def ids(self) -> set[str]:
        """Return the ids, of which none is there twice, and which all links and labels have."""
        ids = [element["id"] for _, element in self.elements if "id" in element]
        assert len(ids) == len({*ids})
        links = {one.get("href", "") for one in self.all("a")}
        labels = {element["aria-labelledby"] for _, element in self.elements if "aria-labelledby" in element}
        assert {link[1:] for link in links if link.startswith("#")} | labels <= {*ids}
        return {*ids}


def test_figures_are_those_of_the_suite_table():
    suite, lines = read_suite(EVAL / "suites" / "profiling-wan-plain.toml"), result_lines(WAN)
    assert {arm.name: arm for arm in report().arms} == {arm.name: arm for arm in suite_figures(suite, lines)}
    rows = set(suite_table(suite, lines).splitlines())
    assert len(rows & set(writing.markdown_text(report()).splitlines())) >= len(report().arms)


def test_several_results_make_one_page(tmp_path):
    text = page(report(), report(FLUX))
    found = Page(text)
    assert found.texts.count("profiling-wan-plain: wan-plain, 4 clips") == 2  # among the suites, and above its part
    assert {"p1-table", "p2-table"} <= found.ids()
    out = tmp_path / "both.html"
    assert run(WAN, FLUX, "-o", out).stdout == f"{out}\n"
    assert out.read_text() == text
    refuses("json holds one file of results, got 2;", "report", WAN, FLUX, "--json", tmp_path / "both.json")
    assert run(WAN, FLUX).stdout.count("| arm |") == 2


def test_json_and_markdown_agree(tmp_path):
    found = report(few(tmp_path, "report-wan-tiny", 6))
    data = writing.data_of(found)
    assert (data["schema"], data["version"]) == ("dit-accel/eval-report", 4)
    rows = {row.split(" | ")[0].strip("| "): row for row in writing.markdown_text(found).splitlines() if "| " in row}
    assert {arm["name"] for arm in data["arms"]} <= {*rows}
    for arm in data["arms"]:
        row, psnr = rows[arm["name"]], arm["psnr"]
        assert f"| {psnr['mean']:.2f}" in row
        values = [line["psnr"] for line in data["lines"] if line["arm"] == arm["name"]]
        assert psnr["mean"] == pytest.approx(np.mean(values))
        assert arm["dense"] == (not arm["against_fewer_steps"])
        for lead in arm["against_fewer_steps"].values():
            assert f"[{lead['low']:+.2f}, {lead['high']:+.2f}] ({lead['median']:+.2f}) {lead['verdict']}" in row
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_the_page_stands_alone_and_can_be_read_by_all(tmp_path):
    text = page(report())
    assert len(text.encode()) < 300_000
    found = Page(text)
    links = [one.get("href", one.get("src", "")) for one in (element for _, element in found.elements)]
    assert all(link.startswith(("#", "data:")) for link in links if link)
    assert "http" not in text.replace("http://www.w3.org", "")
    assert found.ids()
    assert len(found.all("caption")) == len(found.all("table")) == 4
    assert all(head.get("scope") in ("col", "row", "rowgroup") for head in found.all("th"))
    assert all(one.get("aria-label") or one.get("aria-hidden") for one in found.all("svg"))
    assert "open" not in {key for one in found.all("details") for key in one}  # all but the first screen is folded
    assert found.all("html") == [{"lang": "en"}]
    for arm in report().arms:
        assert found.texts.count(arm.name) >= 3  # the tables, what ran
    assert (EVAL / "suites" / "profiling-wan-plain.toml").read_text().strip() in "".join(found.texts)
    commands = "dit-accel eval run profiling-wan-plain.toml --out profiling-wan-plain.jsonl\n"
    assert commands in "".join(found.texts)
    lines = [{**line, "prompt": "<script>alert(1)</script>"} for line in read_lines(WAN) if line["clip"] == 0]
    alone = page(report(written(tmp_path / "profiling-wan-plain.jsonl", lines)))
    assert "It was not found beside the results; <code>--suite FILE</code> names it." in alone
    assert "<script>alert" not in alone
    assert "&lt;script&gt;alert(1)" in alone


def test_warnings_say_what_not_to_believe(tmp_path):
    lines = read_lines(WAN)
    arms = list(dict.fromkeys(line["arm"] for line in lines if line["methods"]))
    lines = [line for line in lines if (line["arm"], line["clip"]) != (arms[0], 1)]
    for line in lines:
        if line["clip"] == 0:
            line |= {"reference_agreement": 41.26, "reference_steps": 256}
        if line["clip"] == 1:
            line |= {"reference_agreement": 20.0, "reference_steps": 256}
            line["reference_confirmed"] = {"steps": 512, "agreement": 68.0}
        if line["clip"] == 2:
            line["torch"] = "9.9"
    path = written(tmp_path / "r.jsonl", lines)
    path.write_text(path.read_text() + '{"arm": "cut')
    found = report(path)
    said = "\n".join(found.warnings)
    clips = len(found.prompts)
    for text in (
        "The last line of the results was cut off",
        f"Clips are missing, so means are not over the same prompts: {arms[0]} ({clips - 2} of {clips - 1}).",
        "Left out, since their references did not converge to 45 dB: clip 0 (256 steps, 41.3 dB).",
        "confirmed: clip 1 (256 steps, 68.0 dB to 512).",
        f"With {clips - 1} clips there is no verdict; it takes 6.",
        "The runs are of several versions of torch: 2.",
    ):
        assert text in said
    assert all(text in page(found).replace("&#39;", "'") for text in found.warnings)


def measured(tmp_path: Path) -> Path:
    """Return results in which the warp error is the PSNR's hundredth of the clip and arm, and no clip has an LPIPS."""
    lines = read_lines(few(tmp_path, "knee-flux-tiny", 6))
    for line in lines:
        line["metrics"] = {"warp-error@dis": line["psnr"] / 100, "mine": 1.0}
        line["by_frame"] = {"psnr": [line["psnr"] + one for one in range(5)]}
        line["skipped" if line["clip"] else "unavailable"] = {"lpips@alex": "there are no weights"}
    return written(tmp_path / "m.jsonl", lines)


def test_further_metrics_have_intervals_and_paired_differences(tmp_path):
    found = report(measured(tmp_path))
    assert found.further == ["warp-error@dis", "mine"]
    arms = [arm for arm in found.arms if not found.is_dense(arm)]
    for arm in arms:
        assert arm.metrics["warp-error@dis"].mean == pytest.approx(arm.psnr.mean / 100)
        assert arm.differences["warp-error@dis"].mean == pytest.approx(arm.ahead["work"].mean / 100)
        assert arm.differences["mine"].mean == 0
    assert f"lpips@alex was skipped on {len(found.prompts)} clips: there are no weights." in found.warnings
    data = writing.data_of(found)
    best = data["arms"][-1]["metrics"]["warp-error@dis"]
    lead = arms[-1].differences["warp-error@dis"].mean
    assert (best["better"], best["against_fewer_steps"]["mean"]) == ("less", lead)
    text = page(found)
    assert "warp error, RMS, DIS, less is better" in Page(text).texts
    assert "warp-error@dis" in writing.markdown_text(found)


def test_results_that_no_report_can_be_true_of(tmp_path):
    lines, path = read_lines(WAN), tmp_path / "r.jsonl"
    first = lines[0]
    for changed, message in (
        ([], "holds no results; fill it with dit-accel eval run"),
        (lines + read_lines(FLUX)[:1], "mixes results of several model: "),
        ([*lines, {**first, "weights": "other"}], "mixes results of several weights: "),
        ([*lines, {**first, "clip": 1, "solver": "euler"}], "with two settings; rename one"),
        ([first, {**lines[1], "psnr": math.nan}], "line 2 has psnr nan, which is no finite number"),
        ([{**first, "methods": []}], "line 1 has methods [], which is no table"),
        ([{**first, "metrics": {"loop": None}}], "line 1 has loop None, which is no finite number"),
        ([first, [1]], "line 2 is '[1]', no object"),
        (read_lines(EVAL / "results" / "longer-wan-tiny.jsonl"), "line 1 lacks psnr, ssim,"),
    ):
        refuses(message, "report", written(path, changed), "-o", tmp_path / "r.html")
        assert not (tmp_path / "r.html").exists()
    for content, message in (
        (b"\xff\xfe\n", "can't be read ('utf-8' codec"),
        (WAN.read_bytes().splitlines()[0] + b"\n{broken\n", "r.jsonl, line 2 is no JSON ("),
    ):
        path.write_bytes(content)
        refuses(message, "report", path)
    refuses("can't be read (No such file or directory); name the file", "report", tmp_path / "none.jsonl")


def test_outputs_that_can_not_be_written_leave_nothing(tmp_path, monkeypatch):
    results, good = tmp_path / "r.jsonl", tmp_path / "r.html"
    results.write_bytes(WAN.read_bytes())
    for option, message in (
        (good, "json would overwrite"),
        (results, "the results that are read; choose another name"),
        (tmp_path, "it is a folder; name a file in it"),
    ):
        refuses(message, "report", results, "-o", good, "--json", option)
        assert not good.exists()
    good.write_text("before")
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    refuses("r.html can't be written (No space left); free some", "report", results, "-o", good)
    assert good.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.jsonl"]


def rows_of(text: str) -> dict[str, list[str]]:
    """Return arm -> the texts of its row of the first table."""
    rows = text[text.index("<tbody>") : text.index("</tbody>")].split("data-arm=")[1:]
    return {row.split('"')[1]: Page("<tr x=" + row.rpartition("</tr>")[0] + "</tr>").texts for row in rows}


def test_the_first_screen_ranks_arms_by_lead_time_and_verdict():
    timed = report(EVAL / "results" / "caches-time-wan-tiny.jsonl")
    assert timed.main == "steps_in_time"
    rows = rows_of(page(timed))
    ours = [arm for arm in timed.arms if not timed.is_dense(arm)]
    assert list(rows) == [one.name for one in sorted(ours, key=lambda one: -one.ahead["steps_in_time"].mean)]
    for arm in ours:
        cells = rows[arm.name]
        lead = arm.ahead["steps_in_time"]
        assert f"{lead.mean:+.2f} ({lead.median:+.2f})" in cells
        assert f"{lead.low:+.2f} to {lead.high:+.2f}" in cells
        assert f"{timed.full_steps / arm.means['steps_in_time']:.2f}×" in cells
        assert lead.verdict in cells
        leads = timed.leads(arm)
        assert np.mean([*leads.values()]) == pytest.approx(lead.mean)
        assert [f"clip {clip}" in cells for clip in leads] == [True] * arm.clips  # a dot a clip
    text = page(timed)
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    for arm, cells in zip(ours, (arm["cells"] for arm in data["parts"][0]["arms"]), strict=True):
        leads = {str(clip): f"{lead:+.2f}" for clip, lead in timed.leads(arm).items()}
        assert {clip: cell["lead"] for clip, cell in cells.items()} == leads  # what is shown of one prompt alone
    drawn = forest(timed)
    for arm in (arm for arm in ours if arm.name in drawn.rows):  # right of the line where the arm is ahead
        row, lead = drawn.rows[arm.name], arm.ahead["steps_in_time"]
        assert (row.mean > drawn.zero, row.ends[0] > drawn.zero) == (lead.mean > 0, lead.low > 0)
    assert "Speed-ups are over 30 dense steps." in text
    assert [text.count(f'<button type="button">speed-up by {unit}<') for unit in ("time", "work")] == [1, 1]
    untimed = page(report())
    assert "Speed-ups are over 12 dense steps; these runs were not timed." in untimed
    assert "speed-up by time" not in untimed


def test_declared_pairs_stand_below_the_first_table_and_say_what_the_judge_sees(tmp_path):
    path = EVAL / "results" / "presets-wan-tiny.jsonl"
    found = report(path)
    assert [str(one.pair) for one in found.pairs] == [
        "careful vs cache-dit, slow", "balanced vs cache-dit, medium", "fast vs cache-dit, 15 of 30",
        "fast vs cache-dit, fast",
    ]  # fmt: skip
    text = page(found)
    table = text.partition('id="pairs">')[2].partition("</table>")[0]
    assert text.index('id="table"') < text.index('id="pairs"') < text.index("<details")
    lines = found.comparison.lines
    for one in found.pairs:
        assert f"{one.ahead.mean:+.2f} ({one.ahead.median:+.2f})<small>{one.ahead.low:+.2f} to " in table
        differences = [lines[one.pair.arm, clip].score - lines[one.pair.against, clip].score for clip in found.prompts]
        assert one.score.mean == pytest.approx(100 * np.mean(differences))
        assert f"{one.score.mean:+.1f} ({one.score.median:+.1f})" in table
    assert "ahead by more than 3 dB" in table
    assert "Pairs declared in the suite, PSNR clip by clip; p by Holm&#39;s rule over 4," in table
    assert first_words(path).startswith("The judge's score can't tell the arms of any declared pair apart (95 % int")
    assert "| careful vs cache-dit, slow | +11.61 [" in writing.markdown_text(found)
    assert writing.data_of(found)["pairs"][0]["pair"]["against"] == "cache-dit, slow"
    assert "[[compare]]" in text


def first_words(path: Path) -> str:
    found = report(path)
    return summary(found, score_leads(found))


def test_pairs_are_those_of_the_suite_that_is_named_or_lies_near(tmp_path):
    suite = EVAL / "suites" / "presets-wan-tiny.toml"
    path = few(tmp_path, "presets-wan-tiny", 51)
    page_of = tmp_path / "r.html"
    assert run(path, "-o", page_of).exit_code == 0
    assert 'id="pairs"' not in page_of.read_text()
    assert run(path, "-o", page_of, "--suite", suite).exit_code == 0
    assert "there is no verdict under 6 clips" in page_of.read_text()
    refuses("--suite 'smoke' is none of presets-wan-tiny, whose", "report", path, "--suite", EVAL / "suites/smoke.toml")
    (tmp_path / "presets-wan-tiny.toml").write_text("version = 2\nname = 3\n")
    assert any("pairs that the suite may declare" in text.lower() for text in report(path).warnings)
    (tmp_path / "presets-wan-tiny.toml").write_text(suite.read_text())
    assert len(report(path).pairs) == 4


@pytest.fixture(scope="module")
def after(tmp_path_factory) -> Path:
    """Results in which one arm is better and cheaper, one gone, one new, and one has fewer clips."""
    lines = []
    for line in read_lines(EARLIER):
        if line["arm"] == "easycache hold 14":
            line |= {"psnr": line["psnr"] + 1 + line["clip"] / 10, "work": 0.5 * line["work"]}
        if line["arm"] == "radial pooled 12":
            line["arm"] = "radial, new"
        if line["arm"] == "sol 12":
            line["psnr"] -= 1
        if line["arm"] != "sol 12" or line["clip"] < 5:
            lines.append({**line, "torch": "9.9"})
    return written(tmp_path_factory.mktemp("diff") / "after.jsonl", lines)


def test_changes_are_paired_by_clip_and_named(after):
    before, then = (report_of(path) for path in (EARLIER, after))
    found = {entry["name"]: entry for entry in diff_of(before, then)}
    assert {name for name in found if name.startswith("unipc")} == set()  # the rivals are not judged
    better = found["easycache hold 14"]
    assert (better["change"], better["clips"]) == ("better", 8)
    assert better["psnr_change"]["mean"] == pytest.approx(1.35)
    assert better["psnr_change"]["low"] > 1
    assert better["after"]["steps"] == pytest.approx(better["before"]["steps"] / 2)
    few = found["sol 12"]
    assert (few["change"], few["clips"], few["after"]["verdict"]) == ("too few", 5, "too few")
    assert few["psnr_change"]["mean"] == pytest.approx(-1)
    assert (found["radial pooled 12"]["after"], found["radial, new"]["before"]) == (None, None)
    assert found["euler 12"]["change"] == "same"
    turned = {entry["name"]: entry for entry in diff_of(then, before)}["easycache hold 14"]
    assert (turned["change"], turned["psnr_change"]["high"]) == ("worse", -better["psnr_change"]["low"])


def test_the_table_has_before_and_after_in_a_cell(after):
    result = command("diff", EARLIER, after)
    assert result.exit_code == 0
    rows = {row.split(" | ")[0].strip("| "): row for row in result.stdout.splitlines()}
    assert "| 30.19 → 31.54 | +1.35 [+1." in rows["easycache hold 14"]
    assert "8.88 → 4.44 (own work)" in rows["easycache hold 14"]
    assert "| 28.19 → 26.16 | -1.00 too few |" in rows["sol 12"]
    assert "| 26.58 → – |  | 11.04 → – (own work) |" in rows["radial pooled 12"]
    assert "| 27.02 | same | 12.00 (own work) |" in rows["euler 12"]
    assert "they differ in more than the arms: torch '2.13.0+cpu', then '9.9'" in told(result)
    assert command("diff", EARLIER, EARLIER).stderr == ""
    data = json.loads(command("diff", EARLIER, after, "--json").stdout)
    assert [entry["name"] for entry in data][-1] == "radial, new"
