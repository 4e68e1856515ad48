"""VBench's dimensions recomputed another way, and its totals from the leaderboard's rows (`vbench_rows.csv`)."""

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
from dit_accel_eval.vbench import measures
from dit_accel_eval.vbench.dimensions import DIMENSIONS, totals
from dit_accel_eval.vbench.measures import WAYS, VideoScore
from dit_accel_eval.vbench.prompts import Prompt
from fake_model import command
from PIL import Image
from tiny_vbench import MODEL, WIDTH, weights
from torch.nn import functional as F

from dit_accel import ConfigError


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
        monkeypatch.setattr(measures, name, by)
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
    mean, deviation = (torch.tensor(one)[:, None, None] for one in measures.COLORS)
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
    mean, deviation = (np.array(one) for one in measures.COLORS)
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
    found = measures.pair_consistency(features)
    assert found.value == pytest.approx(expected)
    assert (found.parts, found.more["cnt_per_video"]) == (3, 3)
    assert found.more["video_sim"] == pytest.approx(3 * expected)
    with pytest.raises(ConfigError, match=r"2 frames.*1"):
        measures.pair_consistency(features[:1])


ROWS = list(csv.DictReader(Path(__file__).with_name("vbench_rows.csv").open(encoding="utf-8")))

LOWEST = {name: max(one.least, 0.0) for name, one in DIMENSIONS.items()}


vbench = partial(command, "vbench")


def test_published_totals_follow_from_published_scores():
    assert len(ROWS) == 19
    for row in ROWS:
        found = totals({name: float(row[name]) / 100 for name in DIMENSIONS})
        for name in ("total", "quality", "semantic"):
            # both are rounded to 0.01: a raw score's half step grows by at most 1 / 0.2846 in its range
            assert 100 * getattr(found, name) == pytest.approx(float(row[name]), abs=0.0101), (row["model"], name)


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


def test_a_part_has_no_totals_and_what_is_missing_is_named():
    with pytest.raises(ConfigError, match=r"16 dimensions.*2.*color, scene"):
        totals({name: 0.5 for name in DIMENSIONS if name not in ("scene", "color")})


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
