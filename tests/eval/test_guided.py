"""Guidance at equal forwards: what is run and counted, what an arm is held against, and the continuous score."""

from functools import partial

import judge_guidance as guided
import numpy as np
import pytest
from dit_accel_assets import clips, model_closeness
from dit_accel_assets.checker import closeness
from dit_accel_eval.runs.results import read_lines
from dit_accel_eval.suites.arms import Arm
from dit_accel_eval.suites.suite import Suite, read_suite
from drawn_model import STUDIES
from fake_model import command

from dit_accel import PAG

SUITE = """
version = 2
name = "small"
judge = "JUDGE"
model = "wan-plain"
clips = 1
call = { height = 32, width = 32, num_frames = 5 }
[[arm]]
name = "off"
num_inference_steps = 2
call = { guidance_scale = 1.0 }
[[arm]]
name = "three"
num_inference_steps = 3
call = { guidance_scale = 3.0 }
[[arm]]
name = "pag"
num_inference_steps = 2
call = { guidance_scale = 3.0 }
pag = { layers = ["L3"] }
""".replace("JUDGE", str(STUDIES / "judge_guidance.py"))


run = partial(command, "run")


def test_a_suite_runs_counts_forwards_and_goes_on(tmp_path):
    path, out = tmp_path / "small.toml", tmp_path / "out.jsonl"
    path.write_text(SUITE)
    first = run(path, "--out", out)
    assert first.exit_code == 0, first.output
    lines = {line["arm"]: line for line in read_lines(out)}
    assert {name: line["forwards"] for name, line in lines.items()} == {"off": 2, "three": 6, "pag": 2 * (2 + 3 / 6)}
    told, before = first.stdout, out.read_text()
    assert run(path, "--out", out).stdout == told
    assert out.read_text() == before
    suite = read_suite(path)
    arms = {arm.name: arm for arm in suite.arms}
    assert guided.rival_of(suite, arms["pag"], list(lines.values())) is arms["three"]  # off has too few forwards
    assert guided.rival_of(suite, arms["three"], list(lines.values())) is None
    gained = 100 * (lines["pag"]["closeness"] - lines["three"]["closeness"])
    assert f"| pag | 3.0 | 2 | 5.0 | {lines['pag']['score']:.0%} |" in told
    assert f"| three | {gained:+.2f} too few |" in told
    path.write_text(SUITE.replace('layers = ["L3"]', 'layers = ["L4"]'))
    assert "holds results of arm 'pag' with methods" in run(path, "--out", out).stderr


def test_an_arm_is_held_against_plain_ones_of_its_own_forwards():
    arms = {name: Arm(name=name, num_inference_steps=1) for name in ("few", "equal", "also", "many")}
    arms["pag"] = Arm(name="pag", num_inference_steps=1, methods=(PAG(layers="L3"),))
    suite = Suite(name="s", model="wan-plain", clips=1, arms=tuple(arms.values()))
    values = {"few": (5, 0.99), "equal": (10, 0.8), "also": (12, 0.9), "many": (20, 0.95), "pag": (10, 0.7)}
    lines = [{"arm": name, "forwards": many, "closeness": close} for name, (many, close) in values.items()]
    assert guided.rival_of(suite, arms["pag"], lines) is arms["also"]
    dear = [line | {"forwards": 15} if line["arm"] == "pag" else line for line in lines]
    assert guided.rival_of(suite, arms["pag"], dear) is arms["many"]  # the only one with as many


def test_closeness_is_high_for_what_is_drawn_and_falls_where_a_word_is_wrong():
    _, scene, _ = clips.clip_of(0, frames=1, held_out=True)
    video = clips.draw_plain(scene)
    right = closeness(video, scene)
    assert min(right.values()) > 0.85
    other = {"color": clips.COLORS, "background": clips.BACKGROUNDS, "direction": clips.DIRECTIONS}
    for word, names in other.items():
        for name in names:
            if name != getattr(scene, word):
                wrong = clips.PlainScene(**{**{at: getattr(scene, at) for at in scene.__slots__}, word: name})
                assert closeness(video, wrong)[word] < right[word], (word, name)
    blank = np.full((5, 64, 64, 3), clips.BACKGROUNDS[scene.background], np.uint8)
    assert closeness(blank, scene) == {"background": pytest.approx(1.0), "color": 0.0, "shape": 0.0, "direction": 0.0}
    assert model_closeness("wan-plain", 0, video) == pytest.approx(np.mean(list(right.values())))
