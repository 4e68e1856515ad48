"""Tuning a pipeline: the cheapest setting that meets a target, verified, resumed, written for generate, or refused."""

import functools
import json
import sys
from pathlib import Path

import pytest
from dit_accel_eval.runs.counting import Counts
from dit_accel_eval.runs.loaded import FIRST_PROMPT, embedded_prompts, tuning_request
from dit_accel_eval.runs.results import read_lines
from dit_accel_eval.suites import job, reference
from dit_accel_eval.suites.arms import Arm
from dit_accel_eval.suites.suite import read_suite
from dit_accel_eval.tune import pipeline as tune_pipeline
from dit_accel_eval.tune import pipeline_search
from dit_accel_eval.tune.pipeline_search import Measurement, Search, Target, read_target
from dit_accel_pipelines.families.wan import WAN
from fake_model import HEAD, FakeModel, command, faked
from model_folders import model_folder
from tuning import tune as tune_command
from typer.testing import CliRunner

import dit_accel
from dit_accel import ConfigError, EasyCache
from dit_accel.cli.app import app
from dit_accel.methods.toml import from_toml, run_table


class Cached(FakeModel):
    """n steps are 4 / n^2 off, by Euler 8; caches halve the work; what held-out prompts and shifts change is set."""

    spoil = spoil_cached = shifted = 1.0

    def error(self, clip, steps, solver, flow_shift, methods):
        error = (8.0 if solver == "euler" else 4.0) / steps**2 * (1.1 if methods else 1)
        if clip >= pipeline_search.HELD_OUT_FIRST:
            error *= self.spoil * (self.spoil_cached if methods else 1)
        return error * (self.shifted if flow_shift else 1)

    def cost(self, steps, methods):
        forwards = steps / 2 if any(isinstance(method, EasyCache) for method in methods) else steps
        counts = Counts(blocks=12 * forwards, attention=12 * forwards)
        return {"counts": counts, "attended": 1.0, "seconds": 1.0}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keep what is tuned out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def fake(monkeypatch):
    yield from faked(monkeypatch, Cached)


SPACE = (
    HEAD
    + """
[[arm]]
name = "unipc"
num_inference_steps = [6, 10, 12, 16, 20, 24, 30]
[[arm]]
name = "euler"
solver = "euler"
num_inference_steps = [6, 10, 16]
[[arm]]
name = "cached"
num_inference_steps = [10, 12, 14, 16]
easycache = { threshold = 0.05 }
"""
)


@pytest.fixture
def tune(tmp_path, fake, monkeypatch):
    pytest.importorskip("optuna", reason="optuna searches")
    (tmp_path / "space.toml").write_text(SPACE)
    monkeypatch.setattr(job, "_check_model", lambda suite: WAN.families[-1])

    def run(target: str, name: str = "fast.toml", by_hand: bool = False, **further):
        request = tuning_request(model="wan-plain", prompts=embedded_prompts("wan-plain", 1), **further)
        space = None if by_hand else tmp_path / "space.toml"
        options = dict(target=target, space=space, cache=tmp_path / "cache")
        return tune_pipeline.tune_pipeline(request, tmp_path / name, **options)

    return run


def test_the_cheapest_setting_that_meets_the_target_is_written_for_generate(tune, tmp_path, fake):
    """32 dB are an error of .025: 4 x 1.1 / n^2 is that at 13.3 steps, so a cache of 14, which cost 7, is cheapest."""
    tuned = tune("psnr=32")
    found = json.loads(json.dumps(tuned.found))
    chosen = found["chosen"]
    assert chosen["arm"] == "cached 14"
    assert (chosen["work"], chosen["prompts"]) == (7.0, pipeline_search.HELD_OUT)
    assert chosen["interval"][0] >= 32
    assert f"psnr {chosen['quality']:.4g} [{chosen['interval'][0]:.4g}, " in tuned.remarks[0]
    text = (tmp_path / "fast.toml").read_text()
    (method,) = from_toml(text)
    assert method == EasyCache(threshold=0.05)
    assert run_table(text) == {"num_inference_steps": 14, "solver": "unipc"}
    works = [point["work"] for point in found["frontier"]]
    assert works == sorted(works)
    assert any("cached 14" in row for row in tuned.rows)
    assert Path(found["kept"]).read_text() == text
    assert f"`dit-accel recommend` lists it first for this model, from {found['kept']}" in tuned.remarks
    first = dit_accel.recommend("wan-plain").settings[0]
    assert first.name == "psnr=32-64x64x17-20"
    assert first.speedup == pytest.approx(chosen["speedup"], abs=1e-3)
    assert first.losses == {"psnr": pytest.approx(chosen["quality"], abs=1e-3)}
    assert found["kept"] in first.sources[first.name]
    assert "easycache" in first.methods
    assert "num_inference_steps 14" in first.methods["run"]
    elsewhere = dit_accel.recommend("wan-plain", num_inference_steps=30)
    assert elsewhere.settings[0].name == "fast"
    assert f"tuned at another size, 64 x 64, 17 frames, 20 steps: {found['kept']}" in elsewhere.notes
    assert dit_accel.recommend("wan-tiny").settings[0].name == "fast"
    made = len(fake.made)  # a search that was stopped while it wrote goes on
    lines = (tmp_path / "fast.runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "fast.runs.jsonl").write_text("".join(lines[:-3]) + lines[-1][:20])
    assert tune("psnr=32").found["chosen"] == tuned.found["chosen"]
    assert len(fake.made) <= made + 3
    report = command("report", tmp_path / "fast.runs.jsonl")
    assert report.exit_code == 0, report.output


@pytest.mark.slow
def test_guidance_and_shift_are_written_as_they_were_tried(tune, tmp_path, fake, monkeypatch):
    shifted = SPACE + '[[arm]]\nname = "shifted"\nnum_inference_steps = 6\nflow_shift = 8.0\n'
    (tmp_path / "space.toml").write_text(shifted)
    monkeypatch.setattr(fake, "shifted", 0.1)
    found = tune("psnr=32", guidance_scale=3.0)
    assert found.found["chosen"]["arm"] == "shifted"
    run = run_table((tmp_path / "fast.toml").read_text())
    assert run == {"num_inference_steps": 6, "solver": "unipc", "flow_shift": 8.0, "guidance_scale": 3.0}


def test_half_of_one_s_own_prompts_are_held_out_and_none_of_those_that_chose():
    for count, rounds, first, held in (
        (4, (2,), 2, 2), (5, (2,), 2, 3), (7, (2, 3), 3, 4), (9, (2, 4), 4, 5), (12, (2, 4, 6), 6, 6),
        (40, (2, 4, 6), 6, 6),
    ):  # fmt: skip
        found = pipeline_search.split(count)
        assert (found.rounds, found.held) == (tuple(map(range, rounds)), range(first, first + held))
    with pytest.raises(ConfigError, match=r"4 prompts.*got 3"):
        pipeline_search.split(3)
    own = pipeline_search.HELD_OUT_PROMPTS
    assert not {*own.rounds[-1]} & {*own.held}
    assert own.rounds[0][0] >= FIRST_PROMPT  # beyond all that suites judge on


@pytest.mark.slow
def test_a_folder_is_tuned_with_prompts_of_one_s_own_for_generate(tmp_path, monkeypatch):
    pytest.importorskip("optuna", reason="optuna searches")
    monkeypatch.setattr(reference, "converged", functools.partial(reference.converged, first=4, most=8))
    model = model_folder(tmp_path / "tiny")
    (tmp_path / "space.toml").write_text(
        f'version = 2\nname = "space"\nmodel = "{model}"\nprompts = ["unused"]\n'
        '[[arm]]\nname = "unipc"\nnum_inference_steps = [3, 4]\n'
        '[[arm]]\nname = "cached"\nnum_inference_steps = [12]\neasycache = { threshold = 0.2, predictor = "taylor" }\n'
    )
    prompts = ["a red circle moving right", "a blue square going up", "a green triangle", "a white circle"]
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    size = ["--height", "32", "--width", "32", "--num-frames", "5", "--model", model]
    asked = ["--target", "speedup=2", "--space", tmp_path / "space.toml", "--num-inference-steps", "12"]
    found = tune_command(
        "pipeline", *size, *asked, "--prompt-file", tmp_path / "p.txt", "-o", tmp_path / "a.toml", "--json"
    )
    assert found.exit_code == 0, found.output
    chosen = json.loads(found.stdout)["chosen"]
    assert (chosen["prompts"], chosen["speedup"] >= 2) == (2, True)
    assert {line["prompt"] for line in read_lines(tmp_path / "a.runs.jsonl")} <= {*prompts}
    (first, *_) = dit_accel.recommend(model, height=32, width=32, num_frames=5, num_inference_steps=12).settings
    assert first.name == "speedup=2-32x32x5-12"
    few = tune_command("pipeline", *size, *asked[:6], "--prompt", "a", "-o", tmp_path / "few.toml")
    assert (few.exit_code, "takes 4 prompts at least" in few.stderr) == (2, True)


@pytest.mark.slow
def test_settings_that_can_not_be_cheaper_are_never_run_and_a_speed_up_is_met_by_the_best_quality(tune, fake):
    tune("psnr=20")
    steps = {steps for _, steps, solver, methods in fake.made if solver == "unipc" and not methods}
    assert not {20, 24, 30} & steps  # the search for the converged run takes 16 and 32
    chosen = tune("speedup=2.5", "other.toml").found["chosen"]
    assert (chosen["arm"], chosen["speedup"] >= 2.5) == ("cached 16", True)  # of 20 dense steps


def test_what_only_the_searched_prompts_like_is_not_written(tune, tmp_path, fake, monkeypatch):
    monkeypatch.setattr(fake, "spoil", 3.0)  # 9.5 dB less on the prompts that the search never saw
    with pytest.raises(ConfigError, match=r"psnr 32.*6 held-out prompts"):
        tune("psnr=32")
    assert not (tmp_path / "fast.toml").exists()
    assert read_lines(tmp_path / "fast.runs.jsonl")  # nothing of what was measured is lost


def point(name: str, quality: float, work: float, error: float = 0.0) -> Measurement:
    arm = Arm(name=name, num_inference_steps=1)
    return Measurement(arm=arm, prompts=6, quality=quality, error=error, work=work, speedup=20 / work)


def test_the_choice_meets_the_target_by_a_standard_error():
    search = Search(job=None, target=Target(name="psnr", value=30.0), stages=None, own=20)
    points = [point("lucky", 30.5, 4.0, 1.0), point("sure", 31.0, 6.0, 0.5), point("dear", 45.0, 20.0)]
    assert search.chosen(points).arm.name == "sure"
    assert search.chosen(points[:1]).arm.name == "lucky"  # where none is sure, the mean decides
    assert search.chosen([point("far", 20.0, 2.0), point("near", 29.0, 9.0)]).arm.name == "near"
    assert search.most_work(points) == 6.0  # half as much again as what met it
    less = Search(job=None, target=Target(name="warp-error@dis", value=1.0), stages=None, own=20)
    assert less.chosen([point("lucky", 0.9, 4.0, 0.2), point("sure", 0.7, 6.0, 0.2)]).arm.name == "sure"
    fast = Search(job=None, target=Target(name="speedup", value=4.0), stages=None, own=20)
    assert fast.chosen(points).arm.name == "lucky"
    assert fast.most_work(points) == 5.0
    assert read_target("checker=0.9") == Target(name="score", value=0.9)
    one = point("a", 29.0, 5.0)
    assert Target(name="psnr", value=30.0).missed(one) == 1
    assert Target(name="speedup", value=3.0).missed(one) == 0
    assert Target(name="warp-error@dis", value=28.0).missed(one) == 1


def test_settings_by_hand_are_run_on_all_prompts_and_taken_where_they_are_better(tune, fake, tmp_path, monkeypatch):
    """Of prompts that the search saw the cache is cheapest; on others it loses 15 dB, which the dense run does not."""
    monkeypatch.setattr(tune_pipeline, "BY_HAND", ("unipc 16", "unipc 30"))
    monkeypatch.setattr(tune_pipeline, "default_space", lambda model: read_suite(tmp_path / "space.toml").arms)
    monkeypatch.setattr(fake, "spoil_cached", 6.0)
    assert tune("psnr=32", by_hand=True).found["chosen"]["arm"] == "unipc 16"
    ran = {clip for clip, steps, solver, methods in fake.made if steps == 30}
    assert ran >= {*pipeline_search.HELD_OUT_PROMPTS.rounds[-1]}  # whatever they cost


@pytest.mark.slow
def test_half_of_a_large_space_is_run_and_few_settings_on_all_prompts(tune, tmp_path):
    arm = '[[arm]]\nname = "{}"\nnum_inference_steps = [6, 8, 10, 12, 14, 16, 18, 20]\n{}\n'.format
    arms = [arm("unipc", ""), arm("euler", 'solver = "euler"')]
    arms += [arm(f"cached {at}", f"easycache = {{ threshold = {at} }}") for at in (0.05, 0.06, 0.07)]
    (tmp_path / "space.toml").write_text(HEAD + "".join(arms))
    found = tune("psnr=32")
    lines = [line for line in read_lines(tmp_path / "fast.runs.jsonl") if line["clip"] < pipeline_search.HELD_OUT_FIRST]
    of_space = [line for line in lines if "easycache" in line["methods"] or line["solver"] == "euler"]
    ran, every = found.found["tried"]
    assert every == 40
    assert ran <= 24 + 5  # the dense runs between which others are held are settings of the space, too
    assert found.found["chosen"]["work"] <= 7.5  # 14 steps of a cache cost 7
    assert len(of_space) < 0.5 * 32 * pipeline_search.ROUNDS[-1]
    assert any("of 40 settings" in remark for remark in found.remarks)


def test_what_can_not_be_tuned_is_said_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = ["--target", "psnr=30"]
    for arguments, message in (
        ([], "tune pipeline needs a target; give, say, --target psnr=30 or --target speedup=2"),
        (["--target", "psnr"], "--target 'psnr' is not NAME=VALUE"),
        (["--target", "pnsr=3"], "--target 'pnsr=3' names no metric; did you mean 'psnr'"),
        (["--target", "speedup=0"], "has no number that speedup could be"),
        (["--target", "motion=1"], "of motion neither more nor less is better; name another"),
        ([*target, "--radial"], "tune pipeline chooses the methods itself, got radial; leave them out"),
        ([*target, "-o", "x.json"], "the config must be a .toml, got x.json"),
    ):
        found = tune_command("pipeline", *arguments)
        assert (found.exit_code, message in found.stderr) == (2, True)
    monkeypatch.setitem(sys.modules, "optuna", None)
    found = tune_command("pipeline", *target)
    assert (found.exit_code, "'.[eval]'" in found.stderr) == (2, True)
    assert not list(tmp_path.iterdir())


def test_arms_that_no_config_can_hold_are_refused(tune, tmp_path):
    arm = '[[arm]]\nname = "n"\nnum_inference_steps = 9\n'
    for text, message in (
        (f"{SPACE}{arm}diffusers = {{ FirstBlockCacheConfig = {{}} }}\n", r"arm 'n'.*config"),
        (f"{SPACE}{arm}rival = {{ cache-dit = {{}} }}\n", r"arm 'n'.*config.*rival"),
        (SPACE.replace("wan-plain", "flux-tiny"), r"suite.*flux-tiny.*wan-plain"),
    ):
        (tmp_path / "space.toml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            tune("psnr=30")


RUN = '[run]\nnum_inference_steps = 2\nsolver = "euler"\n'


def test_generate_takes_the_run_of_a_config(tmp_path):
    (tmp_path / "c.toml").write_text(RUN + "[easycache]\nthreshold = 0.0\n")
    arguments = ["generate", "a red circle moving right on a navy background", "--config", str(tmp_path / "c.toml")]
    size = ["--num-frames", "5", "--height", "32", "--width", "32", "--json"]
    found = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "a.gif"), *size])
    assert found.exit_code == 0, found.output
    (record,) = json.loads(found.stdout)
    assert (record["num_inference_steps"], record["solver"], list(record["methods"])) == (2, "euler", ["easycache"])
    over = ["--num-inference-steps", "3", "--solver", "unipc"]
    (other,) = json.loads(CliRunner().invoke(app, [*arguments, *over, "-o", str(tmp_path / "b.gif"), *size]).stdout)
    assert (other["num_inference_steps"], other["solver"]) == (3, "unipc")


def test_bad_runs_of_a_config_are_refused_and_other_commands_leave_the_run_out(tmp_path):
    config = tmp_path / "c.toml"
    for text, message in (
        ("[run]\nstepps = 3\n", "the table [run] of --config has no option 'stepps'; dit-accel generate --help"),
        ("[run]\nnum_inference_steps = 2.5\n", "num-inference-steps = 2.5 is refused: Input should be a valid integer"),
    ):
        config.write_text(text)
        found = CliRunner().invoke(app, ["generate", "a red circle", "--config", str(config)])
        assert (found.exit_code, message in found.stderr) == (2, True)
    config.write_text(RUN + "[radial]\n")
    found = CliRunner().invoke(app, ["plan", "--family", "wan2.1-1.3b", "--config", str(config)])
    assert (found.exit_code, "the [run] table of" in found.stderr) == (0, True)
