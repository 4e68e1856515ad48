"""`dit-accel eval vbench --videos`: folders, prompts, results as the official code lays them out, and bad input."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from dit_accel_eval.metrics.openclip import Weighted
from dit_accel_eval.runs.results import read_lines
from dit_accel_eval.vbench import measures, official, run
from dit_accel_eval.vbench.prompts import read_full_info
from dit_accel_pipelines.generation.media import read_video, write_media
from drawn_model import drawn
from fake_model import command, told
from tiny_vbench import MODEL, frames_of, weights

from dit_accel import ConfigError

FULL_INFO = [
    {"prompt_en": "a still red circle", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a red circle moving", "dimension": ["subject_consistency", "dynamic_degree"]},
    {"prompt_en": "alley", "dimension": ["background_consistency"]},
    {"prompt_en": "a kite, oil", "dimension": ["appearance_style"],
     "auxiliary_info": {"appearance_style": {"appearance_style": "oil painting"}}},
]  # fmt: skip


vbench = partial(command, "vbench")


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A folder of two short videos of each prompt."""
    at = tmp_path_factory.mktemp("videos")
    for entry in FULL_INFO:
        for number in range(2):
            write_media(at / f"{entry['prompt_en']}-{number}.mp4", drawn(number), fps=8)
    return at


@pytest.fixture
def work(tmp_path, kept, monkeypatch):
    """Run over a copy of those videos, with results in a folder of its own; returns the function and the folder."""
    at = tmp_path / "clips"
    at.mkdir()
    for path in kept.iterdir():
        (at / path.name).hardlink_to(path)
    (tmp_path / "info.json").write_text(json.dumps(FULL_INFO))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("DIT_ACCEL_METRIC_WEIGHTS", str(tmp_path / "weights"))

    def start(*arguments: str | Path):
        return vbench("--videos", at, "--samples", 2, "--full-info", tmp_path / "info.json", "-o", tmp_path / "out",
                      *arguments)  # fmt: skip

    return start, tmp_path


def results(at: Path) -> dict:
    return json.loads((at / "out" / "clips_eval_results.json").read_text())


def test_flickering_of_filtered_videos_in_the_official_layout(work):
    start, at = work
    found = start("-d", "temporal_flickering", "--filtered", "--json")
    assert found.exit_code == 0, found.stderr
    assert "1 of 1 prompts of temporal_flickering have fewer than 5 videos, 0 have none" in told(found)
    score, entries = results(at)["temporal_flickering"]
    paths = [at / "clips" / f"a still red circle-{number}.mp4" for number in range(2)]
    assert [entry["video_path"] for entry in entries] == [str(path) for path in paths]
    for path, entry in zip(paths, entries, strict=True):
        frames = frames_of(path).astype(float)
        assert entry["video_results"] == pytest.approx(1 - np.abs(np.diff(frames, axis=0)).mean() / 255)
    assert score == pytest.approx(np.mean([entry["video_results"] for entry in entries]))
    printed = json.loads(found.stdout)
    assert printed["scores"] == {"temporal_flickering": score}
    assert printed["totals"] is None
    info = json.loads((at / "out" / "clips_full_info.json").read_text())
    assert info == [{"prompt_en": "a still red circle", "dimension": ["temporal_flickering"],
                     "video_list": [str(path) for path in paths]}]  # fmt: skip
    about = json.loads((at / "out" / "clips_about.json").read_text())
    assert about == {"temporal_flickering": {"networks": {}, "videos": 2}}
    for path in paths:
        path.unlink()
    assert "there are no still videos of temporal_flickering" in told(start("-d", "temporal_flickering", "--filtered"))


def test_a_run_goes_on_where_it_stopped_and_notes_files_that_changed(work, monkeypatch):
    start, at = work
    read = []
    monkeypatch.setattr(run, "read_video", lambda path: read.append(path.name) or read_video(path))
    arguments = ("-d", "temporal_flickering", "--filtered", "--json")
    first = start(*arguments).stdout
    lines = at / "out" / "clips_lines.jsonl"
    lines.write_text(lines.read_text().splitlines()[0] + "\n")  # stopped after one
    read.clear()
    assert start(*arguments).stdout == first
    assert read == ["a still red circle-1.mp4"]
    path = at / "clips" / "a still red circle-0.mp4"
    path.unlink()
    write_media(path, drawn(7), fps=8)
    read.clear()
    assert start(*arguments).stdout != first
    assert read == ["a still red circle-0.mp4"]
    assert len(read_lines(lines)) == 3


def test_clips_dimensions_are_measured_by_its_weights_and_told_by_hash(work, monkeypatch):
    start, at = work
    by = Weighted(MODEL, file=weights(at))
    monkeypatch.setattr(measures, "BASE", by)
    for name in ("background_consistency", "appearance_style"):
        monkeypatch.setitem(measures.WAYS, name, replace(measures.WAYS[name], clip=by))
    found = start("-d", "background-consistency", "-d", "appearance style", "--json")
    assert found.exit_code == 0, found.stderr
    score, entries = results(at)["background_consistency"]
    assert len(entries) == 2
    weighed = sum(one["video_sim"] for one in entries) / sum(one["cnt_per_video"] for one in entries)
    assert score == pytest.approx(weighed)
    assert len(results(at)["appearance_style"][1][0]["frame_results"]) == 9
    about = json.loads((at / "out" / "clips_about.json").read_text())
    assert len(about["appearance_style"]["networks"][str(by)]) == 64


def test_what_can_not_be_measured_is_told_with_who_measures_it_and_refused_where_it_is_named(work):
    start, at = work
    found = start("-d", "dynamic_degree", "-d", "subject_consistency", "-d", "temporal_flickering", "--filtered")
    elsewhere = "dynamic_degree, subject_consistency can't be measured here; --official ENV measures them by the vbench"
    assert (found.exit_code, elsewhere in told(found), (at / "out").exists()) == (2, True, False)
    found = start("--filtered", "--json")
    assert found.exit_code == 0, found.stderr
    assert list(results(at)) == ["temporal_flickering"]
    assert "appearance_style can't be measured: the weights of ViT-B-32/openai are not here" in told(found)
    assert "subject_consistency, dynamic_degree can't be measured here; --official ENV" in told(found)
    assert "imaging_quality" not in told(found)  # no prompt of the file serves it
    assert "temporal_flickering can't be measured: it is for videos that stand still" in told(start())


def test_wrong_arguments_are_refused(work):
    for arguments, text in (
        (("-d", "temporal_flickring"), "did you mean 'temporal_flickering'?"),
        (("-d", "color", "-d", "color"), "dimension color is given twice"),
        (("--prompts", "p.json"), "--prompts tells prompts of one's own; add --custom"),
        (("--full-info", "none.json"), "prompts none.json can't be read"),
        (("--folder", "weights"), "--folder is where the vbench package has its weights; add --official"),
        (("--totals", "scores.json"), "name either raw scores with --totals or a folder of videos with --videos"),
        (("--radial",), "a model, its methods, shards and augmented prompts are for making videos; add --generate"),
        (("--videos", "none"), "there is no folder none"),
    ):
        found = work[0](*arguments)
        assert (found.exit_code, text in told(found)) == (2, True)


def test_missing_videos_are_named_by_prompt(work, monkeypatch):
    start, at = work
    monkeypatch.setitem(measures.WAYS, "background_consistency", measures.WAYS["temporal_flickering"])
    (at / "clips" / "alley-1.mp4").rename(at / "clips" / "aley-1.mp4")
    found = start("-d", "background_consistency")
    assert (found.exit_code, "takes 2 videos of each of 1 prompts" in told(found)) == (2, True)
    assert "lacks 1 of 2: 'alley-1.mp4'; generate those" in told(found)
    (at / "clips" / "alley-1.gif").hardlink_to(at / "clips" / "alley-0.mp4")
    (at / "clips" / "alley-0.gif").hardlink_to(at / "clips" / "alley-0.mp4")
    assert "holds 'alley-0' twice, as .mp4 and .gif" in told(start("-d", "background_consistency"))


def test_unusable_videos_are_named_with_the_reason(work):
    start, at = work
    path = at / "clips" / "a still red circle-0.mp4"
    path.unlink()
    write_media(path, np.zeros((1, 64, 64, 3), np.uint8), fps=8)
    found = start("-d", "temporal_flickering", "--filtered")
    assert found.exit_code == 2
    why = f"temporal_flickering can't be measured of {path}: it takes at least 2 frames, and there are 1"
    assert why in told(found)
    path.write_bytes(b"none")
    assert f"video {path} can't be read" in told(start("-d", "temporal_flickering", "--filtered"))


def test_videos_of_ones_own_have_prompts_from_their_names_or_a_file(work):
    start, at = work
    for path in (at / "clips").glob("a *.mp4"):
        path.unlink()
    write_media(at / "clips" / "drawn.gif", drawn(0), fps=10)
    found = start("--custom", "-d", "temporal_flickering", "--json")
    assert found.exit_code == 0, told(found)
    assert "can't tell flicker from motion" in told(found)
    assert len(results(at)["temporal_flickering"][1]) == 3
    info = json.loads((at / "out" / "clips_full_info.json").read_text())
    assert {entry["prompt_en"] for entry in info} == {"alley", "drawn"}
    names = [path.name for path in (at / "clips").iterdir()]
    (at / "p.json").write_text(json.dumps({name: "something else" for name in names}))
    assert start("--custom", "-d", "temporal_flickering", "--prompts", at / "p.json").exit_code == 0
    info = json.loads((at / "out" / "clips_full_info.json").read_text())
    assert {entry["prompt_en"] for entry in info} == {"something else"}
    (at / "p.json").write_text(json.dumps({name: "something else" for name in names[1:]}))
    found = start("--custom", "-d", "temporal_flickering", "--prompts", at / "p.json")
    assert (found.exit_code, f"has no '{names[0]}'" in told(found)) == (2, True)
    blocked = start("--custom", "-d", "scene")
    assert "scene can't be measured of videos of one's own" in told(blocked)


def test_wrong_prompts_are_refused(tmp_path):
    for held, text in (
        ({}, r"JSON list.*got dict"),
        ([{"prompt": "a"}], r"entry 0.*prompt_en and dimension"),
        ([{"prompt_en": "a", "dimension": []}], "list.*dimensions"),
        ([{"prompt_en": "a", "dimension": ["colour"]}], r"dimension 'colour'.*'color'"),
        ([{"prompt_en": "a", "dimension": ["appearance_style"]}], r"appearance_style.*auxiliary_info"),
    ):
        (tmp_path / "info.json").write_text(json.dumps(held))
        with pytest.raises(ConfigError, match=text):
            read_full_info(tmp_path / "info.json")


def test_setup_unpacks_the_prompts_or_tells_why_not(tmp_path, monkeypatch):
    monkeypatch.setenv("DIT_ACCEL_METRIC_WEIGHTS", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="--tier 2"):
        official.prompts_path()
    setup = ("setup", "--tier", "2", "--archives", tmp_path, "--json")
    found = command(*setup)
    assert (found.exit_code, "has no vbench-0.1.5-py3-none-any.whl" in json.loads(found.stdout)["missing"]) == (1, True)
    official.unpacked().parent.mkdir(parents=True)
    official.unpacked().write_text(json.dumps(FULL_INFO))
    found = command(*setup)
    assert (found.exit_code, json.loads(found.stdout)["prompts"]) == (0, str(official.unpacked()))
    assert len(read_full_info(official.prompts_path())) == len(FULL_INFO)
