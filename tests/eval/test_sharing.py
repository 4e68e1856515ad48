"""Results that travel: one file a run by a schema, runs merged into one, all of a folder on a board."""

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest
from dit_accel_eval.report.lines import read_results
from dit_accel_eval.report.report import suite_report
from dit_accel_eval.runs.results import read_lines
from fake_model import EARLIER, command, refuses, report_of, written

RESULTS = Path(__file__).parents[2] / "eval" / "results"
WAN = RESULTS / "profiling-wan-plain.jsonl"
SCHEMA = json.loads((files("dit_accel_eval.report") / "results.schema.json").read_text())
FASTVIDEO = [
    {"video": "a.mp4", "scores": {"common.ssim": {"name": "common.ssim", "score": 0.5, "details": {}}}},
    {"video": "b.mp4", "scores": [{"common.ssim": {"score": 1}, "audio.desync": {"score": None}}]},
]
VBENCH = {"dynamic_degree": [0.5, [{"video_path": "a-0.mp4", "video_results": True}] * 2]}


def travelling(folder: Path, results: Path) -> Path:
    folder.mkdir(exist_ok=True)
    assert command("report", results, "--json", folder / f"{results.stem}.json").exit_code == 0
    return folder / f"{results.stem}.json"


@pytest.mark.parametrize("results", [WAN, EARLIER, RESULTS / "caches-time-wan-tiny.jsonl"], ids=lambda path: path.stem)
def test_a_runs_file_is_valid_by_its_schema_and_read_as_its_lines_are(tmp_path, results):
    jsonschema = pytest.importorskip("jsonschema", reason="checks files against the schema")
    path = travelling(tmp_path, results)
    data = json.loads(path.read_text())
    jsonschema.validate(data, SCHEMA)
    short = data | {"lines": data["lines"][:1]}
    for change in ({"schema": "x"}, {"lines": []}, {"lines": [{"arm": "a"}]}, {"protocol": 1}, {"version": 3}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(short | change, SCHEMA)
    assert read_results(path).lines == read_results(results).lines
    assert command("report", path).stdout == command("report", results).stdout
    for change, message in (({"version": 3}, "version 3 of"), ({"schema": "x"}, "another"), ({"lines": 1}, "is no ")):
        path.write_text(json.dumps(data | change))
        refuses(message, "report", path)


def test_merged_runs_are_judged_together(tmp_path):
    lines = read_lines(RESULTS / "frontier-wan-tiny.jsonl")
    arms = [*dict.fromkeys(line["arm"] for line in lines if line["methods"])][:4]
    dense = [line for line in lines if not line["methods"]]
    of = lambda names: [line for line in lines if line["arm"] in names]  # noqa: E731
    parts = [[line | {"suite": number} for line in of(arms[number::2]) + dense] for number in (0, 1)]
    halves = [written(tmp_path / f"{number}.jsonl", part) for number, part in enumerate(parts)]
    both = tmp_path / "both.json"
    done = command("merge", travelling(tmp_path, halves[0]), halves[1], "-o", both)
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"{both}\n", "")
    whole = report_of(written(tmp_path / "whole.jsonl", of(arms) + dense))
    assert {arm.name: arm for arm in suite_report(read_results(both)).arms} == {arm.name: arm for arm in whole.arms}
    first = lines[0]
    for other, message in (
        ([first | {"weights": "other"}], f"tell clip {first['clip']} of arm '{first['arm']}' otherwise"),
        ([first | {"arm": "mine", "weights": "other"}], "mixes results of several weights"),
        ([first | {"arm": "mine", "prompt": "a cat"}], "and of 'a cat' in "),
    ):
        refuses(
            message, "merge", written(tmp_path / "a.jsonl", lines), written(tmp_path / "b.jsonl", other), "-o", both
        )
    refuses("a merged run is a .json, got c.jsonl", "merge", halves[0], "-o", "c.jsonl")


def test_the_board_shows_all_runs_of_a_folder_and_what_other_tools_say(tmp_path):
    runs = tmp_path / "my runs"
    for results in (WAN, RESULTS / "knee-flux-tiny.jsonl"):
        travelling(runs, results)
    for name, data in (("fast", FASTVIDEO), ("v_eval_results", VBENCH), ("odd", {"a": 1}), ("a.mp4", {"prompt": "x"})):
        (runs / f"{name}.json").write_text(json.dumps(data))
    (runs / "cut.json").write_text('{"schema": ')
    done = command("board", runs, "-o", tmp_path / "board.html")
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path}/board.html\n")
    assert [line.split()[1] for line in done.stderr.splitlines()] == ["cut.json", "odd.json"]
    page = (tmp_path / "board.html").read_text()
    reports = [report_of(path) for path in (WAN, RESULTS / "knee-flux-tiny.jsonl")]
    for arm in reports[0].judged:
        row = page.split(f'<th scope="row" data-v="{arm.name}">')[1].split("</tr>")[0]
        assert f'data-v="{arm.ahead["work"].mean}">{arm.ahead["work"].mean:+.2f}' in row
        assert f'<td class="verdict {arm.ahead["work"].verdict}"' in row
        assert f"{reports[0].full_steps / arm.means['work']:.2f}×<small>by work</small>" in row
    leads = [float(value) for value in re.findall(r'data-name="lead, dB" data-v="([^"]+)"', page)]
    assert len(leads) == sum(len(report.judged) for report in reports)
    assert leads == sorted(leads, reverse=True)
    assert 'href="my%20runs/profiling-wan-plain.json"' in page
    assert page.index("<strong>What may be claimed.</strong>") < page.index('id="runs"')  # the rules are on top
    assert "http" not in page
    for words in ("common.ssim", ">0.75<", "dynamic_degree", ">0.5<", "cut.json: "):
        assert words in page


def test_a_folder_without_runs_has_no_board(tmp_path):
    (tmp_path / "odd.json").write_text("[]")
    for arguments, message in (
        ([tmp_path], "holds no JSON file of a run; write some with eval report --json; odd.json: it is neither"),
        ([tmp_path / "none"], f"there is no folder {tmp_path}/none"),
        ([tmp_path, "-o", "board.txt"], "the board must be a .html, got board.txt"),
    ):
        refuses(message, "board", *arguments)
