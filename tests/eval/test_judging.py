"""Judges of two clips: a command, a class, models that see; preference, position bias and agreement with pixels."""

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from dit_accel_eval.judging import vision
from dit_accel_eval.judging.asking import answers_of, ask, judge_named, pairs_of
from dit_accel_eval.judging.contract import OVERALL, Question, ShownClip
from dit_accel_eval.report.lines import read_results
from dit_accel_eval.runs.results import keep, read_lines, reference_of, run_of
from dit_accel_eval.statistics import rank_correlation
from fake_model import command, refuses, written
from scipy.stats import spearmanr
from tiny_judge import tiny_judge

LINES = Path(__file__).parents[2] / "eval" / "results" / "sparse-wan-tiny.jsonl"
ARM, OTHER, CLIPS = "radial 12", "unipc 11", 8
BY_BRIGHTNESS = """
import json, sys
import numpy as np
from PIL import Image
for line in sys.stdin:
    asked = json.loads(line)
    scores = [float(np.asarray(Image.open(asked[side][-1])).mean()) / 25 for side in ("first", "second")]
    print(json.dumps({"scores": [scores[0] + 0.25, scores[1]]}))
"""
"""A judge that likes brightness, and a little what it sees first."""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Results whose kept frames are as bright as their PSNR, in tenths of a percent."""
    folder = tmp_path_factory.mktemp("judged")
    lines = [line for line in read_lines(LINES) if line["clip"] < CLIPS and line["arm"] in (ARM, OTHER)]
    for line in lines:
        line |= {"kept": f"{line['arm']}-{line['clip']}.png", "kept_reference": f"{line['clip']}.png"}
        line["metrics"] = {"lpips@alex": 1 - line["psnr"] / 100, "motion": 0.5}
        white = np.ones((5, 16, 16, 3), np.float32)
        keep(folder / line["kept"], white * line["psnr"] / 100, run_of(line))
        keep(folder / line["kept_reference"], white, reference_of(line))
    (folder / "judge.py").write_text(BY_BRIGHTNESS)
    return written(folder / "r.jsonl", lines)


def stand_in(results: Path) -> str:
    return shlex.join([sys.executable, str(results.parent / "judge.py")])


def psnrs(results: Path, arm: str) -> np.ndarray:
    return np.array([line["psnr"] for line in read_lines(results) if line["arm"] == arm])


def test_a_command_is_asked_in_both_orders_and_its_bias_taken_out(results, tmp_path):
    out = tmp_path / "answers.jsonl"
    options = ("--against", OTHER, "--judge", stand_in(results), "--json", "-o", out)
    data = json.loads(command("judge", results, "--arm", ARM, *options).stdout)
    said = data["questions"][OVERALL]
    gaps = (psnrs(results, ARM) - psnrs(results, OTHER)) / 100 * 255 / 25
    assert said["preference"]["mean"] == pytest.approx(gaps.mean(), abs=0.05)
    assert said["preference"]["count"] == data["clips"] == CLIPS
    assert said["bias"]["mean"] == pytest.approx(0.25)
    assert said["turned"] == np.mean(np.abs(gaps) < 0.25)
    assert said["agreement"]["psnr"]["mean"] == pytest.approx(1, abs=0.1)
    assert said["agreement"]["lpips@alex"] == said["agreement"]["psnr"]  # of which less is better
    assert "motion" not in said["agreement"]
    answers = read_lines(out)
    assert [(line["clip"], line["first"]) for line in answers[:2]] == [(0, "arm"), (0, "other")]
    assert answers[0]["arm"] - answers[1]["arm"] == pytest.approx(0.25)


def test_without_another_arm_the_references_stand_beside(results):
    found = command("judge", results, "--arm", ARM, "--judge", stand_in(results), "--question", "Is it bright?")
    assert found.stdout.startswith("Is it bright?\n")
    assert "] behind\n  position bias  +0.25" in found.stdout
    assert "above the reference, 8 clips in both orders" in " ".join(found.stderr.split())


def test_a_class_in_a_file_is_a_judge(results, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "class Mine:\n    name, questions = 'mine', ('first?',)\n"
        "    def answers(self, asked):\n        return [(len(q.first.frames()), 0) for q in asked]\n"
    )
    pairs = pairs_of(read_results(results).lines, results.parent, ARM, OTHER, 3, 16)
    figures = answers_of(ask(judge_named(f"{path}:Mine"), pairs, ("first?",)), pairs)["first?"]
    assert (figures.preference.mean, figures.bias.mean, figures.turned) == (0, 3, 1)
    assert figures.agreement == {"psnr": None, "ssim": None, "lpips@alex": None}  # it prefers nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--arm", "radial", "--judge", "x"), "no arm 'radial'; did you mean 'radial 12'"),
        (("--arm", ARM, "--judge", "nonesuch"), "no judge 'nonesuch'"),
        (("--arm", ARM, "--judge", "likert"), "likert=Qwen"),
        (("--arm", ARM, "--judge", "likert=no/model"), "hf download no/model"),
        (("--arm", ARM, "--judge", "none.py:Mine"), "no class 'Mine' in none.py"),
        (("--arm", ARM, "--judge", f"{sys.executable} -c 'raise SystemExit(3)'"), "exit code 3"),
        (("--arm", ARM, "--judge", f"{sys.executable} -c 'print(1)'"), "printed 1 lines for 16"),
        (("--arm", ARM, "--judge", f"{sys.executable} -c 'print(16 * \"{{}}\\n\")'"), "answered '{}'"),
    ],
)
def test_what_can_not_judge_is_refused_in_a_line(results, options, message):
    refuses(message, "judge", results, *options)


def test_results_without_their_own_frames_are_refused(results, tmp_path):
    lines = written(tmp_path / "r.jsonl", read_lines(results))
    refuses("16 clips can't be shown", "judge", lines, "--arm", ARM, "--judge", stand_in(results))
    lines.write_text(results.read_text().replace('"solver": "unipc"', '"solver": "euler"'))
    for line in read_lines(results):
        (tmp_path / line["kept"]).write_bytes((results.parent / line["kept"]).read_bytes())
    refuses("solver 'unipc', not 'euler'", "judge", lines, "--arm", ARM, "--judge", stand_in(results))


def test_rank_correlation_is_spearmans_with_an_interval():
    first, second = np.random.default_rng(0).normal(size=(2, 30))
    found = rank_correlation(first, first + second)
    assert found.mean == pytest.approx(spearmanr(first, first + second).statistic)
    assert -1 < found.low < found.mean < found.high < 1
    assert rank_correlation(first[:5], second[:5]) is rank_correlation(first, np.ones(30)) is None


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_judge(tmp_path_factory.mktemp("vlm"))


@pytest.fixture
def clips(tmp_path) -> list[ShownClip]:
    paths = [tmp_path / f"{seed}.png" for seed in range(2)]
    for seed, path in enumerate(paths):
        keep(path, np.random.default_rng(seed).random((5, 16, 16, 3), dtype=np.float32), {})
    return [ShownClip(path, 4, 2.0) for path in paths]


def asked(question: str, clips: list[ShownClip]) -> list[Question]:
    orders = (clips, clips[::-1])
    return [Question(question=question, prompt="a kite", first=first, second=second) for first, second in orders]


def test_a_likert_judge_sees_every_frame_of_both_clips(model, clips, monkeypatch):
    judge, counts = judge_named(f"likert={model}", "cpu"), []
    inputs = judge.model.inputs
    counted = lambda *args, images: counts.append(len(images)) or inputs(*args, images=images)  # noqa: E731
    monkeypatch.setattr(judge.model, "inputs", counted)
    there, back = judge.answers(asked(judge.questions[0], clips))
    assert counts == [8] * 4
    assert all(1 < score < 5 for score in (*there, *back))
    assert len({*there, *back}) == 4  # which clip comes first changes each


def test_videoscore2_scores_a_clip_alike_in_both_orders(model, clips, monkeypatch):
    monkeypatch.setattr(vision, "THINKING", 4)
    judge = judge_named(f"videoscore2={model}", "cpu")
    about = {"total_num_frames": 4, "frames_indices": [0, 1, 2, 3], "fps": 2.0}
    seen = {"videos": [clips[0].frames()], "do_sample_frames": False, "video_metadata": [about]}
    assert list(judge.model.inputs([{"type": "video"}], "", **seen)["second_per_grid_ts"]) == [2 / 2.0]
    for question in judge.questions:
        there, back = judge.answers(asked(question, clips))
        assert there == back[::-1]
        assert len({*there}) == 2
    with pytest.raises(vision.ConfigError, match="got 'beauty'"):
        list(judge.answers(asked("beauty", clips)))
