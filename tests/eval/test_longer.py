"""Long clips are judged frame by frame, by motion, sharpness and repetition."""

import dataclasses
import json

import numpy as np
import pytest
from dit_accel_assets.clips import clip_of, draw
from dit_accel_eval import longer
from dit_accel_eval.longer import TRAINED, judged, main, motion, repetition, sharpness, table
from dit_accel_eval.suite import read_suite


def drawn(seed: int = 3, frames: int = 65) -> tuple:
    _, scene, _ = clip_of(seed, held_out=True)
    return scene, draw(scene, frames).astype(np.float32) / 255


def test_a_drawn_clip_is_right_and_its_faults_show():
    scene, clip = drawn()
    assert TRAINED == 33
    found = judged(clip, scene)
    assert found["right"] == 1.0
    assert found["first"]
    assert found["direction"]
    wrong = clip.copy()
    wrong[0] = clip[0][..., ::-1]  # another colour
    other = judged(wrong, scene)
    assert not other["first"]
    assert other["right"] == pytest.approx(16 / 17)
    assert not judged(clip[::-1], scene)["direction"]


def test_motion_and_sharpness():
    _, clip = drawn()
    assert motion(clip) > 0 == motion(np.repeat(clip[:1], 9, 0))
    assert motion(clip[::4]) > motion(clip)
    assert sharpness(clip) > sharpness((clip[:, :-1, :-1] + clip[:, 1:, 1:]) / 2)


def test_repetition_finds_the_opening_again():
    _, clip = drawn(frames=33)
    looped = np.concatenate([clip, clip])
    assert repetition(looped) == 0
    assert repetition(clip) > 0.02
    assert repetition(np.repeat(clip[:1], 40, 0)) == 0


def test_the_suite_runs_goes_on_and_prints(tmp_path, monkeypatch, capsys):
    suite = tmp_path / "suites" / "some.toml"
    suite.parent.mkdir()
    suite.write_text(
        'version = 1\nname = "some"\nnum_frames = 67\nnum_inference_steps = 2\nguidance_scale = 4.0\nclips = 2\n'
        '[[arm]]\nname = "1x"\nnum_frames = 33\n'
        '[[arm]]\nname = "2x"\n'
        '[[arm]]\nname = "2x, decayed"\nultravico = { alpha = 0.8 }\nagainst = "2x"\n'
    )
    made = []

    @dataclasses.dataclass
    class Report:
        density: float = 1.0

    def generate(pipe, suite, arm, prompt, seed):
        made.append((arm.name, seed, arm.num_frames or suite.num_frames))
        return drawn(seed, 65)[1], 1.0, Report()

    monkeypatch.setattr(longer, "generate", generate)
    assert main([str(suite), "--threads", "1"]) == 0
    assert made == [(name, clip, size) for clip in (0, 1) for name, size in
                    (("1x", 33), ("2x", 67), ("2x, decayed", 67))]  # fmt: skip
    assert main([str(suite), "--threads", "1"]) == 0
    assert len(made) == 6
    lines = [json.loads(line) for line in (tmp_path / "results" / "some.jsonl").read_text().splitlines()]
    assert [line["right"] for line in lines] == [1.0] * 6
    printed = capsys.readouterr().out
    assert table(read_suite(suite), lines) in printed
    assert "| 2x, decayed | 2 | 100% | 100% | 100% |" in printed
    assert "| 2x | 0.00 [0.00, 0.00] |" in printed
    assert main([str(tmp_path / "none.toml")]) == 2
