"""The pictures of what was tuned: of the committed profile and search, of a curve, and what is refused."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tuning_plots import curve, heat_map, main

RESULTS = Path(__file__).parents[2] / "eval/results"


def test_the_heat_map_has_a_panel_a_criterion_and_marks_the_cached_blocks():
    profile = json.loads((RESULTS / "profile-wan-plain.json").read_text())
    panels = [axis for axis in heat_map(profile).axes if axis.get_title()]
    assert [axis.get_title() for axis in panels] == [f"transformer: {name}" for name in ("attention", "delta", "error")]
    marked = {axis.get_title(): [int(text.get_position()[1]) for text in axis.texts] for axis in panels}
    assert marked["transformer: error"] == profile["transformers"]["transformer"]["cached"]
    assert marked["transformer: delta"] == []


def test_a_curve_has_its_period_s_multiples():
    found = {"model": "m", "frames": 34, "curve": [1.0] * 34, "found": {"periods": [40.0, 13.5], "dominant": 1}}
    (axis,) = curve(found).axes
    assert [line.get_xdata()[0] for line in axis.lines[1:]] == [13.5, 27.0]


@pytest.mark.parametrize("name", ["tuned-flux-tiny.runs.jsonl", "profile-flux-tiny.json"])
def test_a_file_is_drawn(name, tmp_path):
    assert main([str(RESULTS / name), str(tmp_path / "a.png")]) == 0
    assert Image.open(tmp_path / "a.png").size[0] > 200


@pytest.mark.parametrize("text", ["{}", "no JSON"])
def test_what_is_no_such_file_is_refused(text, tmp_path, capsys):
    (tmp_path / "a.json").write_text(text)
    assert main([str(tmp_path / "a.json"), str(tmp_path / "a.png")]) == 2
    assert capsys.readouterr().err
    (tmp_path / "a.jsonl").write_text("")
    assert main([str(tmp_path / "a.jsonl"), str(tmp_path / "a.png")]) == 2
    assert "no setting on all of prompts 64 to 69" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
