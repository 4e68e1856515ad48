"""Pictures larger than trained are judged by themselves: objects, repetition, sharpness."""

import json
from typing import ClassVar

import numpy as np
import pytest
from dit_accel_assets.painter import draw
from dit_accel_assets.world import scene_of
from dit_accel_eval import compare
from dit_accel_eval.counting import Counts
from dit_accel_eval.larger import judged, repetition, table
from dit_accel_eval.model import Run
from dit_accel_eval.suite import read_suite
from typer.testing import CliRunner

from dit_accel.cli.app import app


def drawn(number: int) -> np.ndarray:
    scene = scene_of(0, number, height=96, width=96, held_out=True, still=True)
    return draw(scene, 1).astype(np.float32) / 255


def test_what_comes_again_is_found():
    rng = np.random.default_rng(0)
    picture = rng.random((48, 48, 3))
    assert repetition(np.tile(picture, (2, 2, 1)), 96) > 0.99
    assert repetition(np.tile(picture, (1, 2, 1)), 48) > 0.99
    assert repetition(rng.random((96, 96, 3)), 96) < 0.2
    assert repetition(np.ones((96, 96, 3)), 96) == 1.0


def test_a_drawn_picture_is_right_and_two_of_it_are_not():
    found = [judged(drawn(number), number, 96) for number in range(4)]
    assert all(one["objects_wrong"] == 0 for one in found)
    assert np.mean([one["score"] for one in found]) > 0.9
    for number, one in enumerate(found):
        twice = judged(np.concatenate([drawn(number)] * 2, axis=2), number, 96)
        assert twice["objects_wrong"] > 0
        assert twice["repetition"] > one["repetition"]


class FakeModel:
    """Stands in for the embedded model: it draws the picture, and without methods twice beside itself."""

    name = "flux-tiny"
    made: ClassVar[list] = []

    def __init__(self, name, call):
        pass

    def prompt(self, clip):
        return f"prompt {clip}"

    def seed(self, clip):
        return clip

    def run(self, clip, *, steps, solver, flow_shift, methods, call):
        self.made.append((clip, call["height"], len(methods)))
        frames = drawn(clip)
        if call["height"] > 96 and not methods:
            frames = np.concatenate([frames] * 2, axis=2)
        return Run(frames=frames, counts=Counts(blocks=1, attention=1), attended=1.0, seconds=1.0)


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
    arm = '[[arm]]\nname = "{}"\nnum_inference_steps = 2\ncall = {{ height = {}, width = 96 }}\n'
    suite.write_text(
        'version = 2\nname = "some"\njudge = "larger"\nmodel = "flux-tiny"\nclips = 2\n'
        + arm.format("1x", 96) + arm.format("2x", 192) + arm.format("2x, whole", 192) + "ultraimage = { }\n"
    )  # fmt: skip
    first = run(suite)
    assert first.exit_code == 0, first.output
    assert FakeModel.made == [(clip, side, many) for clip in (0, 1) for side, many in ((96, 0), (192, 0), (192, 1))]
    assert run(suite).stdout == first.stdout
    assert len(FakeModel.made) == 6
    lines = [json.loads(line) for line in (tmp_path / "results" / "some.jsonl").read_text().splitlines()]
    assert [line["objects_wrong"] > 0 for line in lines] == [False, True, False] * 2
    assert table(read_suite(suite), lines) in first.stdout
    assert "| 1x | 2 | 0.00 |" in first.stdout
