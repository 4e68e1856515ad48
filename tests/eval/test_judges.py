"""The judges of suites without a reference: guidance at equal forwards, larger pictures, longer clips."""

import functools
from functools import partial
from pathlib import Path

import judge_guidance
import judge_larger
import judge_longer
import numpy as np
import pytest
from dit_accel_assets import catalog, clips, model_closeness, model_path_error, painter, world
from dit_accel_assets.checker import closeness, path_distance
from dit_accel_eval.runs.results import read_lines
from dit_accel_eval.suites.arms import Arm
from dit_accel_eval.suites.suite import Suite, read_suite
from fake_model import DrawnModel, command, faked
from judge_longer import by_stretch, loop_rise

from dit_accel import PAG

STUDIES = Path(__file__).parents[2] / "eval" / "studies"
run_suite = partial(command, "run")
HEAD = 'version = 2\nname = "some"\njudge = "{}/{}.py"\nmodel = "{}"\nclips = {}\n'
ARM = '[[arm]]\nname = "{}"\nnum_inference_steps = {}\ncall = {{ {} }}\n'


@functools.cache
def drawn(seed: int = 3, frames: int = 65) -> np.ndarray:
    _, scene, _ = clips.clip_of(seed, held_out=True)
    return clips.draw_plain(scene, frames).astype(np.float32) / 255


def picture(number: int) -> np.ndarray:
    scene = world.scene_of(0, number, height=96, width=96, held_out=True, still=True)
    return painter.draw(scene, 1).astype(np.float32) / 255


def write(tmp_path, judge, model, count, *arms):
    path = tmp_path / "suites" / "some.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(HEAD.format(STUDIES, judge, model, count) + "".join(arms))
    return path, tmp_path / "results" / "some.jsonl"


def test_guidance_counts_forwards_is_held_against_plain_arms_and_goes_on(tmp_path):
    small = "height = 32, width = 32, num_frames = 5, guidance_scale = {}"
    pag = 'pag = {{ layers = ["{}"] }}\n'.format
    arms = [ARM.format(name, steps, small.format(scale)) for name, steps, scale in
            (("off", 2, 1.0), ("three", 3, 3.0), ("pag", 2, 3.0))]  # fmt: skip
    path, out = write(tmp_path, "judge_guidance", "wan-plain", 1, *arms, pag("L3"))
    first = run_suite(path)
    assert first.exit_code == 0, first.output
    lines = {line["arm"]: line for line in read_lines(out)}
    assert {name: line["forwards"] for name, line in lines.items()} == {"off": 2, "three": 6, "pag": 2 * (2 + 3 / 6)}
    before = out.read_text()
    assert run_suite(path).stdout == first.stdout
    assert out.read_text() == before
    gained = 100 * (lines["pag"]["closeness"] - lines["three"]["closeness"])
    assert f"| pag | 3.0 | 2 | 5.0 | {lines['pag']['score']:.0%} |" in first.stdout
    assert f"| three | {gained:+.2f} too few |" in first.stdout
    write(tmp_path, "judge_guidance", "wan-plain", 1, *arms, pag("L4"))
    assert "holds results of arm 'pag' with methods" in run_suite(path).stderr


def test_a_guided_arm_is_held_against_plain_ones_of_its_own_forwards():
    arms = {name: Arm(name=name, num_inference_steps=1) for name in ("few", "equal", "also", "many")}
    arms["pag"] = Arm(name="pag", num_inference_steps=1, methods=(PAG(layers="L3"),))
    suite = Suite(name="s", model="wan-plain", clips=1, arms=tuple(arms.values()))
    values = {"few": (5, 0.99), "equal": (10, 0.8), "also": (12, 0.9), "many": (20, 0.95), "pag": (10, 0.7)}
    lines = [{"arm": name, "forwards": many, "closeness": close} for name, (many, close) in values.items()]
    assert judge_guidance.rival_of(suite, arms["pag"], lines) is arms["also"]
    assert judge_guidance.rival_of(suite, arms["few"], lines) is None
    dear = [line | {"forwards": 15} if line["arm"] == "pag" else line for line in lines]
    assert judge_guidance.rival_of(suite, arms["pag"], dear) is arms["many"]  # the only one with as many


def test_closeness_is_high_for_what_is_drawn_and_falls_where_a_word_is_wrong():
    _, scene, _ = clips.clip_of(0, frames=1, held_out=True)
    video = clips.draw_plain(scene)
    right = closeness(video, scene)
    assert min(right.values()) > 0.85
    for word, names in {"color": clips.COLORS, "background": clips.BACKGROUNDS, "direction": clips.DIRECTIONS}.items():
        for name in {*names} - {getattr(scene, word)}:
            wrong = clips.PlainScene(**{**{at: getattr(scene, at) for at in scene.__slots__}, word: name})
            assert closeness(video, wrong)[word] < right[word], (word, name)
    blank = np.full((5, 64, 64, 3), clips.BACKGROUNDS[scene.background], np.uint8)
    assert closeness(blank, scene) == {"background": pytest.approx(1.0), "color": 0.0, "shape": 0.0, "direction": 0.0}
    assert model_closeness("wan-plain", 0, video) == pytest.approx(np.mean(list(right.values())))


def test_what_comes_again_in_a_picture_is_found_and_objects_are_counted():
    rng, repetition = np.random.default_rng(0), judge_larger.repetition
    noise = rng.random((48, 48, 3))
    assert repetition(np.tile(noise, (2, 2, 1)), 96) > 0.99
    assert repetition(np.tile(noise, (1, 2, 1)), 48) > 0.99
    assert repetition(rng.random((96, 96, 3)), 96) < 0.2
    assert repetition(np.ones((96, 96, 3)), 96) == 1.0
    for number in range(2):
        one, twice = (judge_larger.judged(np.concatenate([picture(number)] * count, axis=2), number, 96)
                      for count in (1, 2))  # fmt: skip
        assert one["objects_wrong"] == 0 < twice["objects_wrong"]
        assert one["score"] > 0.9
        assert twice["repetition"] > one["repetition"]


def test_a_clip_that_comes_round_or_stands_still_is_told_from_one_that_goes_on():
    assert judge_longer.repetition(np.concatenate([drawn(frames=33)] * 2), 33) == 0
    assert judge_longer.repetition(drawn(frames=33), 33) > 0.02
    for seed in range(3):
        clip = drawn(seed)  # one way, across the whole clip
        again = np.concatenate([clip[::2], clip[::2]])  # the object jumps back where it began
        assert loop_rise(clip, 17) < 0.6
        assert loop_rise(np.concatenate([clip[30:47]] * 4), 17) > 1.4
        assert loop_rise(np.roll(again, 5, axis=0), 17) > 1.4  # whatever its opening frames
        assert path_distance(clip) < 1 < 4 < path_distance(again)
    still = np.repeat(clip[:1], 40, 0)
    assert (judge_longer.repetition(still, 33), loop_rise(still, 17)) == (0, 2.0)
    assert np.isnan(path_distance(still * 0))


def test_each_stretch_of_a_clip_is_judged(monkeypatch):
    assert min(by_stretch("wan-plain", 3, drawn())) > 0.8
    gone = np.concatenate([drawn()[:33], np.repeat(drawn()[-1:] * 0, 32, 0)])
    assert by_stretch("wan-plain", 3, gone)[1] < 0.6
    assert len(by_stretch("wan-plain", 3, drawn()[:33])) == len(by_stretch("wan-plain", 3, drawn()[:20])) == 1
    monkeypatch.setattr(catalog, "model_names", lambda: ("wan-tiny",))  # of the richer world, 17 frames long
    number = next(n for n in range(40) if "moving" in catalog.held_out_prompts("wan-tiny", n + 1)[n])
    clip = painter.draw(world.scene_of(0, number, held_out=True), 49).astype(np.float32) / 255
    assert len(stretches := by_stretch("wan-tiny", number, clip)) == 3
    assert min(stretches) > 0.7
    again = np.concatenate([clip[:17]] * 3)[:49]  # begins again where it should go on
    assert model_path_error("wan-tiny", number, clip) < 1 < model_path_error("wan-tiny", number, again)


class Longer(DrawnModel):
    """Draws the clip, and plain long ones backwards."""

    name = "wan-plain"

    def draw(self, clip, call, plain):
        frames = drawn(clip, call["num_frames"])
        return frames[::-1] if call["num_frames"] > 33 and plain else frames


class Larger(DrawnModel):
    """Draws the picture, and without methods twice beside itself."""

    name = "flux-tiny"

    def draw(self, clip, call, plain):
        return np.concatenate([picture(clip)] * (2 if call["height"] > 96 and plain else 1), axis=2)


RUNS = {
    "larger": (Larger, ("1x", "height = 96, width = 96"), ("2x", "height = 192, width = 96"), "ultraimage = { }\n",
               "objects_wrong", [0, 3, 0], ("| 1x | 2 | 0.00 |", "| 2x | -3.00 |")),
    "longer": (Longer, ("1x", "num_frames = 33"), ("2x", "num_frames = 65"), "ultravico = { alpha = 0.8 }\n",
               "score", [1.0, 0.75, 1.0], ("| 1x | 2 | 33 | 100% |", "| 2x, ours | 2x | 25.00 |")),
}  # fmt: skip


@pytest.mark.parametrize("kind", RUNS)
def test_a_suite_is_judged_goes_on_and_prints(kind, tmp_path, monkeypatch):
    model, short, long, methods, measure, expected, printed = RUNS[kind]
    arms = [ARM.format(name, 2, call) for name, call in (short, long, ("2x, ours", long[1]))]
    path, out = write(tmp_path, f"judge_{kind}", model.name, 2, *arms, methods)
    for _ in faked(monkeypatch, model):
        first = run_suite(path)
        assert first.exit_code == 0, first.output
        assert [(clip, many) for clip, _, many in model.made] == [(clip, many) for clip in (0, 1) for many in (0, 0, 1)]
        assert run_suite(path).stdout == first.stdout
        assert len(model.made) == 6
        lines = read_lines(out)
        assert [line[measure] for line in lines] == expected * 2
        assert all(row in first.stdout for row in printed)
        refused = run_suite(path, "--time", "--frames", tmp_path)
        assert f"judge_{kind}.py), without a dense run beside them; leave out --time and --frames" in refused.stderr
    if kind == "longer":
        suite, table = read_suite(path), judge_longer.table
        timed = [{**line, "loop_seconds": 1.52 * (1 + ("ours" in line["arm"]))} for line in lines]
        assert "| 100% | 1.5 |" in table(suite, timed)
        assert "| 2.00 |" in table(suite, timed)
        lost = [{**line, "path_error": float("nan")} if line["clip"] else line for line in lines]
        assert f"| {lines[0]['path_error']:.1f} (1) |" in table(suite, lost)
