"""The timing of denoising runs every arm, pairs it with the dense one and writes a table."""

import json

import denoising_time
import pytest
import torch


@pytest.fixture
def own_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_every_arm_is_timed_against_the_dense_one(tmp_path, capsys, own_threads, monkeypatch):
    monkeypatch.setattr(denoising_time, "THRESHOLDS", (-6.0, -0.1))
    out = tmp_path / "results" / "times.jsonl"
    sizes = ["--num-frames", "9", "--steps", "4", "--rounds", "1", "--block-size", "16", "--threads", "1"]
    assert denoising_time.main([*sizes, "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["arm"] for row in rows] == ["dense", "dense, 2 steps", "threshold -6", "threshold -0.1"]
    assert [row["density"] for row in rows[:2]] == [1.0, 1.0]
    assert 1.0 > rows[2]["density"] > rows[3]["density"] > 0.3  # one step dense by choice, one by design
    assert (rows[0]["time"], rows[0]["distance"]) == (1.0, 0.0)
    assert 0 < rows[2]["distance"] < rows[3]["distance"]
    assert rows[1]["distance"] > 0
    assert {row["tokens"] for row in rows} == {320}
    printed = capsys.readouterr().out
    assert "320 tokens (9 frames), 4 steps, tiles of 16, 1 threads" in printed
    assert denoising_time.main(["--table", "--out", str(out)]) == 0
    assert capsys.readouterr().out == printed
