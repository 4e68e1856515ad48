"""The comparison: honest intervals, suites and results that say what is wrong, rivals, runs that go on."""

import dataclasses
import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from diffusers import FirstBlockCacheConfig
from dit_accel_assets.catalog import KNOWN
from dit_accel_eval.metrics import Sample, metric, metrics
from dit_accel_eval.metrics.psnr import psnr
from dit_accel_eval.runs.counting import Counts
from dit_accel_eval.runs.results import read_kept, read_lines, reference_of, run_of
from dit_accel_eval.suites import compare, reference
from dit_accel_eval.suites.arms import is_rival
from dit_accel_eval.suites.compare import progress_of, run
from dit_accel_eval.suites.comparison import equal_value, figures, rival_steps, table
from dit_accel_eval.suites.job import Job, check_lines
from dit_accel_eval.suites.judges import judge_of
from dit_accel_eval.suites.suite import read_suite
from dit_accel_pipelines.processes.ranks import Ranks
from fake_model import FakeModel
from typer.testing import CliRunner

from dit_accel import ConfigError
from dit_accel.cli.app import app

LONGER = Path(__file__).parents[2] / "eval" / "studies" / "judge_longer.py"
SUITES = sorted((Path(__file__).parents[2] / "eval" / "suites").glob("*.toml"))
HEAD = 'version = 2\nname = "s"\nmodel = "wan-plain"\nclips = 1\n'
ARM = '[[arm]]\nname = "a"\nsolver = "euler"\nnum_inference_steps = 2\n'


def clip(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((3, 16, 16, 3), dtype=np.float32)


def command(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_metrics_of_identity_and_of_a_known_error():
    one = clip()
    assert psnr(one, one) == 100.0
    assert metric("ssim")(Sample(frames=one, reference=one)).value == pytest.approx(1.0)
    half = np.full_like(one, 0.5)
    assert psnr(half + 0.1, half) == pytest.approx(20.0, abs=1e-3)
    assert metric("ssim")(Sample(frames=one, reference=clip(1))).value < 0.5
    with pytest.raises(ValueError, match=r"clips.*one shape"):
        psnr(one, one[:2])


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_committed_suites_read_and_match_their_results(path):
    suite = read_suite(path)
    assert suite.name == path.stem
    assert suite.model in KNOWN
    results = path.parent.parent / "results" / f"{suite.name}.jsonl"
    lines = read_lines(results)
    listed = {arm.name: arm.to_dict() for arm in suite.arms}
    assert {line["arm"] for line in lines if not is_rival(line)} <= set(listed)
    if lines:
        job = Job(suite=suite, out=results, cache=results, timed=False, threads=None)
        check_lines(results, lines, job.setting, job.settings(lines))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD, r"lacks.*\[\[arm\]\]"),
        (HEAD.replace("clips = 1\n", "") + ARM, "lacks clips"),
        (HEAD.replace("clips = 1", "clips = 0") + ARM, "clips = 0"),
        (HEAD + "clip = 3\n" + ARM, r"'clip'.*'clips'\?"),
        (HEAD.replace('"s"', "3") + ARM, r"name = 3.*kind"),
        (HEAD.replace("version = 2", "version = 1") + ARM, "of version 2,"),
        (HEAD + ARM + ARM, "arms called 'a'"),
        (HEAD + ARM + "step = 3", r"arm 'a'.*key 'step'"),
        (HEAD + ARM + "[arm.radial]\ndecay = 1", r"'a': radial.*'decay'"),
        (HEAD + "[[arm]]\nstep = 3", r"arm.*name: {'step': 3}"),
        (HEAD + '[[arm]]\nname = "a"', "num_inference_steps = None"),
        (HEAD + ARM.replace("= 2", "= [2, 0]"), r"num_inference_steps = \[2, 0\]"),
        (HEAD + ARM.replace("euler", "heun"), r"solver 'heun'.*dpm\+\+, euler"),
        (
            HEAD + ARM.replace('solver = "euler"\n', ""),
            r"arm 'a'.*unipc \(the default\).*'unipc 2'",
        ),
        (
            HEAD + ARM.replace('"a"', '"unipc 2"'),
            r"'unipc 2'.*runs.*unipc",
        ),
        (
            HEAD + ARM.replace("num_inference_steps = 2", "num_inference_steps = 99999999999999"),
            r"'a': num_inference_steps.*10,000, got 99,999,999,999,999",
        ),
        (HEAD + ARM + "diffusers = { BlockCacheConfig = {} }", r"'BlockCacheConfig'.*'First"),
        (HEAD + ARM + "diffusers = { FirstBlockCacheConfig = 0.1 }", r"FirstBlockCacheConfig = 0.1"),
        (
            HEAD + ARM + "diffusers = { FirstBlockCacheConfig = { thresh = 0.1 } }",
            r"FirstBlockCacheConfig.*option 'thresh'",
        ),
        ("version", r"s\.toml.*TOML"),
        (HEAD + 'metrics = ["pnsr"]\n' + ARM, r"s.toml: .*metric 'pnsr'.*'psnr'"),
        (HEAD + "first_clip = -1\n" + ARM, "first_clip = -1"),
        (HEAD + 'judge = "longer"\n' + ARM, r"s.toml.*judge 'longer'.*name one"),
        (HEAD + 'judge = "gone.py"\n' + ARM, r"s.toml.*judge 'gone.py'.*name one"),
        (HEAD + 'metrics = ["psnr", "psnr"]\n' + ARM, r"metric 'psnr'.*twice"),
    ],
)
def test_bad_suites_say_what_is_wrong(tmp_path, text, message):
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_suite(tmp_path / "s.toml")


def test_an_arm_may_hold_one_of_diffusers_own_caches(tmp_path):
    (tmp_path / "s.toml").write_text(HEAD + ARM + "diffusers = { FirstBlockCacheConfig = { threshold = 0.1 } }")
    (arm,) = read_suite(tmp_path / "s.toml").arms
    assert isinstance(arm.methods[0].config, FirstBlockCacheConfig)
    assert arm.to_dict()["methods"] == {"diffusers-cache": {"config": "FirstBlockCacheConfig", "threshold": 0.1}}


def test_a_list_of_steps_makes_an_arm_each(tmp_path):
    (tmp_path / "s.toml").write_text(HEAD + '[[arm]]\nname = "unipc"\nnum_inference_steps = [4, 5]\n' + ARM)
    arms = read_suite(tmp_path / "s.toml").arms
    assert [(arm.name, arm.num_inference_steps, arm.is_dense) for arm in arms] == [
        ("unipc 4", 4, True), ("unipc 5", 5, True), ("a", 2, False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("", "no suite at"),
        (HEAD.replace("wan-plain", "wan-tinny") + ARM, "'wan-tinny' is no embedded model; did you mean 'wan-tiny'"),
        (
            HEAD + "[call]\nframes = 3\n" + ARM,
            "a suite's call of wan-plain takes no 'frames'; did you mean 'num_frames",
        ),
        (
            HEAD + ARM + "call = { num_frames = 5 }",
            "arm 'a' has a call of its own, {'num_frames': 5}, and all are held against",
        ),
        (
            HEAD + f'judge = "{LONGER}"\nmetrics = ["ssim"]\n' + ARM,
            f"s judges clips by themselves ({LONGER}), without a dense run",
        ),
    ],
)
def test_what_can_not_run_exits_with_2(tmp_path, change, message):
    if change:
        (tmp_path / "s.toml").write_text(change)
    found = command("run", tmp_path / "s.toml", "--out", tmp_path / "out.jsonl")
    assert found.exit_code == 2
    assert message in found.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_timed_runs_have_the_machine_to_themselves(tmp_path):
    (tmp_path / "s.toml").write_text(HEAD + ARM)
    found = command("run", tmp_path / "s.toml", "--time", "--workers", "2", "--out", tmp_path / "s.jsonl")
    assert found.exit_code == 2
    assert "timed runs need the machine to themselves, got --workers 2" in found.stderr


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(compare, "EmbeddedModel", FakeModel)
    monkeypatch.setattr(FakeModel, "made", [])
    compare._loaded.cache_clear()
    yield FakeModel
    compare._loaded.cache_clear()


@pytest.fixture
def job(tmp_path, fake):
    (tmp_path / "s.toml").write_text(
        HEAD.replace("clips = 1", "clips = 2") + '[[arm]]\nname = "thin"\nnum_inference_steps = 10\nsol = {}\n' + ARM
    )
    suite = read_suite(tmp_path / "s.toml")
    return Job(suite=suite, out=tmp_path / "s.jsonl", cache=tmp_path / "cache", timed=False, threads=1)


def test_arms_are_held_against_dense_runs_of_their_work(job):
    run(job, range(2))
    lines = read_lines(job.out)
    dense = ["unipc 2", "unipc 6", "unipc 7", "unipc 8"]
    assert [(line["clip"], line["arm"]) for line in lines] == [(c, a) for c in (0, 1) for a in ("thin", "a", *dense)]
    thin = lines[0]
    assert (thin["work"], thin["work_real"], thin["attended"], thin["forwards"]) == (7.5, 6.4, 0.5, 10.0)
    assert rival_steps(thin) == {6, 7, 8}
    known = {(line["arm"], line["clip"]): line for line in lines}
    seven, eight = (known[f"unipc {steps}", 0]["psnr"] for steps in (7, 8))
    assert equal_value(known, 0, 7.25, "psnr") == pytest.approx(0.75 * seven + 0.25 * eight)
    assert equal_value(known, 0, 7.0, "psnr") == seven
    assert equal_value(known, 0, 9.5, "psnr") is None
    found = {arm.name: arm for arm in figures(job.suite, lines)}
    assert list(found) == [*dense, "thin", "a"]
    assert found["thin"].ahead["work"].mean == pytest.approx(
        np.mean([known["thin", c]["psnr"] - equal_value(known, c, 7.5, "psnr") for c in (0, 1)])
    )
    assert found["a"].ahead["work"].mean == pytest.approx(20 * np.log10(0.5), abs=0.1)  # its error is twice as large
    assert not found["unipc 7"].ahead
    printed = table(job.suite, lines)
    assert "| thin | 7.50 | 6.40 |" in printed
    assert "equal time" not in printed


@pytest.fixture
def measuring(job):
    """A job whose suite names metrics: one kept by frame, one of the library, one that small frames have none of."""
    return dataclasses.replace(job, suite=dataclasses.replace(job.suite, metrics=("psnr", "psnr-change", "ms-ssim")))


def test_a_suite_s_metrics_are_measured_and_those_added_later_made_up_for(job, measuring, fake):
    run(job, range(1))
    assert "metrics" not in read_lines(job.out)[0]
    made = len(fake.made)
    run(measuring, range(1))
    assert len(fake.made) == made + 2  # the dense runs are found again
    thin, *_ = lines = read_lines(job.out)
    assert set(thin["metrics"]) == {"psnr-change"}
    assert len(thin["by_frame"]["psnr"]) == 3
    assert len(thin["by_frame"]["psnr-change"]) == 2
    assert all("short side of 161 pixels, and there are 16" in line["skipped"]["ms-ssim"] for line in lines)
    run(measuring, range(1))
    assert len(fake.made) == made + 2
    assert "| psnr-change |" in table(measuring.suite, lines)


def test_metrics_that_were_missing_are_measured_once_they_are_there(measuring, fake, monkeypatch):
    absent = dataclasses.replace(metrics()["psnr-change"], missing=lambda: "it is not installed")
    with monkeypatch.context() as patch:
        patch.setitem(metrics(), "psnr-change", absent)
        run(measuring, range(1))
        made = len(fake.made)
        run(measuring, range(1))
    assert read_lines(measuring.out)[0]["unavailable"] == {"psnr-change": "it is not installed"}
    assert len(fake.made) == made
    run(measuring, range(1))
    assert len(fake.made) == made + 2
    assert "psnr-change" in read_lines(measuring.out)[0]["metrics"]


def test_frames_that_are_not_finite_stop_the_run_with_their_arm(measuring, fake, monkeypatch):
    right = fake.run

    def broken(self, clip, *, steps, solver, **options):
        made = right(self, clip, steps=steps, solver=solver, **options)
        return dataclasses.replace(made, frames=made.frames * np.nan) if options.get("methods") else made

    monkeypatch.setattr(fake, "run", broken)
    with pytest.raises(ConfigError, match=r"clip 0 of arm 'thin'.*finite.*3"):
        run(measuring, range(1))
    assert read_lines(measuring.out) == []


def test_a_suite_goes_on_where_it_stopped_and_makes_no_dense_run_twice(job, fake):
    run(job, range(1))
    first = job.out.read_text()
    made = len(fake.made)
    run(job, range(1))
    assert (job.out.read_text(), len(fake.made)) == (first, made)
    lines = first.splitlines(keepends=True)
    job.out.write_text("".join(lines[:3]) + lines[3][:20])  # stopped while it wrote
    run(job, range(1))
    assert (job.out.read_text(), len(fake.made)) == (first, made)  # dense runs are found again
    job.out.write_text("".join(lines[1:]))
    run(job, range(1))
    assert (job.out.read_text(), len(fake.made)) == (first, made + 1)


def test_timed_arms_are_held_against_dense_runs_of_their_time(job, fake):
    run(job, range(1))
    timed = Job(suite=job.suite, out=job.out, cache=job.cache, timed=True, threads=2)
    run(timed, range(1))
    thin, euler, *dense = read_lines(job.out)
    assert (thin["seconds"], thin["dense_seconds"], thin["steps_in_time"], thin["threads"]) == (7.5, 10.0, 7.5, 2)
    assert euler["steps_in_time"] == 2
    assert all("seconds" not in line for line in dense)
    assert "| against fewer steps at equal time, dB (median) |" in table(job.suite, read_lines(job.out))
    made = len(fake.made)
    run(timed, range(1))
    assert len(fake.made) == made


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("weights", "other", "weights 'other'"),
        ("reference", "euler, agreeing to 45 dB", "reference 'euler, agreeing to 45 dB'"),
        ("call", {"num_frames": 5}, "call {'num_frames': 5}"),
        ("num_inference_steps", 7, r"arm 'thin'.*num_inference_steps 7.*10"),
        ("methods", {}, r"arm 'thin'.*methods \{\}"),
    ],
)
def test_results_of_something_else_are_refused(job, key, value, message):
    run(job, range(1))
    lines = read_lines(job.out)
    lines[0][key] = value
    job.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ConfigError, match=message):
        run(job, range(1))
    job.out.write_text("{\n")
    with pytest.raises(ConfigError, match=r"line.*JSON"):
        run(job, range(1))


def test_the_search_for_the_converged_run_doubles_and_ends(tmp_path, fake, monkeypatch, job, capsys):
    model = FakeModel("", {})
    found = reference.converged(model, 0, tmp_path)
    # 1 / 16^2 - 1 / 32^2 is 50.7 dB
    assert (found.steps, [steps for _, steps, *_ in model.made]) == (32, [16, 32])
    assert found.agreement == pytest.approx(-20 * np.log10(1 / 256 - 1 / 1024), abs=0.5)
    assert found.step == Counts(blocks=12, attention=12)
    monkeypatch.setattr(reference, "AGREE", 70.0)
    capped = reference.converged(model, 0, tmp_path, most=64)
    assert (capped.steps, capped.agreement < 70) == (64, True)
    monkeypatch.setattr(compare, "AGREE", 90.0)
    run(job, range(1))
    assert "agree with half as many to" in capsys.readouterr().err


def test_a_dense_run_of_something_else_is_refused(tmp_path, fake):
    model = FakeModel("", {})
    reference.dense_run(model, 0, 4, tmp_path)
    (path,) = tmp_path.iterdir()
    reference.dense_run(model, 0, 5, tmp_path)
    (other,) = set(tmp_path.iterdir()) - {path}
    path.replace(other)
    with pytest.raises(ConfigError, match=r"dense run.*steps 4, not 5"):
        reference.dense_run(model, 0, 5, tmp_path)
    other.write_bytes(b"PK")
    with pytest.raises(ConfigError, match=r"dense run.*release"):
        reference.dense_run(model, 0, 5, tmp_path)


def test_frames_are_kept_and_missing_ones_made_up_for(job, fake):
    timed = dataclasses.replace(job, timed=True, threads=2)
    run(timed, range(1))
    with_frames = dataclasses.replace(job, frames=job.out.parent / "frames")
    run(with_frames, range(1))
    lines = read_lines(job.out)
    for line in lines:
        made = fake("", {}).run(0, steps=line["num_inference_steps"], solver=line["solver"], methods=line["methods"])
        found = read_kept(job.out.parent / line["kept"], run_of(line))
        assert np.abs(found / 255 - made.frames).max() < 0.5 / 255 + 5e-4  # dense runs are float16 in the cache
        assert read_kept(job.out.parent / line["kept_reference"], reference_of(line)).shape == found.shape
    assert lines[0]["seconds"] == 7.5  # what was timed before stays
    made = len(fake.made)
    run(with_frames, range(1))
    assert len(fake.made) == made
    (job.out.parent / lines[0]["kept"]).unlink()
    run(with_frames, range(1))
    assert len(fake.made) == made + 1


def test_progress_is_in_steps_and_ends_when_all_is_done(job):
    seen = []
    run(job, range(2), watch=lambda lines: seen.append(progress_of(job, range(2), lines)))
    done, whole = [one for one, _ in seen], 2 * (2 * 32 - 16 + 10 + 2 + 2 + 6 + 7 + 8)
    assert (done[0], done[-1], seen[-1][1]) == (0, whole, (whole, whole))
    assert done == sorted(done)
    assert all(one <= low <= whole <= high for one, (low, high) in seen)
    assert [low < high for _, (low, high) in seen[:3]] == [True, True, False]  # both arms tell what they are held to


def test_the_command_runs_a_suite_goes_on_and_reports(job, fake, tmp_path):
    arguments = ["run", tmp_path / "s.toml", "--out", job.out, "--cache", job.cache, "--frames", tmp_path / "frames"]
    first = command(*arguments)
    assert first.exit_code == 0, first.output
    assert "| thin | 7.50 | 6.40 |" in first.stdout
    assert f"written to {job.out}" in " ".join(first.stderr.split())
    made = len(fake.made)
    assert command(*arguments, "--quiet").stdout == ""
    assert len(fake.made) == made
    assert command("report", job.out, "-o", tmp_path / "s.html").exit_code == 0
    text = (tmp_path / "s.html").read_text()
    assert any((tmp_path / "s.media").iterdir())
    assert "dit-accel eval run s.toml --out s.jsonl --frames frames" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "{0}/s.toml/r.jsonl"], "results can't be written to "),
        (["--out", "{0}"], "it is a folder; name a file in it"),
        (["--frames", "{0}/s.toml"], "frames can't be written to "),
        (["--time", "--workers", "2"], "timed runs need the machine to themselves, got --workers 2"),
    ],
)
def test_the_command_says_what_it_can_not_do(job, fake, tmp_path, options, message):
    out = ["--out", str(job.out), *(text.format(tmp_path) for text in options)]
    result = CliRunner().invoke(app, ["eval", "run", str(tmp_path / "s.toml"), *out])
    assert result.exit_code == 2
    assert message in result.stderr
    assert fake.made == []


def ranked(rank, count):
    ranks = Ranks()
    ranks.rank, ranks.count = rank, count
    return ranks


def test_processes_share_the_clips_none_doubled_or_lost(job, fake, monkeypatch):
    parts = [ranked(rank, 3).own(range(8)) for rank in range(3)]
    assert sorted(clip for part in parts for clip in part) == list(range(8))
    clips, waited = range(2), []
    for rank in (1, 0):  # the first prepares the file that the others append to, and sorts what they wrote
        member = ranked(rank, 2)
        monkeypatch.setattr(member, "wait", lambda: waited.append(1))
        monkeypatch.setattr(compare, "Ranks", lambda member=member: member)
        run(job, clips)
    assert len(waited) == 4
    lines = read_lines(job.out)
    pairs = [(line["clip"], line["arm"]) for line in lines]
    assert len(pairs) == len(set(pairs))
    assert {line["clip"] for line in lines} == {0, 1}
    for asked in (dict(workers=2), {}):
        other = job if asked else dataclasses.replace(job, timed=True)
        with pytest.raises(ConfigError, match="2 processes, got --"):
            run(other, clips, **asked)


LAUNCHED = """
import importlib.util, sys
from dit_accel_eval.suites import compare
from dit_accel.cli import main

spec = importlib.util.spec_from_file_location("fakes", sys.argv.pop(1))
fakes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fakes)
compare.EmbeddedModel = fakes.FakeModel
main()
"""


@pytest.mark.slow
def test_accelerate_runs_a_suite_in_two_processes(tmp_path):
    (tmp_path / "s.toml").write_text(HEAD.replace("clips = 1", "clips = 3") + ARM)
    (tmp_path / "run.py").write_text(LAUNCHED)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--cpu",
        "run.py",
        inspect.getfile(FakeModel),
    ]
    run_it = ["eval", "run", "s.toml", "--out", "s.jsonl", "--cache", "cache"]
    done = subprocess.run([*launch, *run_it], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = read_lines(tmp_path / "s.jsonl")
    assert [(line["clip"], line["arm"]) for line in lines] == [(c, a) for c in range(3) for a in ("a", "unipc 2")]
    assert done.stdout.count("| arm |") == 1


@pytest.mark.slow
def test_a_real_suite_runs_in_two_processes(tmp_path):
    call = "[call]\nnum_frames = 5\nheight = 32\nwidth = 32\n"
    path = tmp_path / "suites" / "s.toml"
    path.parent.mkdir()
    thin = '[[arm]]\nname = "thin"\nnum_inference_steps = 3\nsol = { block_size = 16, dense_steps = 0, beta = 0.5 }\n'
    path.write_text(HEAD.replace("clips = 1", "clips = 2") + call + thin + ARM)
    first = command("run", path, "--workers", "2", "--cache", tmp_path / "cache")
    assert first.exit_code == 0, first.output
    lines = read_lines(tmp_path / "results" / "s.jsonl")
    thin = next(line for line in lines if line["arm"] == "thin")
    assert 0.3 < thin["attended"] < 0.9
    assert thin["work"] < 3 > thin["work_real"]
    assert {line["forwards"] for line in lines if line["arm"] in ("thin", "unipc 3")} == {3.0}
    assert "| thin |" in first.stdout
    assert command("run", path, "--cache", tmp_path / "cache").stdout == first.stdout
    assert command("run", path, "--table").stdout == first.stdout


KILLED = """
import os, time
from multiprocessing import get_context
from dit_accel_eval.runs.pool import end_with_parent

def work(path):
    end_with_parent()
    open(path, "w").write(str(os.getpid()))
    time.sleep(120)

if __name__ == "__main__":
    import sys
    get_context("spawn").Process(target=work, args=sys.argv[1:]).start()
    time.sleep(120)
"""


@pytest.mark.slow
def test_workers_end_with_a_suite_that_is_killed(tmp_path):
    script, noted = tmp_path / "killed.py", tmp_path / "pid"
    script.write_text(KILLED)
    parent = subprocess.Popen([sys.executable, script, noted])
    try:
        wait_for(lambda: noted.exists() and noted.read_text())
        worker = int(noted.read_text())
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not is_running(worker))


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


JUDGE = """
from own_words import WORDS

def measures(model, clip, made):
    return {"score": 0.25}

def table(suite, lines):
    return f"{WORDS} {suite.name}: {[line['score'] for line in lines]}"
"""


def test_a_judge_is_a_file_beside_the_suite_that_may_import_what_lies_there(tmp_path, fake):
    (tmp_path / "own_judge.py").write_text(JUDGE)
    (tmp_path / "own_words.py").write_text("WORDS = 'judged in'\n")
    (tmp_path / "s.toml").write_text(HEAD + 'judge = "own_judge.py"\n' + ARM)
    out = tmp_path / "s.jsonl"
    ran = command("run", tmp_path / "s.toml", "--out", out)
    assert ran.exit_code == 0, ran.output
    assert "judged in s: [0.25]" in ran.stdout
    assert [line["score"] for line in read_lines(out)] == [0.25]
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "broken_judge.py",
            "import nothing_of_this_name\n",
            r"broken_judge\.py.*ModuleNotFoundError.*nothing_of",
        ),
        ("tableless_judge.py", "def measures(*of): return {}\n", r"tableless_judge\.py.*function table"),
        ("json.py", JUDGE, r"/json\.py.*module .*json.*rename"),
    ],
)
def test_judges_that_are_none_are_refused_by_file(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    (tmp_path / "s.toml").write_text(HEAD + f'judge = "{name}"\n' + ARM)
    with pytest.raises(ConfigError, match=message):
        judge_of(read_suite(tmp_path / "s.toml"))


def test_the_table_alone_generates_nothing(job, fake, tmp_path):
    assert "| arm |" in command("run", tmp_path / "s.toml", "--out", job.out, "--table").stdout
    assert (fake.made, job.out.exists()) == ([], False)


def test_a_suite_may_begin_at_another_clip(tmp_path, fake):
    (tmp_path / "s.toml").write_text(HEAD.replace("clips = 1", "clips = 3\nfirst_clip = 5") + ARM)
    out = tmp_path / "s.jsonl"
    assert command("run", tmp_path / "s.toml", "--out", out, "--cache", tmp_path / "cache", "--clips", 2).exit_code == 0
    assert {line["clip"] for line in read_lines(out)} == {5, 6}
    report = command("report", out, "-o", tmp_path / "s.html")
    assert report.exit_code == 0, report.output
    assert "first_clip = 5" in (tmp_path / "s.html").read_text()


def test_progress_tells_the_model_s_own_work_in_steps(job, capsys):
    """A run of half the tiles is 7.5 steps' work on a model whose attention is half of it."""
    run(job, range(1))
    assert "clip 0 thin: " in (told := capsys.readouterr().err)
    assert "dB at 7.5 steps' work" in told
