"""Long clips are judged by themselves: score, motion, sharpness and repetition."""

import json

import numpy as np
import pytest
from dit_accel_assets import catalog, model_path_error, painter, world
from dit_accel_assets.checker import path_distance
from dit_accel_assets.clips import clip_of, draw_plain
from dit_accel_eval.suites.suite import read_suite
from drawn_model import STUDIES, DrawnModel, run_suite, standing_in
from judge_longer import by_stretch, loop_rise, repetition, table


def drawn(seed: int = 3, frames: int = 65) -> np.ndarray:
    _, scene, _ = clip_of(seed, held_out=True)
    return draw_plain(scene, frames).astype(np.float32) / 255


def test_repetition_finds_the_opening_again():
    clip = drawn(frames=33)
    assert repetition(np.concatenate([clip, clip]), 33) == 0
    assert repetition(clip, 33) > 0.02
    assert repetition(np.repeat(clip[:1], 40, 0), 33) == 0


def test_a_loop_is_told_from_a_way_and_from_standing_still():
    for seed in range(6):
        clip = drawn(seed, frames=65)  # one way, across the whole clip
        assert loop_rise(clip, 17) < 0.6
        assert loop_rise(np.concatenate([clip[30:47]] * 4), 17) > 1.4
        assert loop_rise(np.roll(np.concatenate([clip[::2]] * 2), 5, axis=0), 17) > 1.4  # whatever its opening frames
    assert loop_rise(np.repeat(clip[:1], 40, 0), 17) == 2.0


def test_the_path_error_tells_a_straight_way_from_one_that_begins_again():
    for seed in range(4):
        clip = drawn(seed, frames=65)
        assert path_distance(clip) < 1
        again = np.concatenate([clip[::2], clip[::2]])  # the object jumps back where it began
        assert path_distance(again) > 4
    assert np.isnan(path_distance(np.repeat(clip[:1], 9, 0) * 0))


def test_each_stretch_of_a_clip_is_judged():
    clip = drawn(3, frames=65)
    first, last = by_stretch("wan-plain", 3, clip)
    assert min(first, last) > 0.8
    gone = np.concatenate([clip[:33], np.repeat(clip[-1:] * 0, 32, 0)])
    assert by_stretch("wan-plain", 3, gone)[1] < 0.6
    assert len(by_stretch("wan-plain", 3, clip[:33])) == len(by_stretch("wan-plain", 3, clip[:20])) == 1


def test_the_richer_worlds_clips_are_judged_by_stretches_of_17_frames_and_their_drawn_speeds(monkeypatch):
    monkeypatch.setattr(catalog, "model_names", lambda: ("wan-tiny",))
    moving = [n for n in range(40) if "moving" in catalog.held_out_prompts("wan-tiny", n + 1)[n]][:1]
    for number in moving:
        clip = painter.draw(world.scene_of(0, number, held_out=True), 49).astype(np.float32) / 255
        assert len(stretches := by_stretch("wan-tiny", number, clip)) == 3
        assert min(stretches) > 0.7
        again = np.concatenate([clip[:17]] * 3)[:49]  # begins again where it should go on
        assert model_path_error("wan-tiny", number, clip) < 1 < model_path_error("wan-tiny", number, again)
    assert np.isnan(model_path_error("wan-tiny", moving[0], clip * 0))


class FakeModel(DrawnModel):
    """Draws the clip, and plain long ones backwards."""

    name = "wan-plain"

    def draw(self, clip, call, plain):
        frames = drawn(clip, call["num_frames"])
        return frames[::-1] if call["num_frames"] > 33 and plain else frames


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    yield from standing_in(monkeypatch, FakeModel)


def test_the_suite_runs_goes_on_and_prints(tmp_path):
    suite = tmp_path / "suites" / "some.toml"
    suite.parent.mkdir()
    arm = '[[arm]]\nname = "{}"\nnum_inference_steps = 2\ncall = {{ num_frames = {} }}\n'
    suite.write_text(
        f'version = 2\nname = "some"\njudge = "{STUDIES}/judge_longer.py"\nmodel = "wan-plain"\nclips = 2\n'
        + arm.format("1x", 33) + arm.format("2x", 65) + arm.format("2x, decayed", 65) + "ultravico = { alpha = 0.8 }\n"
    )  # fmt: skip
    first = run_suite(suite)
    assert first.exit_code == 0, first.output
    made = [(clip, call["num_frames"], many) for clip, call, many in FakeModel.made]
    assert made == [(clip, size, many) for clip in (0, 1) for size, many in ((33, 0), (65, 0), (65, 1))]
    assert run_suite(suite).stdout == first.stdout
    assert len(FakeModel.made) == 6
    out = tmp_path / "results" / "some.jsonl"
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["score"] for line in lines] == [1.0, 0.75, 1.0] * 2  # backwards is another direction
    printed = first.stdout
    assert table(read_suite(suite), lines) in printed
    assert "| 1x | 2 | 33 | 100% |" in printed
    assert "| 2x, decayed | 2x | 25.00 |" in printed
    timed = [{**line, "loop_seconds": 1.52 * (1 + ("decayed" in line["arm"]))} for line in lines]
    assert "| 100% | 1.5 |" in table(read_suite(suite), timed)
    assert "| 2.00 |" in table(read_suite(suite), timed)
    (row,) = [row for row in table(read_suite(suite), lines[:3]).splitlines() if row.startswith("| 2x, decayed | 2x")]
    assert "| 2x | 25.00 |" in row  # one clip has no interval
    lost = [{**line, "path_error": float("nan")} if line["clip"] else line for line in lines]
    assert f"| {lines[0]['path_error']:.1f} (1) |" in table(read_suite(suite), lost)
    assert run_suite(tmp_path / "none.toml").exit_code == 2
    refused = run_suite(suite, "--time", "--frames", tmp_path)
    assert "judge_longer.py), without a dense run beside them; leave out --time and --frames" in refused.stderr
    out.write_text(out.read_text().replace('"num_frames": 33', '"num_frames": 35'))
    assert "holds results of arm '1x' with call {" in run_suite(suite).stderr
