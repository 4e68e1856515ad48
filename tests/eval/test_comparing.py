"""`eval compare`: settings of one's own pipeline against its dense runs, the rule said before, a page at the end."""

import dataclasses
from functools import partial
from pathlib import Path

import pytest
from dit_accel_eval.compare_options import CompareOptions
from dit_accel_eval.comparing import suite_of
from dit_accel_eval.runs.results import read_lines
from dit_accel_eval.statistics import FEWEST
from dit_accel_eval.suites.suite import read_suite
from fake_model import command, faked, refuses, told
from model_folders import model_folder

from dit_accel.cli.console import OUT
from dit_accel.cli.method_options import NamedSetting

PROMPTS = "a red circle moving right\n\na blue square going up\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    """An empty folder to run in, whose dense runs are kept in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(OUT, "_width", 160)
    return tmp_path


@pytest.fixture
def fake(here, monkeypatch):
    yield from faked(monkeypatch)


compare = partial(command, "compare")
FAKED = ("--model", "wan-plain", "--steps", 10, "--sol", "-m", "flickering")


def test_a_setting_is_held_against_own_steps_and_dense_runs_of_its_work(fake, here):
    found = compare(*FAKED, "--clips", 6, "--no-frames")
    assert found.exit_code == 0, found.output
    said = told(found)
    assert "PSNR of 1 setting to the model's own 10 steps of the same prompt and seed" in said
    assert "Holm's correction over all settings (5%)" in said
    assert "compare: 6 clips x 1 arm, 0 of 6 runs are done; the dense runs that" in said
    assert "too few clips" not in said
    lines = read_lines(here / "compare.jsonl")
    assert {line["reference"] for line in lines} == {"own, 10 steps of its own"}
    assert {line["clip"] for line in lines} == {*range(48, 54)}  # those that chose no preset
    assert {(line["arm"], line["solver"]) for line in lines} == {
        ("sol", "own"), ("dense 6", "own"), ("dense 7", "own"), ("dense 8", "own"),
    }  # fmt: skip
    (head, row, last) = map(str.split, found.stdout.splitlines()[-3:])
    assert (head[:2], row[:3], row[-1]) == (["setting", "work,"], ["sol", "7.50", "1.33"], "ahead")
    assert last == ["compare.html"]
    assert "runs of the model's own scheduler" in said
    assert "dense 7" in (here / "compare.html").read_text()


def test_what_was_stopped_goes_on_and_what_is_whole_runs_nothing(fake, here, monkeypatch):
    right, made = fake.run, []

    def stopping(self, clip, **options):
        made.append(clip)
        if len(made) == 9:
            raise KeyboardInterrupt
        return right(self, clip, **options)

    monkeypatch.setattr(fake, "run", stopping)
    few = (*FAKED, "--clips", 2, "--no-frames")
    stopped = compare(*few)
    assert (stopped.exit_code, (here / "compare.html").exists()) == (130, False)
    assert "what has run stands in compare.jsonl, and the same command goes on there" in told(stopped)
    assert read_lines(here / "compare.jsonl")
    said = told(compare(*few))
    assert "of 2 runs are done" in said
    assert "too few clips for a verdict: 2, and it takes 6; add prompts, or seeds" in said
    assert len(made) == 1 + 2 * 5  # the one that was stopped is made again: a reference, the setting, three dense runs
    assert compare(*few, "--quiet").stdout == "compare.html\n"
    assert len(made) == 1 + 2 * 5


def test_each_preset_and_config_is_a_setting_and_the_switches_are_one(fake, here):
    (here / "tuned.toml").write_text(
        'version = 1\n[run]\nnum_inference_steps = 7\nsolver = "euler"\n[easycache]\nthreshold = 0.1\n'
    )
    arguments = ["--preset", "careful", "--preset", "fast", "--config", "tuned.toml", "--easycache", "--radial"]
    found = compare(*FAKED[:4], *arguments, "--set", "easycache.threshold=0.3", "-m", "flickering", "--clips", 1)
    assert found.exit_code == 0, found.output
    arms = {line["arm"]: line for line in read_lines(here / "compare.jsonl") if line["methods"]}
    assert list(arms) == ["careful", "fast", "tuned", "radial + easycache threshold=0.3"]
    tuned = arms["tuned"]
    assert (tuned["num_inference_steps"], tuned["solver"]) == (7, "euler")
    assert tuned["methods"]["easycache"]["threshold"] == 0.1
    assert "note: preset careful: easycache" in found.stderr


def test_a_file_may_set_guidance_and_a_named_solver_holds_for_all():
    options = CompareOptions(model="flux-tiny", steps=4, solver="unipc", guidance_scale=2.0, preset=["fast"])
    run = {"guidance_scale": 3.0, "solver": "euler", "flow_shift": 2.0}
    suite = suite_of(options, [NamedSetting(name="mine", methods=(), run={**run, "num_inference_steps": 3})])
    fast, mine = suite.arms
    assert suite.call["true_cfg_scale"] == 2.0
    assert (suite.warmup, suite_of(dataclasses.replace(options, timed=True), []).warmup) == (0, 1)
    assert mine.call == {"guidance_scale": 3.0, "true_cfg_scale": 3.0}
    assert (fast.call, fast.num_inference_steps, mine.num_inference_steps) == ({}, 4, 3)
    assert (mine.solver, mine.flow_shift, suite.reference_solver) == ("unipc", None, "unipc")
    assert suite.rival(3).name == "unipc 3"
    converged = suite_of(dataclasses.replace(options, reference="converged", solver=None), [])
    assert (converged.first_clip, converged.clips) == (48, 8)
    assert (converged.reference_steps, converged.rival(3).name, converged.arms[0].solver) == (None, "unipc 3", "own")


REFUSED = [
    ((), "eval compare got no setting; add, say, --easycache"),
    (("--preset", "fsat"), "no preset is called 'fsat'; did you mean 'fast'"),
    (("--easycache", "--reference", "covnerged"), "there is no reference 'covnerged'; take own or converged"),
    (("--easycache", "--prompts", "empty.txt"), "--prompts empty.txt has no prompt in it"),
    (("--easycache", "--prompts", "p.txt", "--prompt", "a circle"), "takes --prompt or --prompts, got both"),
    (("--easycache", "--clips", "17"), "wan-tiny has 16 held-out prompts for this"),
    (("--easycache", "--seed", "3"), "each with its seed; add --prompts FILE"),
    (("--easycache", "--model", "{tiny}"), "eval compare has no prompts of its own for "),
    (("--radial", "--model", "flux-tiny", "-m", "psnr-change"), "arm 'radial': radial makes no sense on flux"),
    (("--config", "none.toml", "--solver", "unipc"), "call it 'unipc 20'"),
    (("--config", "easy.toml", "--config", "other/easy.toml"), "two arms called 'easy'"),
    (("--easycache", "-o", "page.txt"), "the page must be a .html, got page.txt; write, say, -o page.html"),
    (("--easycache", "-o", "other.html"), "other.html is there, and no other.jsonl"),
    (("--easycache", "-o", "full.html"), "full.frames is there, and no full.jsonl"),
    (("--easycache", "-o", "strange.html"), "strange.jsonl, line 1 lacks clip"),
]


def test_what_can_not_be_compared_is_one_line_before_anything_runs(fake, here):
    (here / "other").mkdir()
    for name in ("easy.toml", "other/easy.toml"):
        (here / name).write_text("version = 1\n[easycache]\n")
    (here / "none.toml").write_text("version = 1\n")
    (here / "p.txt").write_text(PROMPTS)
    (here / "empty.txt").write_text("\n")
    (here / "other.html").write_text("mine")
    (here / "full.frames").mkdir()
    (here / "full.frames" / "mine.png").write_text("mine")
    (here / "strange.jsonl").write_text('{"a": 1}\n')
    model_folder(here / "tiny")
    for arguments, message in REFUSED:
        refuses(message, "compare", *(one.format(tiny=here / "tiny") for one in arguments))
    assert fake.made == []


def test_results_of_another_call_are_refused(fake, here):
    assert compare(*FAKED, "--clips", 1, "--no-frames").exit_code == 0
    made, before = len(fake.made), (here / "compare.jsonl").read_text()
    for arguments, message in (
        ((*FAKED, "--steps", 9), "reference 'own, 10 steps of its own', this suite has 'own, 9 steps of its own'"),
        ((*FAKED, "--reference", "converged"), "this suite has 'unipc, agreeing to 45 dB'"),
        ((*FAKED, "--num-frames", 5), "holds results of call"),
        ((*FAKED, "--easycache"), "holds results of sol, which is none of sol + easycache; name all settings"),
        ((*FAKED, "--prompt", "a circle"), "holds clip 48 of prompt"),
    ):
        refuses(message, "compare", *arguments)
    assert (len(fake.made), (here / "compare.jsonl").read_text()) == (made, before)


def test_a_folder_is_compared_on_its_own_prompts(here):
    model_folder(here / "tiny")
    (here / "p.txt").write_text(PROMPTS)
    cache = ("--set", "easycache.warmup_steps=1", "--set", "easycache.threshold=9")
    sizes = ("--steps", 2, "--height", 16, "--width", 16, "--num-frames", 5)
    where = ("--prompts", "p.txt", "-m", "flickering", "-o", "mine.html")
    found = compare("--model", "tiny", "--easycache", *cache, *sizes, *where)
    assert found.exit_code == 0, found.output
    lines = read_lines(here / "mine.jsonl")
    assert {(line["clip"], line["prompt"], line["seed"]) for line in lines} == {
        (0, "a red circle moving right", 0), (1, "a blue square going up", 1),
    }  # fmt: skip
    assert {(line["model"], line["reference_steps"]) for line in lines} == {("tiny", 2)}
    assert "mine.media/" in (here / "mine.html").read_text()
    assert any((here / "mine.media").iterdir())


def test_the_page_s_example_of_a_suite_reads_and_can_give_a_verdict(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "evaluating.md").read_text()
    (tmp_path / "mine.toml").write_text(page.partition("```toml\n")[2].partition("```")[0])
    assert read_suite(tmp_path / "mine.toml").clips >= FEWEST
