"""VBench's totals: the published rows from their raw scores, and refusals of all that is not whole.

`vbench_rows.csv` holds the leaderboard's rows in percent, as the tables of Goku (arXiv 2502.04896) and Show-o2
(arXiv 2506.15564) give them.
"""

import csv
import json
import math
from pathlib import Path

import pytest
from dit_accel_eval.vbench.dimensions import DIMENSIONS, dimension, totals
from typer.testing import CliRunner

from dit_accel import ConfigError
from dit_accel.cli.app import app

ROWS = list(csv.DictReader(Path(__file__).with_name("vbench_rows.csv").open(encoding="utf-8")))

LOWEST = {name: max(one.least, 0.0) for name, one in DIMENSIONS.items()}


def vbench(*arguments: str | Path):
    return CliRunner().invoke(app, ["eval", "vbench", *map(str, arguments)])


def test_published_totals_follow_from_published_scores():
    assert len(ROWS) == 19
    for row in ROWS:
        found = totals({name: float(row[name]) / 100 for name in DIMENSIONS})
        for name in ("total", "quality", "semantic"):
            # both are rounded to 0.01: a raw score's half step grows by at most 1 / 0.2846 in its range
            assert 100 * getattr(found, name) == pytest.approx(float(row[name]), abs=0.0101), (row["model"], name)


def test_the_rows_tell_wrong_constants():
    row = next(one for one in ROWS if one["model"] == "Gen-2")
    raw = {name: float(row[name]) / 100 for name in DIMENSIONS}
    for name, one in DIMENSIONS.items():
        moved = raw | {name: raw[name] - 0.01}
        change = 100 * (totals(raw).total - totals(moved).total)
        share = 0.8 / 6.5 if one.group == "quality" else 0.2 / 9
        assert change == pytest.approx(share * one.weight / (one.high - one.low)), name


def test_the_ends_of_the_ranges_are_0_and_1():
    low, high = ({name: getattr(one, end) for name, one in DIMENSIONS.items()} for end in ("low", "high"))
    assert (totals(low).total, totals(high).total) == (pytest.approx(0), pytest.approx(1))


def test_the_command_prints_them_of_plain_and_of_official_files(tmp_path):
    row = ROWS[0]
    plain = {name.replace("_", " "): float(row[name]) / 100 for name in DIMENSIONS}
    official = {name: [float(row[name]) / 100, [{"video_path": "a-0.mp4", "video_results": 1}]] for name in DIMENSIONS}
    for scores in (plain, official):
        (tmp_path / "scores.json").write_text(json.dumps(scores))
        found = vbench("--totals", tmp_path / "scores.json", "--json")
        assert found.exit_code == 0, found.stderr
        told = json.loads(found.stdout)
        assert 100 * told["total"] == pytest.approx(float(row["total"]), abs=0.01)
        assert list(told["normalized"]) == list(DIMENSIONS)
    table = vbench("--totals", tmp_path / "scores.json").stdout
    assert f"Quality {row['quality']}" in table
    assert f"Total {row['total']}" in table


def test_a_part_has_no_totals_and_what_is_missing_is_named(tmp_path):
    part = {name: 0.5 for name in DIMENSIONS if name not in ("scene", "color")}
    with pytest.raises(ConfigError, match=r"16 dimensions.*2.*color, scene"):
        totals(part)
    (tmp_path / "part.json").write_text(json.dumps(part))
    found = vbench("--totals", tmp_path / "part.json", "--json")
    assert (found.exit_code, found.stdout) == (2, "")


def test_wrong_names_scores_and_files_are_refused(tmp_path):
    for name, score, said in (
        ("motion_smothness", 0.5, r"dimension 'motion_smothness'.*'motion_smoothness'?"),
        ("subject-consistency", 0.5, r"subject_consistency.*'subject-consistency'"),
        ("scene", 53.2, r"scene.*\[0, 1\].*got 53.2"),
        ("scene", -0.1, r"scene.*\[0, 1\].*got -0.1$"),
        ("temporal_style", -1.5, r"temporal_style.*\[-1, 1\].*got -1.5$"),
        ("scene", 1e9, r"scene.*\[0, 1\].*got 1000000000.0$"),
        ("scene", math.nan, r"scene.*got nan"),
        ("scene", True, r"scene.*got True"),
        ("scene", "0.5", r"scene.*got '0.5'"),
    ):
        with pytest.raises(ConfigError, match=said):
            totals(LOWEST | {name: score})
    for text, said in (
        (None, "can't be read: No such file"),
        ("{", "are not JSON"),
        ("[]", "must be a JSON object dimension -> raw score, got list"),
        ('{"scene": 0.1, "scene": 0.2}', "'scene' is there twice"),
        ('{"scene": []}', "scene must be a number, got []"),
    ):
        (tmp_path / "scores.json").write_text(text) if text else None
        found = vbench("--totals", tmp_path / "scores.json")
        assert (found.exit_code, said in " ".join(found.stderr.split())) == (2, True)


def test_a_dimension_is_found_with_blanks_too():
    assert dimension("Subject Consistency") is DIMENSIONS["subject_consistency"]


def test_the_page_s_own_file_has_the_published_total(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "vbench.md").read_text(encoding="utf-8")
    (tmp_path / "scores.json").write_text(page.partition("```json\n")[2].partition("```")[0])
    found = vbench("--totals", tmp_path / "scores.json")
    assert found.exit_code == 0, found.stderr
    assert "Total 80.27" in found.stdout
