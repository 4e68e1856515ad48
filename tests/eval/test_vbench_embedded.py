"""VBench's names on the embedded world: drawn clips score as they were drawn, damaged ones as they were damaged."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import vbench_proxies as proxies
from dit_accel_assets import painter, world
from dit_accel_assets.world import Scene
from dit_accel_eval.vbench.dimensions import DIMENSIONS
from vbench_proxies import DAMAGES, by_scene, table
from world_scores import MEASURES, WORDS, Shown, world_scores


@cache
def scene(index: int = 0, **words) -> Scene:
    """Return a plain scene of one red square that moves right, 1 pixel a frame, on plain navy; with other words."""
    thing = world.Thing(color="red", shape="square", texture="plain", motion="moving right", speed="", pace=1.0,
                        size=16.0, start=(16.0, 32.0), phase=(0.0, 0.0))  # fmt: skip
    thing = replace(thing, **{key: value for key, value in words.items() if key in world.Thing.__slots__})
    rest = {key: value for key, value in words.items() if key not in world.Thing.__slots__}
    return replace(Scene(things=(thing,), grouped=False, relation="", ground="navy", ground_texture="plain",
                         ground_phase=(0.0, 0.0), pan="", style="", height=64, width=64), **rest)  # fmt: skip


@cache
def drawn(made: Scene, frames: int = 17) -> np.ndarray:
    return painter.draw(made, frames)


def one(name: str, frames: np.ndarray, made: Scene) -> float | None:
    return MEASURES[name](Shown(frames, made))


def two(relation: str = "left of") -> Scene:
    first = replace(scene().things[0], motion="still", start=(16.0, 32.0))
    other = replace(first, color="green", shape="circle", start=(48.0, 30.0))
    return replace(scene(), things=(first, other), relation=relation)


def test_the_names_are_vbenchs_and_aesthetics_are_left_out():
    assert set(DIMENSIONS) - set(WORDS) == {"aesthetic_quality"}
    found = world_scores(drawn(scene()), scene(), drawn(scene()))
    assert set(found) <= set(WORDS)
    assert "imaging_quality" not in world_scores(drawn(scene()), scene())
    for name in ("subject_consistency", "background_consistency", "motion_smoothness"):
        assert found[name] > 0.97, name
    for name in ("temporal_flickering", "object_class", "human_action", "color", "scene", "overall_consistency",
                 "imaging_quality"):  # fmt: skip
        assert found[name] == 1, name
    for name in ("multiple_objects", "spatial_relationship", "temporal_style"):  # not asked for
        assert name not in found


def test_imaging_quality_is_psnr_over_100():
    noisy = np.clip(drawn(scene()).astype(int) + 10, 0, 255).astype(np.uint8)
    error = np.square(noisy.astype(float) - drawn(scene())).mean()
    found = world_scores(noisy, scene(), drawn(scene()))["imaging_quality"]
    assert found == pytest.approx(10 * np.log10(255**2 / error) / 100)


def test_wrong_words_score_nothing_where_they_are_wrong():
    frames = drawn(scene())
    assert one("color", frames, scene(color="blue")) == 0
    assert one("object_class", frames, scene(shape="circle")) == 0
    assert one("scene", frames, scene(ground="maroon")) == 0
    assert one("human_action", frames, scene(motion="moving left")) == 0.5  # its size stays, its path does not


def test_a_change_of_colour_in_the_middle_is_no_consistent_subject():
    frames = drawn(scene()).copy()
    frames[8:] = drawn(scene(color="green"))[8:]
    # of 8 frames looked at, 4 are red: 6 of 7 are as the one before, 3 of 7 as the first
    assert one("subject_consistency", frames, scene()) == pytest.approx((6 / 7 + 3 / 7) / 2, abs=1e-6)
    assert one("background_consistency", frames, scene()) > 0.99
    assert one("color", frames, scene()) == pytest.approx(0.5)


def test_a_change_of_ground_in_the_middle_is_no_consistent_background():
    frames = drawn(scene()).copy()
    frames[8:] = drawn(scene(ground="gray"))[8:]
    before = one("background_consistency", drawn(scene()), scene())
    assert one("background_consistency", frames, scene()) < 0.8 < before


def test_flicker_is_told_from_motion_by_where_nothing_moves():
    still, quick = drawn(scene(motion="still")), drawn(scene(pace=2.0))
    for frames in (still, quick):
        gain = np.where(np.arange(17) % 2, 1.0, 0.8)[:, None, None, None]
        apart = np.abs(drawn(scene())[0, 0, 0].astype(float) * 0.2).mean()  # of the ground's colour
        assert one("temporal_flickering", frames, scene()) == 1
        found = one("temporal_flickering", np.rint(frames * gain).astype(np.uint8), scene())
        assert found == pytest.approx(1 - apart / 255, abs=2e-3)
    assert one("temporal_flickering", still, replace(scene(), pan="right", ground_texture="dotted")) is None


def test_smoothness_falls_with_what_the_centre_bends():
    even = drawn(scene())
    assert one("motion_smoothness", even, scene()) > 0.95
    jumps = even[[0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]]
    bends = np.diff([0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15], 2)  # 1 pixel a frame
    assert one("motion_smoothness", jumps, scene()) == pytest.approx(1 / (1 + np.sqrt(np.mean(bends**2))), abs=1e-3)


@pytest.mark.parametrize(("pace", "dynamic"), [(1.0, 0.0), (1.45, 0.0), (1.55, 1.0), (2.0, 1.0)])
def test_dynamic_is_more_than_6_pixels_on_256(pace, dynamic):
    assert one("dynamic_degree", drawn(scene(pace=pace)), scene()) == dynamic


def test_motion_is_that_of_whatever_shows():
    for name in ("motion_smoothness", "dynamic_degree"):
        asked, other = (one(name, drawn(scene(pace=2.0)), scene(color=color)) for color in ("red", "green"))
        assert asked == other
    empty = np.full((17, 64, 64, 3), (14, 20, 80), np.uint8)
    assert (one("motion_smoothness", empty, scene()), one("dynamic_degree", empty, scene())) == (None, 0)


def test_four_moving_pairs_of_17_frames_are_enough():
    frames = drawn(scene(pace=2.0))
    assert one("dynamic_degree", frames[[0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4]], scene()) == 1
    assert one("dynamic_degree", frames[[0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3]], scene()) == 0


@pytest.mark.parametrize(("relation", "score"), [("left of", 1), ("right of", 1), ("above", 0), ("below", 0)])
def test_boxes_stand_as_vbench_asks(relation, score):
    assert one("spatial_relationship", drawn(two()), two(relation)) == score


def test_several_objects_are_seen_by_shape_or_counted():
    assert one("multiple_objects", drawn(two()), two()) == 1
    assert one("multiple_objects", drawn(scene()), two()) == 0
    first = two().things[0]
    grouped = replace(two(), things=(first, replace(first, start=(48.0, 30.0))), grouped=True, relation="")
    assert one("multiple_objects", drawn(grouped), grouped) == 1
    assert one("multiple_objects", drawn(scene()), grouped) == 0


def test_the_camera_is_the_temporal_style():
    made = replace(scene(), pan="right", ground_texture="dotted")
    kept = one("temporal_style", drawn(made), made)
    other = one("temporal_style", drawn(made), replace(made, pan="left"))
    assert other is not None
    assert kept is not None
    assert kept > 0.8 > 0.5 > other


@pytest.mark.parametrize("name", DAMAGES)
def test_damages_do_what_they_say(name):
    made = scene(pace=2.0)
    clip = DAMAGES[name](made, np.random.default_rng(0))
    clean = drawn(made)
    assert clip.frames.shape == clean.shape
    whole = not name.startswith(("noise", "blur", "flicker"))
    assert (clip.frames == clip.drawn).all() == whole
    if name.startswith("noise"):
        spread = (clip.frames.astype(int) - clean)[:, :4, :, 2].std()  # the ground's blue is far from both ends
        assert spread == pytest.approx(float(name.split()[1]), rel=0.1)
    if name == "freeze":
        assert (clip.frames == clean[0]).all()
    if name == "freeze half":
        assert (clip.frames[:9] == clean[:9]).all()
        assert (clip.frames[8:] == clean[8]).all()
    if name in ("swapped", "shuffled"):
        order = [next(at for at in range(17) if (frame == clean[at]).all()) for frame in clip.frames]
        assert sorted(order) == list(range(17))
        assert order != list(range(17))
        if name == "swapped":
            assert order == [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15, 16]
    if name.startswith("recoloured"):
        first = 8 if name.endswith("half") else 0
        assert (clip.frames[:first] == clean[:first]).all()
        assert (clip.frames[first:] != clean[first:]).any((1, 2, 3)).all()


def line(number: int, damage: str, score: float, **metrics: float) -> dict:
    return {"scene": number, "damage": damage, "world": {"motion_smoothness": score}, "metrics": metrics}


def test_correlations_are_by_scene_and_turned_where_less_is_better():
    lines = [
        *(line(0, name, value, **{"flickering": value**2, "warp-error@dis": value}) for name, value in
          (("none", 0.9), ("swapped", 0.5), ("shuffled", 0.2))),
        *(line(1, name, value, **{"flickering": 1 - value, "warp-error@dis": 1 - value}) for name, value in
          (("none", 0.9), ("swapped", 0.5), ("shuffled", 0.2))),
        line(2, "none", 0.9, **{"flickering": 1.0}),  # one clip orders nothing
    ]  # fmt: skip
    assert by_scene(lines, "motion_smoothness", "flickering") == pytest.approx([1, -1])
    assert by_scene(lines, "motion_smoothness", "warp-error@dis") == pytest.approx([-1, 1])
    text = table(lines)
    assert "| motion_smoothness | `warp-error@dis` | 0.00 | 2 |" in text
    assert "| imaging_quality | `sharpness` | not measured | 0 |" in text
    assert "| name@world | none | swapped | shuffled |" in text
    assert "| motion_smoothness | 0.90 | 0.50 | 0.20 |" in text


def test_a_run_measures_what_is_missing(monkeypatch):
    monkeypatch.setattr(proxies, "DAMAGES", {name: DAMAGES[name] for name in ("none", "freeze")})
    monkeypatch.setattr(proxies, "NAMES", ("motion", "flickering"))
    found = list(proxies.measured(1, [{"scene": 0, "damage": "none"}]))
    assert [(one["scene"], one["damage"]) for one in found] == [(0, "freeze")]
    assert found[0]["metrics"] == {"motion": 0, "flickering": 1}
    assert found[0]["world"]["dynamic_degree"] == 0
