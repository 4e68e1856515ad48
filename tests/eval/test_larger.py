"""Pictures larger than trained are judged by themselves: objects, repetition, sharpness."""

import json

import numpy as np
import pytest
from dit_accel_assets.painter import draw
from dit_accel_assets.world import scene_of
from dit_accel_eval.suites.suite import read_suite
from drawn_model import STUDIES, DrawnModel, run_suite, standing_in
from judge_larger import judged, repetition, table


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


class FakeModel(DrawnModel):
    """Draws the picture, and without methods twice beside itself."""

    name = "flux-tiny"

    def draw(self, clip, call, plain):
        frames = drawn(clip)
        return np.concatenate([frames] * 2, axis=2) if call["height"] > 96 and plain else frames


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    yield from standing_in(monkeypatch, FakeModel)


def test_the_suite_runs_goes_on_and_prints(tmp_path):
    suite = tmp_path / "suites" / "some.toml"
    suite.parent.mkdir()
    arm = '[[arm]]\nname = "{}"\nnum_inference_steps = 2\ncall = {{ height = {}, width = 96 }}\n'
    suite.write_text(
        f'version = 2\nname = "some"\njudge = "{STUDIES}/judge_larger.py"\nmodel = "flux-tiny"\nclips = 2\n'
        + arm.format("1x", 96) + arm.format("2x", 192) + arm.format("2x, whole", 192) + "ultraimage = { }\n"
    )  # fmt: skip
    first = run_suite(suite)
    assert first.exit_code == 0, first.output
    made = [(clip, call["height"], many) for clip, call, many in FakeModel.made]
    assert made == [(clip, side, many) for clip in (0, 1) for side, many in ((96, 0), (192, 0), (192, 1))]
    assert run_suite(suite).stdout == first.stdout
    assert len(FakeModel.made) == 6
    lines = [json.loads(line) for line in (tmp_path / "results" / "some.jsonl").read_text().splitlines()]
    assert [line["objects_wrong"] > 0 for line in lines] == [False, True, False] * 2
    assert table(read_suite(suite), lines) in first.stdout
    assert "| 1x | 2 | 0.00 |" in first.stdout
    assert "| 2x | -3.00 |" in first.stdout
