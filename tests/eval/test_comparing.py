"""`eval compare`: settings of one's own pipeline against its dense runs, the cost said before, a page at the end."""

import dataclasses
import json
from pathlib import Path

import pytest
from dit_accel_eval.comparing import CompareOptions, suite_of
from dit_accel_eval.runs.results import read_lines
from dit_accel_eval.statistics import FEWEST
from dit_accel_eval.suites import compare
from dit_accel_eval.suites.arms import Arm
from dit_accel_eval.suites.compare import SuiteProgress, clip_steps, cost_of
from dit_accel_eval.suites.job import Job
from dit_accel_eval.suites.suite import Suite, read_suite
from fake_model import FakeModel
from model_folders import model_folder
from typer.testing import CliRunner

from dit_accel import ConfigError
from dit_accel.cli.app import app
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
    monkeypatch.setattr(compare, "EmbeddedModel", FakeModel)
    monkeypatch.setattr(FakeModel, "made", [])
    compare._loaded.cache_clear()
    yield FakeModel
    compare._loaded.cache_clear()


def command(*arguments):
    return CliRunner().invoke(app, ["eval", "compare", *map(str, arguments)])


FAKED = ("--model", "wan-plain", "--steps", 10, "--sol", "-m", "flickering")


def test_a_setting_is_held_against_own_steps_and_dense_runs_of_its_work(fake, here):
    found = command(*FAKED, "--clips", 6, "--no-frames")
    assert found.exit_code == 0, found.output
    said = " ".join(found.stderr.split())
    assert "PSNR of 1 setting to the model's own 10 steps of the same prompt and seed" in said
    assert "Holm's correction over all settings (5%)" in said
    assert "compare: 6 clips, 120 to 396 denoising steps to run (references 60, arms 60," in said
    assert "too few clips" not in said
    lines = read_lines(here / "compare.jsonl")
    assert {line["reference"] for line in lines} == {"own, 10 steps of its own"}
    assert {line["clip"] for line in lines} == {*range(48, 54)}  # those that chose no preset
    assert {(line["arm"], line["solver"]) for line in lines} == {
        ("sol", "own"), ("dense 6", "own"), ("dense 7", "own"), ("dense 8", "own"),
    }  # fmt: skip
    (head, row) = found.stdout.splitlines()[-3:-1]
    assert head.split()[:2] == ["setting", "work,"]
    assert row.split()[:3] == ["sol", "7.50", "1.33"]
    assert row.split()[-1] == "ahead"
    assert found.stdout.splitlines()[-1] == "compare.html"
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
    stopped = command(*few)
    assert stopped.exit_code == 130
    assert "what has run stands in compare.jsonl, and the same command goes on there" in " ".join(
        stopped.stderr.split()
    )
    kept = len(read_lines(here / "compare.jsonl"))
    assert kept > 0
    assert not (here / "compare.html").exists()
    whole = command(*few)
    assert whole.exit_code == 0
    assert " are done" in whole.stderr
    assert len(made) == 1 + 2 * 5  # the one that was stopped is made again: a reference, the setting, three dense runs
    assert command(*few, "--quiet").stdout == "compare.html\n"
    assert len(made) == 1 + 2 * 5


def test_few_clips_are_warned_of_before_they_run(fake, here):
    found = command(*FAKED, "--clips", 2, "--no-frames")
    said = " ".join(found.stderr.split())
    assert said.index("too few clips for a verdict: 2, and it takes 6; add prompts, or seeds") < said.index("clip 48 ")
    assert found.stdout.splitlines()[-2].endswith("too few")
    assert not (here / "compare.frames").exists()


def test_each_preset_and_config_is_a_setting_and_the_switches_are_one(fake, here):
    (here / "tuned.toml").write_text(
        'version = 1\n[run]\nnum_inference_steps = 7\nsolver = "euler"\n[easycache]\nthreshold = 0.1\n'
    )
    arguments = ["--preset", "careful", "--preset", "fast", "--config", "tuned.toml", "--easycache", "--radial"]
    found = command(*FAKED[:4], *arguments, "--set", "easycache.threshold=0.3", "-m", "flickering", "--clips", 1)
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
    assert mine.call == {"guidance_scale": 3.0, "true_cfg_scale": 3.0}
    assert (fast.call, fast.num_inference_steps, mine.num_inference_steps) == ({}, 4, 3)
    assert (mine.solver, mine.flow_shift, suite.reference_solver) == ("unipc", None, "unipc")
    assert suite.rival(3).name == "unipc 3"
    converged = suite_of(dataclasses.replace(options, reference="converged", solver=None), [])
    assert (converged.first_clip, converged.clips) == (48, 8)
    assert (converged.reference_steps, converged.rival(3).name, converged.arms[0].solver) == (None, "unipc 3", "own")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "eval compare got no setting; add, say, --easycache"),
        (("--preset", "fsat"), "no preset is called 'fsat'; did you mean 'fast'"),
        (("--preset", "none"), "preset none: nothing that this model takes"),
        (("--easycache", "--reference", "covnerged"), "there is no reference 'covnerged'; take own or converged"),
        (("--easycache", "--prompts", "gone.txt"), "--prompts gone.txt can't be read"),
        (("--easycache", "--prompts", "empty.txt"), "--prompts empty.txt has no prompt in it"),
        (("--easycache", "--prompts", "p.txt", "--prompt", "a circle"), "takes --prompt or --prompts, got both"),
        (("--easycache", "--prompt", "a zebra"), "unknown word(s) zebra"),
        (("--easycache", "--clips", "17"), "wan-tiny has 16 held-out prompts for this"),
        (("--easycache", "--seed", "3"), "each with its seed; add --prompts FILE"),
        (("--easycache", "--model", "./gone"), "gone"),
        (("--easycache", "--model", "{tiny}"), "eval compare has no prompts of its own for "),
        (("--easycache", "--height", "33"), "height must be a multiple of 16"),
        (("--radial", "--model", "flux-tiny", "-m", "psnr-change"), "arm 'radial': radial makes no sense on flux"),
        (("--easycache", "--solver", "heun"), "there is no solver 'heun'"),
        (("--easycache", "-m", "lpps"), "there is no metric 'lpps'"),
        (("--easycache", "--config", "gone.toml"), "--config gone.toml can't be read"),
        (("--config", "none.toml", "--solver", "unipc"), "call it 'unipc 20'"),
        (("--config", "easy.toml", "--config", "other/easy.toml"), "two arms called 'easy'"),
        (("--easycache", "--step", "3"), "No such option: --step"),
        (("--easycache", "-o", "page.txt"), "the page must be a .html, got page.txt; write, say, -o page.html"),
        (("--easycache", "-o", "gone/page.html"), "is not a folder; create it first"),
        (("--easycache", "-o", "other.html"), "other.html is there, and no other.jsonl"),
        (("--easycache", "-o", "full.html"), "full.frames is there, and no full.jsonl"),
        (("--easycache", "-o", "strange.html"), "strange.jsonl, line 1 lacks clip"),
    ],
)
def test_what_can_not_be_compared_is_one_line_before_anything_runs(fake, here, arguments, message):
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
    if "{tiny}" in arguments:
        model_folder(here / "tiny")
    found = command(*(one.format(tiny=here / "tiny") for one in arguments))
    assert found.exit_code == 2, found.output
    assert message in " ".join(found.stderr.split())
    assert found.stderr.splitlines()[-1].startswith("error: ")
    assert fake.made == []


def test_results_of_another_call_are_refused(fake, here):
    assert command(*FAKED, "--clips", 1, "--no-frames").exit_code == 0
    made, before = len(fake.made), (here / "compare.jsonl").read_text()
    for arguments, message in (
        ((*FAKED, "--steps", 9), "reference 'own, 10 steps of its own', this suite has 'own, 9 steps of its own'"),
        ((*FAKED, "--reference", "converged"), "this suite has 'unipc, agreeing to 45 dB'"),
        ((*FAKED, "--num-frames", 5), "holds results of call"),
        ((*FAKED, "--easycache"), "holds results of sol, which is none of sol + easycache; name all settings"),
        ((*FAKED, "--prompt", "a circle"), "holds clip 48 of prompt"),
    ):
        found = command(*arguments)
        assert found.exit_code == 2
        assert message in " ".join(found.stderr.split())
    assert (len(fake.made), (here / "compare.jsonl").read_text()) == (made, before)


def job_of(**changes) -> Job:
    arms = (Arm(name="a", num_inference_steps=10, solver="euler"), Arm(name="b", num_inference_steps=4, solver="dpm++"))
    job = {key: changes.pop(key) for key in ("timed",) if key in changes}
    suite = Suite(name="s", model="wan-plain", clips=2, arms=arms, **changes)
    return Job(suite=suite, out=Path("s.jsonl"), cache=Path(), threads=1, **{"timed": False, **job})


@pytest.mark.parametrize(
    ("changes", "references", "arms"),
    [
        ({"reference_steps": 50}, [50, 50], 14),
        ({}, [16 + 32, 16 + 32 + 64 + 128 + 256 + 512], 14),
        ({"reference_steps": 50, "timed": True}, [51, 51], 28),
        ({"reference_steps": 50, "repeats": 3}, [50, 50], 42),
    ],
)
def test_cost_before_a_run_is_exact_for_own_steps_and_bounds_for_a_search(changes, references, arms):
    job = job_of(**changes)
    found = {key: ends.tolist() for key, ends in clip_steps(job, []).items()}
    repeats = job.suite.repeats
    assert [*found.values()] == [references, [arms, arms], [0, repeats * sum(range(1, 12))]]
    low, high = references[0] + arms, references[1] + arms + repeats * 66
    assert cost_of(job, range(2), []).startswith(f"s: 2 clips, {2 * low:,} to {2 * high:,} denoising steps to run (")


def test_minutes_are_said_after_the_first_run_and_once_more_when_a_clip_is_whole(monkeypatch):
    job, said = job_of(reference_steps=50), []
    progress = SuiteProgress(job, range(3), quiet=True, workers=2)
    monkeypatch.setattr(progress, "_say", said.append)
    line = {
        "clip": 0,
        "work": 5.0,
        "work_real": 5.0,
        "solver": "euler",
        "times": {"text": 1, "denoise": 8, "decode": 1},
    }
    first = {**line, "arm": "a", "num_inference_steps": 10, "reference_steps": 50}
    second = {**line, "arm": "b", "num_inference_steps": 4, "reference_steps": 50}
    rival = {**line, "arm": "unipc 5", "num_inference_steps": 5, "reference_steps": 50}
    lines = []
    progress.show(lines)
    for one in (first, second, rival, {**first, "clip": 1}):
        lines.append(one)
        progress.show(lines)
    steps, early, exact = said
    assert steps.startswith("s: 3 clips, 192 to 390 denoising steps")
    assert early == "a dense step takes 2 s: about 2 to 5 minutes are left"
    assert exact == "a dense step takes 2 s: about 2 minutes are left"  # 3 x 69 steps, 64 done, by two processes


def test_a_suite_may_name_the_solver_of_its_own_reference(tmp_path):
    text = 'version = 2\nname = "s"\nmodel = "wan-plain"\nclips = 1\n{}[[arm]]\nname = "a"\nsolver = "euler"\n'
    text += "num_inference_steps = 2\n"
    path = tmp_path / "s.toml"
    path.write_text(text.format('reference_steps = 9\nreference_solver = "own"\n'))
    suite = read_suite(path)
    assert suite.rival(4) == Arm(name="dense 4", num_inference_steps=4, solver="own")
    for keys, message in (
        ('reference_solver = "own"\n', "reference_solver without reference_steps"),
        ('reference_steps = 9\nreference_solver = "onw"\n', "reference_solver 'onw'; did you mean 'own'"),
    ):
        path.write_text(text.format(keys))
        with pytest.raises(ConfigError, match=message):
            read_suite(path)


def test_a_folder_is_compared_on_its_own_prompts(here):
    model_folder(here / "tiny")
    (here / "p.txt").write_text(PROMPTS)
    arguments = (
        "--model",
        "tiny",
        "--easycache",
        "--set",
        "easycache.warmup_steps=1",
        "--set",
        "easycache.threshold=9",
    )
    sizes = ("--steps", 3, "--height", 32, "--width", 32, "--num-frames", 5)
    found = command(*arguments, *sizes, "--prompts", "p.txt", "-m", "flickering", "-o", "mine.html")
    assert found.exit_code == 0, found.output
    lines = read_lines(here / "mine.jsonl")
    assert {(line["clip"], line["prompt"], line["seed"]) for line in lines} == {
        (0, "a red circle moving right", 0), (1, "a blue square going up", 1),
    }  # fmt: skip
    dearest = max(lines, key=lambda line: line["num_inference_steps"])
    assert dearest["reference_steps"] == 3
    assert "dense step takes" in found.stderr
    assert json.loads((here / "mine.jsonl").read_text().splitlines()[0])["model"] == "tiny"
    assert "mine.media/" in (here / "mine.html").read_text()
    assert any((here / "mine.media").iterdir())


def test_the_page_s_example_of_a_suite_reads_and_can_give_a_verdict(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "evaluating.md").read_text()
    (tmp_path / "mine.toml").write_text(page.partition("```toml\n")[2].partition("```")[0])
    assert read_suite(tmp_path / "mine.toml").clips >= FEWEST


def test_a_suite_outside_of_suites_has_its_results_beside_it(fake, here):
    (here / "mine").mkdir()
    (here / "mine" / "s.toml").write_text(
        'version = 2\nname = "s"\nmodel = "wan-plain"\nclips = 1\n[[arm]]\nname = "a"\nsolver = "euler"\n'
        "num_inference_steps = 2\n"
    )
    found = CliRunner().invoke(app, ["eval", "run", "mine/s.toml"])
    assert (found.exit_code, (here / "mine" / "s.jsonl").is_file()) == (0, True)
    assert "s: 1 clip, 50 to 1,016 denoising steps to run (references 48 to 1,008, arms 2, " in found.stderr
