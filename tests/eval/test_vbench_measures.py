"""VBench's dimensions recomputed another way, its published totals, and `eval vbench --videos` over folders."""

import csv
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from dit_accel_eval.metrics import clip_scores
from dit_accel_eval.metrics.openclip import Weighted
from dit_accel_eval.runs.results import read_lines
from dit_accel_eval.vbench import official, run
from dit_accel_eval.vbench.dimensions import DIMENSIONS, Prompt, read_full_info, totals
from dit_accel_eval.vbench.run import WAYS, VideoScore
from dit_accel_pipelines.generation.media import read_video, write_media
from fake_model import command, drawn, refuses, told
from PIL import Image
from tiny_vbench import MODEL, WIDTH, frames_of, weights
from torch.nn import functional as F

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
    monkeypatch.setattr(run, "BASE", by)
    for name in ("background_consistency", "appearance_style"):
        monkeypatch.setitem(run.WAYS, name, replace(run.WAYS[name], clip=by))
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


def test_missing_and_unusable_videos_are_named_with_the_reason(work, monkeypatch):
    start, at = work
    path = at / "clips" / "a still red circle-0.mp4"
    path.unlink()
    write_media(path, np.zeros((1, 64, 64, 3), np.uint8), fps=8)
    why = f"error: temporal_flickering can't be measured of {path}: it takes 2 frames, and there are 1"
    assert why in told(start("-d", "temporal_flickering", "--filtered"))
    path.write_bytes(b"none")
    assert f"video {path} can't be read" in told(start("-d", "temporal_flickering", "--filtered"))
    monkeypatch.setitem(run.WAYS, "background_consistency", run.WAYS["temporal_flickering"])
    (at / "clips" / "alley-1.mp4").rename(at / "clips" / "aley-1.mp4")
    found = start("-d", "background_consistency")
    assert (found.exit_code, "takes 2 videos of each of 1 prompts" in told(found)) == (2, True)
    assert "lacks 1 of 2: 'alley-1.mp4'; generate those" in told(found)
    (at / "clips" / "alley-1.gif").hardlink_to(at / "clips" / "alley-0.mp4")
    (at / "clips" / "alley-0.gif").hardlink_to(at / "clips" / "alley-0.mp4")
    assert "holds 'alley-0' twice, as .mp4 and .gif" in told(start("-d", "background_consistency"))


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
    assert f"has no '{names[0]}'" in told(start("--custom", "-d", "temporal_flickering", "--prompts", at / "p.json"))
    assert "scene can't be measured of one's own videos" in told(start("--custom", "-d", "scene"))


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


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def small(file, tmp_path, monkeypatch):
    """That model and a random head in the places of VBench's."""
    by = Weighted(MODEL, file=file)
    for name in ("BASE", "LARGE"):
        monkeypatch.setattr(run, name, by)
    monkeypatch.setattr(clip_scores, "folder", lambda: tmp_path)
    head = {"weight": torch.randn(1, WIDTH), "bias": torch.randn(1)}
    clip_scores.head_path(by).parent.mkdir(parents=True)
    torch.save(head, clip_scores.head_path(by))
    for name, way in WAYS.items():
        monkeypatch.setitem(WAYS, name, replace(way, clip=way.clip and by, head=way.head and by))
    return by.embedder().network, head


def measured(name: str, frames: np.ndarray, **prompt: str) -> VideoScore:
    assert WAYS[name].missing() is None
    return WAYS[name].measure(frames, Prompt(text="a kite", dimensions=(name,), **prompt))


def seen(network, frames: np.ndarray) -> torch.Tensor:
    """Return embeddings of frames of 60 x 97 pixels, resized as tensors are: 224 x 362, of which 69 lie left."""
    sized = F.interpolate(torch.from_numpy(frames).permute(0, 3, 1, 2).float(), (224, 362), mode="bicubic")
    mean, deviation = (torch.tensor(one)[:, None, None] for one in run.COLORS)
    with torch.inference_mode():
        return F.normalize(network.encode_image((sized[..., 69:293] / 255 - mean) / deviation), dim=1)


def test_aesthetic_quality_is_the_heads_tenth(small):
    network, head = small
    frames = noise(3, 60, 97, 3)
    expected = (seen(network, frames) @ head["weight"][0] + head["bias"]).mean() / 10
    assert measured("aesthetic_quality", frames).value == pytest.approx(float(expected), abs=1e-5)


def test_appearance_style_is_the_likeness_of_frames_that_pillow_resized(small):
    network, _ = small
    frames = noise(2, 60, 97, 3)
    sized = [np.asarray(Image.fromarray(one).resize((362, 224), Image.Resampling.BICUBIC)) for one in frames]
    mean, deviation = (np.array(one) for one in run.COLORS)
    given = torch.from_numpy((np.stack(sized)[:, :, 69:293] / 255 - mean) / deviation).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        looks = F.normalize(network.encode_image(given), dim=1)
        words = F.normalize(network.encode_text(open_clip.get_tokenizer(MODEL)(["oil painting"])), dim=1)
    found = measured("appearance_style", frames, style="oil painting")
    assert found.value == pytest.approx(float((looks @ words.T).mean()), abs=1e-5)
    assert found.more["cur_sim"] == pytest.approx(float(looks[1] @ words[0]), abs=1e-5)


def test_consistency_is_that_of_angles_with_the_frame_before_and_the_first():
    angles = np.radians([0, 10, 40, 160])
    features = torch.tensor(np.stack([np.cos(angles), np.sin(angles)], 1))
    pairs = [(10, 10), (30, 40), (120, 160)]  # degrees to the one before, and to the first
    expected = np.mean([max(0, math.cos(math.radians(one))) / 2 + max(0, math.cos(math.radians(two))) / 2
                        for one, two in pairs])  # fmt: skip
    found = run.pair_consistency(features)
    assert found.value == pytest.approx(expected)
    assert (found.parts, found.more["cnt_per_video"]) == (3, 3)
    assert found.more["video_sim"] == pytest.approx(3 * expected)
    with pytest.raises(ConfigError, match=r"2 frames.*1"):
        run.pair_consistency(features[:1])


ROWS = list(csv.DictReader(Path(__file__).with_name("vbench_rows.csv").open(encoding="utf-8")))

LOWEST = {name: max(one.least, 0.0) for name, one in DIMENSIONS.items()}


def test_published_totals_follow_from_published_scores():
    assert len(ROWS) == 19
    for row in ROWS:
        found = totals({name: float(row[name]) / 100 for name in DIMENSIONS})
        for name in ("total", "quality", "semantic"):
            # both are rounded to 0.01: a raw score's half step grows by at most 1 / 0.2846 in its range
            assert 100 * found[name] == pytest.approx(float(row[name]), abs=0.0101), (row["model"], name)


def test_the_command_prints_them_of_plain_and_of_official_files_and_of_the_page(tmp_path):
    row, page = ROWS[0], (Path(__file__).parents[2] / "docs" / "vbench.md").read_text(encoding="utf-8")
    plain = {name.replace("_", " "): float(row[name]) / 100 for name in DIMENSIONS}
    official = {name: [float(row[name]) / 100, [{"video_path": "a-0.mp4", "video_results": 1}]] for name in DIMENSIONS}
    of_page = page.partition("```json\n")[2].partition("```")[0]
    for scores, total in ((json.dumps(plain), row["total"]), (json.dumps(official), row["total"]), (of_page, "80.27")):
        (tmp_path / "scores.json").write_text(scores)
        found = vbench("--totals", tmp_path / "scores.json", "--json")
        assert found.exit_code == 0, found.stderr
        assert 100 * json.loads(found.stdout)["total"] == pytest.approx(float(total), abs=0.01)
        assert f"Total {total}" in vbench("--totals", tmp_path / "scores.json").stdout


def test_wrong_names_scores_and_files_are_refused(tmp_path):
    for name, score, said in (
        ("motion_smothness", 0.5, r"dimension 'motion_smothness'.*'motion_smoothness'?"),
        ("subject-consistency", 0.5, r"subject_consistency.*'subject-consistency'"),
        ("scene", 53.2, r"scene.*\[0, 1\].*got 53.2"),
        ("temporal_style", -1.5, r"temporal_style.*\[-1, 1\].*got -1.5$"),
        ("scene", math.nan, r"scene.*got nan"),
        ("scene", "0.5", r"scene.*got '0.5'"),
    ):
        with pytest.raises(ConfigError, match=said):
            totals(LOWEST | {name: score})
    with pytest.raises(ConfigError, match=r"16 dimensions.*2.*color, scene"):
        totals({name: 0.5 for name in DIMENSIONS if name not in ("scene", "color")})
    for text, said in (
        (None, "can't be read: No such file"),
        ("{", "are not JSON"),
        ("[]", "must be a JSON object dimension -> raw score, got list"),
        ('{"scene": 0.1, "scene": 0.2}', "'scene' is there twice"),
        ('{"scene": []}', "scene must be a number, got []"),
    ):
        (tmp_path / "scores.json").write_text(text) if text else None
        refuses(said, "vbench", "--totals", tmp_path / "scores.json")
