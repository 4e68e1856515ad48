"""Two files of results side by side: what changed of each arm, and what else differs."""

import json
from functools import partial
from pathlib import Path

import pytest
from dit_accel_eval.report.diff import diff_of
from dit_accel_eval.runs.results import read_lines
from fake_model import EARLIER, command, report_of, told, written

run = partial(command, "diff")


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
    result = run(EARLIER, after)
    assert result.exit_code == 0
    rows = {row.split(" | ")[0].strip("| "): row for row in result.stdout.splitlines()}
    assert "| 30.19 → 31.54 | +1.35 [+1." in rows["easycache hold 14"]
    assert "8.88 → 4.44 (own work)" in rows["easycache hold 14"]
    assert "| 28.19 → 26.16 | -1.00 too few |" in rows["sol 12"]
    assert "| 26.58 → – |  | 11.04 → – (own work) |" in rows["radial pooled 12"]
    assert "| 27.02 | same | 12.00 (own work) |" in rows["euler 12"]
    assert "they differ in more than the arms: torch '2.13.0+cpu', then '9.9'" in told(result)
    assert run(EARLIER, EARLIER).stderr == ""
    data = json.loads(run(EARLIER, after, "--json").stdout)
    assert [entry["name"] for entry in data][-1] == "radial, new"
