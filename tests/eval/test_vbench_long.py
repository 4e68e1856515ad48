"""`eval vbench --long`: videos cut into clips, their means, the fast branch by one's own tables, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_vbench as tiny
import torch
from dit_accel_eval.vbench.long import Fast, clips_of, first_frames, long_score, read_fast, seconds_of
from dit_accel_eval.vbench.networks.loading import Networks
from dit_accel_eval.vbench.prompts import FLICKERING
from dit_accel_eval.vbench.rules import VideoScore, flickering
from dit_accel_eval.vbench.sampling import Video, for_dinov2, read_video
from dit_accel_pipelines.generation.media import write_media
from typer.testing import CliRunner

from dit_accel import ConfigError
from dit_accel.cli.app import app


def video(frames: int, fps: float = 8) -> Video:
    """A video whose frames' first pixel tells their number."""
    held = np.zeros((frames, 4, 4, 3), np.uint8)
    held[:, 0, 0, 0] = np.arange(frames)
    return Video(name="a-0.mp4", frames=held, fps=fps)


@pytest.mark.parametrize(
    ("frames", "fps", "expected"),
    [
        (40, 8, [(0, 16), (16, 32), (24, 40)]),  # the last one reaches back
        (32, 8, [(0, 16), (16, 32)]),
        (16, 8, [(0, 16)]),
        (10, 8, [(0, 10)]),  # shorter than a clip
        (17, 8, [(0, 16), (1, 17)]),
        (60, 29.97, [(0, 58), (2, 60)]),  # the rate is cut off
    ],
)
def test_videos_are_cut_into_clips_of_whole_seconds(frames, fps, expected):
    found = clips_of(video(frames, fps), 2)
    ends = [(int(clip.frames[0, 0, 0, 0]), int(clip.frames[-1, 0, 0, 0]) + 1) for clip in found]
    assert ends == expected
    assert {(clip.name, clip.fps) for clip in found} == {("a-0.mp4", int(fps))}


def test_clips_last_as_long_as_the_longest_that_a_prompt_serves():
    assert seconds_of(["subject_consistency"]) == 2
    assert seconds_of(["aesthetic_quality", "overall_consistency"]) == 10
    with pytest.raises(ConfigError, match=r"clips.*1 frame.*second"):
        clips_of(video(10, 0.5), 2)


def test_a_videos_score_is_the_mean_of_its_clips_that_say_something():
    def measure(clip: Video) -> VideoScore | None:
        first = int(clip.frames[0, 0, 0, 0])
        return None if first == 16 else VideoScore(value=first / 100)

    score = long_score("color", video(40), 2, measure)
    assert score is not None
    assert (score.value, score.parts, score.more) == (pytest.approx(0.12), 1, {"clip_results": [0.0, 0.24]})
    assert long_score("color", video(40), 2, lambda clip: None) is None
    with pytest.raises(ConfigError, match=r"clip 0 of 2 s: .*3 frames"):
        long_score("color", video(2), 2, lambda clip: (_ for _ in ()).throw(ConfigError("it takes at least 3 frames")))


def test_flicker_is_told_of_clips_that_stand_still():
    frames = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), dtype=np.uint8)
    frames[16:] = frames[16]

    def flow(one: np.ndarray, two: np.ndarray) -> np.ndarray:
        return np.full((2, 16, 16), 0.0 if (one == two).all() else 9.0)

    both = Video(name="a-0.mp4", frames=frames, fps=8)
    kept = long_score(FLICKERING, both, 2, lambda clip: flickering(clip.frames), flow)
    assert kept is not None
    assert kept.more == {"clip_results": [1.0]}
    whole = long_score(FLICKERING, both, 2, lambda clip: flickering(clip.frames))
    assert whole is not None
    assert len(whole.more["clip_results"]) == 2


def config(at: Path, table: str = "0.0: 0.0\n0.5: 0.8\n1.0: 1.0\n") -> Path:
    at.mkdir(exist_ok=True)
    (at / "subject_mapping_table.yaml").write_text(table)
    (at / "slow_fast_params.yaml").write_text("w_inclip_sb: 0.7\nw_clip2clip_sb: 0.3\nw_inclip_bg: 0.8\n")
    return at


def test_the_fast_branch_is_mapped_and_weighed_by_ones_own_tables(tmp_path):
    fast = read_fast(config(tmp_path / "configs"))
    assert [fast.mapped(value) for value in (-1, 0, 0.25, 0.5, 0.75, 1, 2)] == pytest.approx(
        [0, 0, 0.4, 0.8, 0.9, 1, 1]
    )
    within = VideoScore(value=0.9, more={"clip_results": [0.9]})
    assert fast.fused(within, 0.75).value == pytest.approx(0.7 * 0.9 + 0.3 * 0.9)
    assert fast.fused(within, 0.5).more["mapped_clip2clip_score"] == pytest.approx(0.8)
    assert fast.fused(within, 0.0).value == 0.9  # what maps to 0 does not count, as in the official code
    assert fast.fused(within, None) is within
    other = Fast(table=fast.table, within=0.5, between=0.5)
    assert other.fingerprint != fast.fingerprint


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ("0.0: 0.0\n", r"maps 1 numbers.*2"),
        ("a: 1\nb: 2\n", "map numbers"),
        ("0.0: x\n", "lines 'key: number'"),
    ],
)
def test_wrong_tables_are_refused(tmp_path, table, text):
    with pytest.raises(ConfigError, match=text):
        read_fast(config(tmp_path, table))
    (tmp_path / "slow_fast_params.yaml").write_text("w_inclip_bg: 1\n")
    with pytest.raises(ConfigError, match=r"has no w_inclip_sb|must|maps"):
        read_fast(tmp_path)
    (tmp_path / "slow_fast_params.yaml").unlink()
    with pytest.raises(ConfigError, match=r"can.t be read: No such file|must|maps"):
        read_fast(tmp_path)


def test_first_frames_are_compared_by_dinov2(tmp_path, monkeypatch):
    tiny.write(tmp_path, monkeypatch, "dinov2")
    networks = Networks(tmp_path)
    frames = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), dtype=np.uint8)
    found = first_frames(Video(name="a-0.mp4", frames=frames, fps=8), 2, networks)
    seen = networks.dinov2(for_dinov2(frames[[0, 16, 24]])).double()
    alike = (seen @ seen.T).clamp(min=0)
    assert found == pytest.approx(float((alike[1, 0] + (alike[2, 1] + alike[2, 0]) / 2) / 2), abs=1e-6)
    assert first_frames(Video(name="a-0.mp4", frames=frames[:10], fps=8), 2, networks) is None


@pytest.fixture
def work(tmp_path):
    """Two still videos of 5 seconds; returns the command and the folder."""
    (tmp_path / "videos").mkdir()
    for number in range(2):
        frames = np.random.default_rng(number).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
        write_media(tmp_path / "videos" / f"a red circle-{number}.mp4", frames, fps=8)
    served = ["temporal_flickering", "subject_consistency", "background_consistency"]
    (tmp_path / "info.json").write_text(json.dumps([{"prompt_en": "a red circle", "dimension": served}]))

    def start(*arguments: str | Path):
        where = ("--videos", tmp_path / "videos", "--full-info", tmp_path / "info.json", "-o", tmp_path / "out")
        asked = ("eval", "vbench", *where, "--samples", 2, "--folder", tmp_path / "weights", *arguments)
        found = CliRunner().invoke(app, [str(one) for one in asked])
        return found, " ".join(found.stderr.split())

    return start, tmp_path


def test_flicker_of_long_videos_is_the_mean_over_clips_then_videos(work):
    start, at = work
    found, text = start("--long", "--filtered", "-d", "temporal_flickering", "--json")
    assert found.exit_code == 0, text
    means = []
    for number in range(2):
        frames = read_video(at / "videos" / f"a red circle-{number}.mp4").frames.astype(float)
        parts = [frames[0:16], frames[16:32], frames[24:40]]
        means.append(np.mean([1 - np.abs(np.diff(part, axis=0)).mean() / 255 for part in parts]))
    told = json.loads(found.stdout)
    assert told["scores"]["temporal_flickering"] == pytest.approx(np.mean(means))
    assert told["totals"] is None
    held = json.loads((at / "out" / "videos_eval_results.json").read_text())["temporal_flickering"][1]
    assert [len(entry["clip_results"]) for entry in held] == [3, 3]
    about = json.loads((at / "out" / "videos_about.json").read_text())
    assert about["temporal_flickering"]["networks"] == {"long": "clips"}
    whole, _ = start("--filtered", "-d", "temporal_flickering", "--json")  # no clip's score is taken for a video's
    assert json.loads(whole.stdout)["scores"] != told["scores"]


def test_subject_consistency_takes_the_fast_branch_where_its_tables_are_given(work, monkeypatch):
    start, at = work
    tiny.write(at / "weights", monkeypatch, "dino", "dinov2", "clip-b32")
    within = json.loads(start("--long", "-d", "subject_consistency", "--json")[0].stdout)["scores"]
    found, text = start("--long", "--long-config", config(at / "configs"), "-d", "subject_consistency", "--json")
    assert found.exit_code == 0, text
    entries = json.loads((at / "out" / "videos_eval_results.json").read_text())["subject_consistency"][1]
    fused = [0.7 * one["inclip_score"] + 0.3 * one["mapped_clip2clip_score"] for one in entries]
    assert json.loads(found.stdout)["scores"]["subject_consistency"] == pytest.approx(np.mean(fused))
    assert np.mean([one["inclip_score"] for one in entries]) == pytest.approx(within["subject_consistency"])
    about = json.loads((at / "out" / "videos_about.json").read_text())["subject_consistency"]["networks"]
    assert set(about) == {"dino", "dinov2", "long"}


def test_what_long_videos_cannot_tell_is_refused(work, monkeypatch):
    start, at = work
    tiny.write(at / "weights", monkeypatch, "dino", "clip-b32")
    own = config(at / "configs")
    assert "--long-config is for clips of long videos; add --long" in start("--long-config", own)[1]
    assert "between clips it asks DreamSim" in start("--long", "--long-config", own, "-d", "background_consistency")[1]
    assert start("--long", "-d", "background_consistency")[0].exit_code == 0
    assert "dinov2 is missing: put" in start("--long", "--long-config", own, "-d", "subject_consistency")[1]
    assert "which RAFT tells" in start("--long", "-d", "temporal_flickering")[1]
    (at / "info.json").write_text(json.dumps([{"prompt_en": "a red circle", "dimension": ["human_action"]}]))
    line = {"video": "a red circle-0.mp4", "by": "UMT", "actions": [["marching", 0.9]]}
    (at / "seen.jsonl").write_text(json.dumps(line) + "\n")
    told = start("--long", "-d", "human_action", "--observations", at / "seen.jsonl")[1]
    assert "VBench-Long looks at each clip, and the observations are of whole videos" in told


def test_dinov2_scales_what_its_blocks_add(tmp_path, monkeypatch):
    from dit_accel_eval.vbench.networks import vit
    from transformers import Dinov2Config, Dinov2Model

    weights = tiny.dinov2(side=4)
    config = Dinov2Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, image_size=56, patch_size=14,
                          mlp_ratio=4, layer_norm_eps=1e-6)  # fmt: skip
    other = Dinov2Model(config).eval()
    held = other.state_dict()
    held["embeddings.cls_token"], held["embeddings.position_embeddings"] = weights["cls_token"], weights["pos_embed"]
    for kind in ("weight", "bias"):
        held[f"embeddings.patch_embeddings.projection.{kind}"] = weights[f"patch_embed.proj.{kind}"]
        held[f"layernorm.{kind}"] = weights[f"norm.{kind}"]
        for mine, theirs in {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.o_proj",
                             "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}.items():  # fmt: skip
            held[f"encoder.layer.0.{theirs}.{kind}"] = weights[f"blocks.0.{mine}.{kind}"]
        for part, value in zip("qkv", weights[f"blocks.0.attn.qkv.{kind}"].chunk(3), strict=True):
            held[f"encoder.layer.0.attention.{part}_proj.{kind}"] = value
    for number in (1, 2):
        held[f"encoder.layer.0.layer_scale{number}.lambda1"] = weights[f"blocks.0.ls{number}.gamma"]
    other.load_state_dict(held)
    frames = tiny.random(2, 3, 56, 56)
    with torch.inference_mode():
        assert torch.allclose(
            vit.dino(vit.tower(weights).eval(), frames), other(frames).last_hidden_state[:, 0], atol=1e-5
        )
