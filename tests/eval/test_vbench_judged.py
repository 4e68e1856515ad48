"""Arms judged by VBench's names: what prompts ask for, runs that go on, and the table's verdicts."""

import json
from pathlib import Path

import judge_vbench as judged
import numpy as np
import pytest
from dit_accel_assets import clips, held_out_prompts, painter
from dit_accel_eval.runs.results import read_lines
from dit_accel_eval.suites.job import clips_of
from dit_accel_eval.suites.suite import read_suite
from drawn_model import STUDIES, run_suite
from world_scenes import model_scores, numbers, scene_of
from world_scores import TAKES_TIME

from dit_accel import ConfigError

SUITES = Path(__file__).parents[2] / "eval" / "suites"


def test_scenes_are_those_of_the_models_prompts():
    for number, prompt in enumerate(held_out_prompts("wan-plain", 12)):
        scene = scene_of("wan-plain", number)
        if "white" in prompt:
            assert scene is None
            continue
        assert scene is not None
        thing = scene.things[0]
        told = f"a {thing.color} {thing.shape} {thing.motion} {thing.speed}".strip()
        assert prompt == f"{told} on a {scene.ground} background"
    assert all("white" not in held_out_prompts("wan-plain", at + 1)[at] for at in numbers("wan-plain", 8))
    assert numbers("wan-plain", 8)[3:] == numbers("wan-plain", 5, numbers("wan-plain", 4)[-1])
    assert numbers("flux-tiny", 3) == [0, 1, 2]
    for number, prompt in enumerate(held_out_prompts("flux-tiny", 6)):
        scene = scene_of("flux-tiny", number)
        assert scene is not None
        assert all(thing.color in prompt and thing.motion == "still" for thing in scene.things)
        assert scene.ground in prompt
    with pytest.raises(ConfigError, match=r"scenes.*'other'"):
        scene_of("other", 0)


def test_drawn_clips_score_what_they_were_asked_for():
    number = numbers("wan-plain", 1)[0]
    _, _, frames = clips.clip_of(number, held_out=True)
    found = model_scores("wan-plain", number, (frames / 255).astype(np.float32))
    for name in ("object_class", "color", "scene", "human_action", "overall_consistency"):
        assert found[name] == 1, name
    for name in ("subject_consistency", "background_consistency", "motion_smoothness"):
        assert found[name] > 0.9, name
    assert not {"appearance_style", "temporal_style", "multiple_objects", "imaging_quality"} & set(found)
    backwards = model_scores("wan-plain", number, (frames[::-1] / 255).astype(np.float32))
    assert (backwards["human_action"], backwards["overall_consistency"]) == (0, 0.75)
    white = next(at for at in range(50) if "white" in held_out_prompts("wan-plain", at + 1)[at])
    with pytest.raises(ConfigError, match="white object"):
        model_scores("wan-plain", white, (frames / 255).astype(np.float32))


def test_of_pictures_nothing_is_asked_that_takes_time():
    scene = scene_of("flux-tiny", 0)
    assert scene is not None
    frames = (painter.draw(scene, 1) / 255).astype(np.float32)
    found = model_scores("flux-tiny", 0, frames)
    assert not set(TAKES_TIME) & set(found)
    assert all(
        found[name] == 1 for name in ("object_class", "multiple_objects", "color", "scene", "overall_consistency")
    )


@pytest.fixture
def suite(tmp_path) -> Path:
    (tmp_path / "suites").mkdir()
    path = tmp_path / "suites" / "s.toml"
    path.write_text(f"""version = 2
name = "s"
model = "wan-plain"
judge = "{STUDIES}/judge_vbench.py"
clips = 1
call = {{ num_frames = 5 }}
[[arm]]
name = "unipc"
num_inference_steps = [2, 1]
[[arm]]
name = "easycache"
num_inference_steps = 2
easycache = {{ threshold = 0.1 }}
""")
    return path


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped_and_prints_its_table(suite):
    out = suite.parent.parent / "results" / "s.jsonl"
    told = run_suite(suite)
    assert told.exit_code == 0, told.output
    lines = read_lines(out)
    assert [line["arm"] for line in lines] == ["unipc 2", "unipc 1", "easycache"]
    assert [line["work"] for line in lines[:2]] == [2, 1]
    assert all(0 < line["metrics"]["flickering"] <= 1 for line in lines)
    assert all(line["score"] == line["world"]["overall_consistency"] for line in lines)
    assert "| name@world | clips | unipc 2 | unipc 1 | easycache |" in told.stdout
    out.write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]) + '{"arm": "easyc')  # stopped
    again = run_suite(suite)
    assert again.exit_code == 0, again.output
    assert [line["arm"] for line in read_lines(out)] == ["unipc 2", "unipc 1", "easycache"]
    assert again.stdout == told.stdout
    assert again.stderr.count(": score ") == 1
    lines[0]["num_inference_steps"] = 3
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    refused = run_suite(suite)
    assert refused.exit_code == 2
    assert "holds results of arm 'unipc 2' with num_inference_steps 3" in refused.stderr


def line(arm: str, clip: int, **world: float) -> dict:
    return {"arm": arm, "clip": clip, "work": 2.0, "work_real": 2.0, "world": world}


def test_the_table_tells_what_is_ahead_or_behind_and_what_stands(suite):
    read = read_suite(suite)
    lines = []
    for clip in range(12):
        few = {"object_class": 1.0} if clip < 5 else {}
        fewer = {name: 0.9 for name in few}
        lines += [
            line("unipc 2", clip, color=0.9, scene=0.5 + clip / 100, **few),
            line("unipc 1", clip, color=0.4, scene=0.5, **fewer),
            line("easycache", clip, color=0.9, scene=0.5 + (clip % 3) / 100, **fewer),
        ]
    rows = judged.table(read, lines).splitlines()
    assert "| *own work, steps* | 12 | 2.0 | 2.0 | 2.0 |" in rows
    assert "| color | 12 | 0.90 | 0.40 behind | 0.90 |" in rows
    assert "| scene | 12 | 0.56 | 0.50 behind | 0.51 behind |" in rows
    assert "| object_class | 5 | 1.00 | 0.90 | 0.90 |" in rows  # too few clips
    assert rows[-1].startswith("Not reported for this model's clips: subject_consistency, background_consistency")
    assert "color" not in rows[-1]
    assert "| color | 11 |" in judged.table(read, lines[:-1])  # a clip of which an arm is missing is left out


def test_metrics_are_ranked_with_the_names_over_a_clips_arms(suite):
    read = read_suite(suite)
    lines = []
    for clip in range(2):
        for place, arm in enumerate(("unipc 2", "unipc 1", "easycache")):
            turned = place if clip == 0 else -place
            lines.append(line(arm, clip, motion_smoothness=place / 10) | {"metrics": {"warp-error@dis": turned / 5}})
    told = judged.table(read, lines)
    assert "| motion_smoothness | `warp-error@dis` | 0.00 | 2 |" in told
    assert "| dimension | metric | rank correlation within a clip | clips |" in told
    assert "rank correlation" not in judged.table(read, [one | {"metrics": {}} for one in lines])


def test_suites_begin_with_the_dense_run_and_are_of_one_size(suite):
    for path in SUITES.glob("vbench-*.toml"):
        judged.check_suite(read_suite(path))
    steps, text = "num_inference_steps = [2, 1]", suite.read_text()
    other = text.replace('"unipc"', '"other"').replace(steps, f"{steps}\neasycache = {{ threshold = 0.2 }}")
    sized = text + "call = { num_frames = 9 }\n"
    for wrong, why in (
        (other, "suite s begins with 'other 2'; put the dense run first"),
        (sized, "all arms run at one size, got {'num_frames': 9} for 'easycache'"),
    ):
        suite.write_text(wrong)
        for options in ((), ("--table",)):
            refused = run_suite(suite, *options)
            assert refused.exit_code == 2
            assert why in " ".join(refused.stderr.split())


def test_suites_run_the_clips_whose_scenes_are_known(suite):
    for path in SUITES.glob("vbench-*.toml"):
        lines = read_lines(SUITES.parent / "results" / f"{path.stem}.jsonl")
        assert clips_of(read_suite(path), None) == sorted({line["clip"] for line in lines})
    suite.write_text(suite.read_text().replace("clips = 1", "clips = 9\nfirst_clip = 4"))
    assert clips_of(read_suite(suite), 3) == [5, 6, 7]
