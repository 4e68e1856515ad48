"""Long clips are judged by themselves: score, motion, sharpness and repetition."""

import json
from typing import ClassVar

import numpy as np
import pytest
from dit_accel_assets.clips import clip_of, draw
from dit_accel_eval import compare
from dit_accel_eval.counting import Counts
from dit_accel_eval.longer import loop, motion, repetition, sharpness, table
from dit_accel_eval.model import Run
from dit_accel_eval.suite import read_suite
from typer.testing import CliRunner

from dit_accel.cli.app import app


def drawn(seed: int = 3, frames: int = 65) -> np.ndarray:
    _, scene, _ = clip_of(seed, held_out=True)
    return draw(scene, frames).astype(np.float32) / 255


def test_motion_and_sharpness():
    clip = drawn()
    assert motion(clip) > 0 == motion(np.repeat(clip[:1], 9, 0))
    assert motion(clip[::4]) > motion(clip)
    assert sharpness(clip) > sharpness((clip[:, :-1, :-1] + clip[:, 1:, 1:]) / 2)


def test_repetition_finds_the_opening_again():
    clip = drawn(frames=33)
    assert repetition(np.concatenate([clip, clip]), 33) == 0
    assert repetition(clip, 33) > 0.02
    assert repetition(np.repeat(clip[:1], 40, 0), 33) == 0


def test_a_loop_is_told_from_a_way_and_from_standing_still():
    for seed in range(6):
        clip = drawn(seed, frames=65)  # one way, across the whole clip
        assert loop(clip, 17) < 0.6
        assert loop(np.concatenate([clip[30:47]] * 4), 17) > 1.4
        assert loop(np.roll(np.concatenate([clip[::2]] * 2), 5, axis=0), 17) > 1.4  # whatever its opening frames
    assert loop(np.repeat(clip[:1], 40, 0), 17) == 2.0


class FakeModel:
    """Stands in for an embedded model: it draws what was asked for, and plain long clips backwards."""

    name = "wan-tiny"
    made: ClassVar[list] = []

    def __init__(self, name, call):
        pass

    def prompt(self, clip):
        return clip_of(clip, frames=1, held_out=True)[0]

    def seed(self, clip):
        return clip

    def run(self, clip, *, steps, solver, flow_shift, methods, call):
        self.made.append((clip, steps, call["num_frames"], len(methods)))
        frames = drawn(clip, call["num_frames"])
        plain = call["num_frames"] > 33 and not methods
        return Run(frames=frames[::-1] if plain else frames, counts=Counts(blocks=1, attention=1),
                   attended=1.0, seconds=1.0)  # fmt: skip


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setattr(compare, "EmbeddedModel", FakeModel)
    monkeypatch.setattr(FakeModel, "made", [])
    compare._loaded.cache_clear()
    yield
    compare._loaded.cache_clear()


def run(*arguments):
    return CliRunner().invoke(app, ["eval", "run", *map(str, arguments)])


def test_the_suite_runs_goes_on_and_prints(tmp_path):
    suite = tmp_path / "suites" / "some.toml"
    suite.parent.mkdir()
    arm = '[[arm]]\nname = "{}"\nnum_inference_steps = 2\ncall = {{ num_frames = {} }}\n'
    suite.write_text(
        'version = 2\nname = "some"\njudge = "longer"\nmodel = "wan-tiny"\nclips = 2\n'
        + arm.format("1x", 33) + arm.format("2x", 65) + arm.format("2x, decayed", 65) + "ultravico = { alpha = 0.8 }\n"
    )  # fmt: skip
    first = run(suite)
    assert first.exit_code == 0, first.output
    assert FakeModel.made == [(clip, 2, size, many) for clip in (0, 1) for size, many in ((33, 0), (65, 0), (65, 1))]
    assert run(suite).stdout == first.stdout
    assert len(FakeModel.made) == 6
    out = tmp_path / "results" / "some.jsonl"
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["score"] for line in lines] == [1.0, 0.75, 1.0] * 2  # backwards is another direction
    printed = first.stdout
    assert table(read_suite(suite), lines) in printed
    assert "| 1x | 2 | 33 | 100% |" in printed
    assert "| 2x | 25.00 [25.00, 25.00] |" in printed
    assert run(tmp_path / "none.toml").exit_code == 2
    timed = run(suite, "--time", "--frames", tmp_path)
    assert (
        "some judges clips by themselves (longer), without a dense run beside them; leave out --time and --frames"
        in (timed.stderr)
    )
    out.write_text(out.read_text().replace('"num_frames": 33', '"num_frames": 35'))
    assert "holds results of arm '1x' with call {" in run(suite).stderr
