"""`dit-accel eval vbench --videos`: folders, prompts, results as the official code lays them out, and bad input."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_vbench as tiny
from dit_accel_assets.clips import clip_of, draw
from dit_accel_eval.runs.results import read_lines
from dit_accel_eval.vbench import official, run
from dit_accel_eval.vbench.prompts import read_prompts
from dit_accel_eval.vbench.sampling import read_video
from dit_accel_pipelines.generation.media import write_media
from typer.testing import CliRunner

from dit_accel import ConfigError
from dit_accel.cli.app import app

FULL_INFO = [
    {"prompt_en": "a still red circle", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a red circle moving", "dimension": ["subject_consistency", "dynamic_degree", "motion_smoothness"]},
    {"prompt_en": "a red car", "dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}},
    {"prompt_en": "a cat and a dog", "dimension": ["multiple_objects"],
     "auxiliary_info": {"multiple_objects": {"object": "cat and dog"}}},
    {"prompt_en": "alley", "dimension": ["scene", "background_consistency"],
     "auxiliary_info": {"scene": {"scene": {"scene": "dark alley"}}}},
    {"prompt_en": "a cat on the left of a dog", "dimension": ["spatial_relationship"], "auxiliary_info": {
        "spatial_relationship": {"spatial_relationship": {
            "object_a": "cat", "object_b": "dog", "relationship": "on the left of"}}}},
    {"prompt_en": "A person is marching", "dimension": ["human_action"]},
]  # fmt: skip


def vbench(*arguments: str | Path):
    return CliRunner().invoke(app, ["eval", "vbench", *map(str, arguments)])


def told(found) -> str:
    return " ".join(found.stderr.split())


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A folder of two short videos of each prompt."""
    at = tmp_path_factory.mktemp("videos")
    for entry in FULL_INFO:
        for number in range(2):
            _, scene, _ = clip_of(number, frames=1, held_out=True)
            write_media(at / f"{entry['prompt_en']}-{number}.mp4", draw(scene, 9), fps=8)
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

    def start(*arguments: str | Path):
        return vbench("--videos", at, "--samples", 2, "--full-info", tmp_path / "info.json", "--folder",
                      tmp_path / "weights", "-o", tmp_path / "out", *arguments)  # fmt: skip

    return start, tmp_path


def results(at: Path) -> dict:
    return json.loads((at / "out" / "clips_eval_results.json").read_text())


def test_flickering_of_filtered_videos_in_the_official_layout(work):
    start, at = work
    found = start("-d", "temporal_flickering", "--filtered", "--json")
    assert found.exit_code == 0, found.stderr
    assert "1 of 1 prompts of temporal_flickering have fewer than 5 still videos, 0 have none" in told(found)
    score, entries = results(at)["temporal_flickering"]
    paths = [at / "clips" / f"a still red circle-{number}.mp4" for number in range(2)]
    assert [entry["video_path"] for entry in entries] == [str(path) for path in paths]
    for path, entry in zip(paths, entries, strict=True):
        frames = read_video(path).frames.astype(float)
        assert entry["video_results"] == pytest.approx(1 - np.abs(np.diff(frames, axis=0)).mean() / 255)
    assert score == pytest.approx(np.mean([entry["video_results"] for entry in entries]))
    printed = json.loads(found.stdout)
    assert printed["scores"] == {"temporal_flickering": score}
    assert printed["totals"] is None
    info = json.loads((at / "out" / "clips_full_info.json").read_text())
    assert info == [{"prompt_en": "a still red circle", "dimension": ["temporal_flickering"],
                     "video_list": [str(path) for path in paths]}]  # fmt: skip


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
    write_media(path, draw(clip_of(7, frames=1, held_out=True)[1], 9), fps=8)
    read.clear()
    assert start(*arguments).stdout != first
    assert read == ["a still red circle-0.mp4"]
    assert len(read_lines(lines)) == 3


def test_networks_are_asked_by_weights_in_the_folder_and_told_by_hash(work, monkeypatch):
    start, at = work
    tiny.write(at / "weights", monkeypatch, "dino", "clip-b32")
    found = start("-d", "subject_consistency", "-d", "background-consistency", "--json")
    assert found.exit_code == 0, found.stderr
    held = results(at)
    score, entries = held["subject_consistency"]
    assert len(entries) == 2
    weighed = sum(one["video_sim"] for one in entries) / sum(one["cnt_per_video"] for one in entries)
    assert score == pytest.approx(weighed)
    about = json.loads((at / "out" / "clips_about.json").read_text())
    assert re.fullmatch(r"\w{64}", about["subject_consistency"]["networks"]["dino"])


def observed(at: Path, *lines: dict) -> Path:
    path = at / "seen.jsonl"
    path.write_text("".join(json.dumps({"by": "GRiT of 2022"} | line) + "\n" for line in lines))
    return path


def test_dimensions_of_networks_that_run_elsewhere_follow_from_what_they_saw(work):
    start, at = work
    red, blue = [["a red car", "car"]], [["a blue car", "car"]]
    both = [["cat", [0, 0, 10, 10]], ["dog", [20, 0, 30, 10]]]
    seen = observed(
        at,
        *({"video": f"a red car-{n}.mp4", "captions": [red] * (12 + n) + [blue] * (4 - n)} for n in range(2)),
        *({"video": f"a cat and a dog-{n}.mp4", "detections": [both] * 8 + [both[:n]] * 8} for n in range(2)),
        *({"video": f"a cat on the left of a dog-{n}.mp4", "detections": [both] * 4 + [[]] * 12} for n in range(2)),
        *({"video": f"alley-{n}.mp4", "scenes": ["a dark alley"] * 10 + ["an alley"] * 6} for n in range(2)),
        *({"video": f"A person is marching-{n}.mp4", "actions": [["marching", 0.8 + n / 10]]} for n in range(2)),
    )
    names = ("color", "multiple_objects", "spatial_relationship", "scene", "human_action")
    found = start(*(part for name in names for part in ("-d", name)), "--observations", seen, "--json")
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)["scores"] == {
        "color": pytest.approx((12 / 16 + 13 / 16) / 2), "multiple_objects": 0.5, "spatial_relationship": 0.25,
        "scene": 10 / 16, "human_action": 0.5,
    }  # fmt: skip
    about = json.loads((at / "out" / "clips_about.json").read_text())
    assert about["color"] == {"networks": {}, "observed_by": ["GRiT of 2022"], "videos": 2}
    assert results(at)["human_action"][1][1]["video_results"] is True


def test_what_is_asked_and_cannot_be_measured_is_refused_before_anything_runs(work):
    start, at = work
    found = start("-d", "dynamic_degree", "-d", "temporal_flickering", "--filtered")
    assert found.exit_code == 2
    assert f"dynamic_degree can't be measured: raft is missing: put https://dl.dropboxusercontent.com" in told(found)  # noqa: F541
    assert "raft-things.pth" in told(found)
    assert not (at / "out").exists()
    assert "grit is missing: put https://datarelease" in told(start("-d", "color"))
    assert "or bring the captions by GRiT with --observations" in told(start("-d", "color"))


def test_without_names_what_can_be_measured_is_and_the_rest_is_told(work):
    start, at = work
    found = start("--filtered", "--json")
    assert found.exit_code == 0, found.stderr
    assert list(results(at)) == ["temporal_flickering"]
    assert "subject_consistency is left out: dino is missing: put https://dl.fbai" in told(found)
    assert "imaging_quality" not in told(found)  # no prompt of the file serves it
    nothing = start()
    assert nothing.exit_code == 2
    assert "temporal_flickering is measured of videos that stand still, which RAFT tells: raft is" in told(nothing)
    assert json.loads(found.stdout)["totals"] is None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("-d", "temporal_flickring"), "did you mean 'temporal_flickering'?"),
        (("-d", "color", "-d", "color"), "dimension color is given twice"),
        (("-d", "temporal_flickering"), "measured of videos that stand still, which RAFT tells: raft is missing"),
        (("-d", "temporal_flickering", "--prompts", "p.json"), "--prompts tells prompts of one's own; add --custom"),
        (("-d", "temporal_flickering", "--full-info", "none.json"), "prompts none.json can't be read"),
        (("-d", "color", "--observations", "none.jsonl"), "there is no file none.jsonl of observations"),
        (("--totals", "scores.json"), "name either raw scores with --totals or a folder of videos with --videos"),
    ],
)
def test_wrong_arguments_are_refused(work, arguments, text):
    found = work[0](*arguments)
    assert found.exit_code == 2
    assert text in told(found)


def test_a_folder_that_is_not_there_is_told_before_weights_are(tmp_path):
    found = vbench("--videos", tmp_path / "none")
    assert (found.exit_code, f"there is no folder {tmp_path / 'none'}" in told(found)) == (2, True)
    found = vbench("--videos", tmp_path, "--custom", "-d", "temporal_flickering")
    assert "holds no videos: no file that ends in .mp4 or .gif" in told(found)


def test_missing_videos_are_named_by_prompt(work, monkeypatch):
    start, at = work
    tiny.write(at / "weights", monkeypatch, "dino")
    (at / "clips" / "a red circle moving-1.mp4").rename(at / "clips" / "a red circle movng-1.mp4")
    found = start("-d", "subject_consistency")
    assert found.exit_code == 2
    assert "takes 2 videos of each of 1 prompts" in told(found)
    assert "lacks 1 of 2: 'a red circle moving-1.mp4'; the nearest is 'a red circle movng-1.mp4'" in told(found)
    (at / "clips" / "a red circle movng-1.mp4").rename(at / "clips" / "a red circle moving-1.mp4")
    (at / "clips" / "a red circle moving-2.mp4").hardlink_to(at / "clips" / "a red circle moving-1.mp4")
    (at / "clips" / "another-0.mp4").hardlink_to(at / "clips" / "a red circle moving-1.mp4")
    found = start("-d", "subject_consistency")
    assert found.exit_code == 0
    assert "2 videos belong to no prompt, or lie beyond the samples, such as 'a red circle moving-2.mp4'" in told(found)


def test_unusable_videos_are_named_with_the_reason(work, monkeypatch):
    start, at = work
    tiny.write(at / "weights", monkeypatch, "dino")
    path = at / "clips" / "a red circle moving-0.mp4"
    path.unlink()
    write_media(path, np.zeros((1, 64, 64, 3), np.uint8), fps=8)
    found = start("-d", "subject_consistency")
    assert found.exit_code == 2
    assert f"subject_consistency can't be measured of {path}: it takes at least 2 frames, and there are 1" in told(
        found
    )
    path.write_bytes(b"none")
    assert f"video {path} can't be read" in told(start("-d", "subject_consistency"))


def test_videos_of_ones_own_have_prompts_from_their_names_or_a_file(work):
    start, at = work
    for path in (at / "clips").glob("a *.mp4"):
        path.unlink()
    found = start("--custom", "-d", "temporal_flickering", "--json")
    assert found.exit_code == 0
    assert "can't tell flicker from motion" in told(found)
    assert len(results(at)["temporal_flickering"][1]) == 4
    info = json.loads((at / "out" / "clips_full_info.json").read_text())
    assert {entry["prompt_en"] for entry in info} == {"alley", "A person is marching"}
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


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ({"video": "a"}, "line 1 of .* has none of detections, captions, scenes, actions"),
        ({"scenes": []}, "line 1 of .* must name its video"),
        ({"video": "a", "scenes": ["x"] * 15}, "must give scenes of 16 frames, got 15"),
        ({"video": "a", "captions": [["x"]] * 16}, "has captions of another form"),
        ({"video": "a", "detections": [[["cat", [3, 0, 1, 1]]]] * 16}, "has detections of another form"),
        ({"video": "a", "actions": []}, "has actions of another form"),
        ({"video": "b", "scenes": ["x"] * 16}, "no scenes of 'alley-0.mp4' were observed, by Tag2Text"),
    ],
)
def test_wrong_observations_are_refused(work, line, text):
    start, at = work
    found = start("-d", "scene", "--observations", observed(at, line))
    assert found.exit_code == 2
    assert re.search(text, told(found))


@pytest.mark.parametrize(
    ("held", "text"),
    [
        ({}, r"JSON list.*got dict"),
        ([{"prompt": "a"}], r"entry 0.*prompt_en and dimension"),
        ([{"prompt_en": "a", "dimension": []}], "list.*dimensions"),
        (
            [{"prompt_en": "a", "dimension": ["colour"]}],
            r"dimension 'colour'.*'color'",
        ),
        ([{"prompt_en": "a", "dimension": ["color"]}], r"color.*auxiliary_info"),
    ],
)
def test_wrong_prompts_are_refused(tmp_path, held, text):
    (tmp_path / "info.json").write_text(json.dumps(held))
    with pytest.raises(ConfigError, match=text):
        read_prompts(tmp_path / "info.json")


def test_the_static_filter_keeps_the_first_five_still_videos_of_a_prompt(work, monkeypatch):
    """The first by their names as text, as the official filter lists them: -0, -1, -10, -11, -12, -13, -2."""
    start, at = work
    from dit_accel_eval.vbench.networks.loading import Networks

    still = at / "clips" / "a still red circle-1.mp4"
    moves = at / "clips" / "a still red circle-0.mp4"
    for number in range(2, 14):
        (moves.with_name(f"a still red circle-{number}.mp4")).hardlink_to(moves if number in (4, 11) else still)
    monkeypatch.setattr(Networks, "missing", lambda self, names: None)
    monkeypatch.setattr(Networks, "hashes", lambda self, names: dict.fromkeys(names, "0"))
    gone = read_video(moves).frames[0].astype(float)

    def raft(self, one, two):  # whatever shows the first video's ground moves by 9 pixels
        import torch

        moved = float(np.abs(one.permute(1, 2, 0).numpy() - gone).mean()) < 20
        return torch.full((2, 64, 64), 9.0 * moved)

    monkeypatch.setattr(Networks, "raft", raft)
    found = start("-d", "temporal_flickering", "--json")
    assert found.exit_code == 0, found.stderr
    kept = [Path(entry["video_path"]).name for entry in results(at)["temporal_flickering"][1]]
    assert kept == [f"a still red circle-{number}.mp4" for number in (1, 10, 12, 13, 2)]
    lines = [line for line in read_lines(at / "out" / "clips_lines.jsonl") if line["dimension"] == "static_filter"]
    assert [line["value"] for line in lines] == [False, True, True, False, True, True, True]


@pytest.mark.skipif(official.missing() is not None, reason=str(official.missing()))
def test_the_official_prompts_are_those_of_the_package():
    prompts = read_prompts(official.prompts_path())
    assert len(prompts) == 946
    counts = {name: sum(name in one.dimensions for one in prompts) for name in ("color", "human_action", "scene")}
    assert counts == {"color": 85, "human_action": 100, "scene": 86}
    assert all(" and " in one.targets["multiple_objects"] for one in prompts if "multiple_objects" in one.dimensions)


def test_setup_tells_what_is_missing_where_and_its_hash(tmp_path, monkeypatch):
    monkeypatch.setenv("DIT_ACCEL_METRIC_WEIGHTS", str(tmp_path / "none"))
    tiny.write(tmp_path / "weights", monkeypatch, "dino")
    found = CliRunner().invoke(app, ["eval", "setup", "--tier", "2", "--archives", str(tmp_path), "--folder",
                                     str(tmp_path / "weights"), "--json"])  # fmt: skip
    assert found.exit_code == 1
    held = json.loads(found.stdout)
    assert "has no vbench-0.1.5-py3-none-any.whl" in held["package"]
    assert held["weights"]["dino"]["reason"] is None
    assert len(held["weights"]["dino"]["sha256"]) == 64
    lacking = held["weights"]["clip-b32"]
    assert lacking["expected"].startswith("40d36571")
    assert lacking["path"] == str(tmp_path / "weights" / "clip_model" / "ViT-B-32.pt")
    assert f"clip-b32 is missing: put {lacking['source']} at {lacking['path']}" in told(found)
    wrong = CliRunner().invoke(app, ["eval", "setup", "--folder", str(tmp_path)])
    assert "--folder and --hub are for VBench's weights; add --tier 2" in told(wrong)


def test_the_hub_is_asked_for_what_it_has(tmp_path, monkeypatch):
    from dit_accel_eval.vbench import weight_files

    (tmp_path / "fetched").write_bytes(b"weights")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda *which, repo_type: asked.append((*which, repo_type)) or str(tmp_path / "fetched"),
    )
    assert weight_files.from_hub("amt", tmp_path / "to") is None
    assert asked == [("lalala125/AMT", "amt-s.pth", "model")]
    assert (tmp_path / "to" / "amt_model" / "amt-s.pth").read_bytes() == b"weights"
    assert weight_files.from_hub("amt", tmp_path / "to") is None
    assert len(asked) == 1
    assert weight_files.from_hub("tag2text", tmp_path / "to") is None
    assert asked[1:] == [("xinyu1205/recognize-anything", "tag2text_swin_14m.pth", "space")]

    def fails(*which, repo_type):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fails)
    assert "could not be fetched from the hub: no network" in str(weight_files.from_hub("umt", tmp_path / "to"))


def test_files_tell_their_frames_and_rates(tmp_path, kept):
    path = kept / "alley-0.mp4"
    found = read_video(path)
    assert (found.frames.shape, found.fps) == ((9, 64, 64, 3), 8)
    drawn = draw(clip_of(0, frames=1, held_out=True)[1], 9)
    assert np.abs(found.frames.astype(int) - drawn).mean() < 6
    write_media(tmp_path / "a.gif", drawn, fps=10)
    assert (read_video(tmp_path / "a.gif").frames.shape, read_video(tmp_path / "a.gif").fps) == ((9, 64, 64, 3), 10)
    with pytest.raises(ConfigError, match=r"none\.mp4.*\(No such file"):
        read_video(tmp_path / "none.mp4")
