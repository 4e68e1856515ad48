"""Suites: what files may say, runs that go on where they stopped, what lines say, and judges of one's own."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from dit_accel_eval.metrics import metrics
from dit_accel_eval.runs.counting import Counts
from dit_accel_eval.runs.loaded import OwnClips
from dit_accel_eval.runs.model import Times
from dit_accel_eval.runs.results import ResultLine, last_lines, read_kept, read_lines, result_lines, run_of
from dit_accel_eval.suites import reference, running
from dit_accel_eval.suites.figures import Comparison, suite_figures, suite_table
from dit_accel_eval.suites.job import Job, check_clips
from dit_accel_eval.suites.running import run_arms
from dit_accel_eval.suites.suite import judge_of, read_suite
from dit_accel_pipelines.processes.ranks import Ranks
from fake_model import ARM, HEAD, THIN, FakeModel, command, faked, told, written

from dit_accel import ConfigError

LONGER = Path(__file__).parents[2] / "eval" / "studies" / "judge_longer.py"
fake = pytest.fixture(faked)


def test_a_line_keeps_every_key_and_tells_what_was_not_measured():
    raw = {"arm": "unipc 4", "clip": 3, "num_inference_steps": 4, "work": 3.5, "world": {"color": 1}, "score": None}
    line = ResultLine.of(raw)
    assert line.raw == raw
    assert (line.key, line.is_rival, line.is_converged, line.rival_steps) == (("unipc 4", 3), True, True, {3, 4})
    assert (line.value("psnr"), line.value("score"), line.value("loop"), line.value("work")) == (None, None, None, 3.5)
    assert not ResultLine.of({**raw, "num_inference_steps": 5}).is_rival
    confirmed = {"reference_confirmed": {"steps": 64, "agreement": 46.0}}
    for more, expected in (({}, False), (confirmed, True)):
        assert ResultLine.of({**raw, "reference_agreement": 44.9, **more}).is_converged == expected
    with pytest.raises(ConfigError, match=r"'world': 3.*lacks arm, clip, num_inference_steps"):
        ResultLine.of({"world": 3})


@pytest.fixture
def job(tmp_path, fake):
    (tmp_path / "s.toml").write_text(HEAD.replace("clips = 1", "clips = 2") + THIN + ARM)
    suite = read_suite(tmp_path / "s.toml")
    return Job(suite=suite, out=tmp_path / "s.jsonl", cache=tmp_path / "cache", timed=False, threads=1)


def test_what_can_not_run_exits_with_2_and_runs_nothing(tmp_path, job, fake):
    nothing = tmp_path / "bad.toml"
    judged = HEAD + f'judge = "{LONGER}"\nmetrics = ["ssim"]\n' + ARM
    for text, options, message in (
        ("", (), "no suite at"),
        (HEAD + "[call]\nframes = 3\n" + ARM, (), "call of wan-plain takes no 'frames'; did you mean 'num_frames"),
        (HEAD + ARM + "call = { num_frames = 5 }", (), "arm 'a' has a call of its own, {'num_frames': 5}"),
        (judged, (), f"s judges clips by themselves ({LONGER}), without a dense run"),
        (HEAD + ARM, ("--out", nothing / "r.jsonl"), "the folder of results "),
        (HEAD + ARM, ("--out", tmp_path), "it is a folder; name a file in it"),
        (HEAD + ARM, ("--frames", nothing), "the folder of frames "),
        (HEAD + ARM, ("--time", "--workers", "2"), "timed runs need the machine to themselves, got --workers 2"),
    ):
        nothing.write_text(text) if text else nothing.unlink(missing_ok=True)
        result = command("run", nothing, "--out", tmp_path / "out.jsonl", *options)
        assert (result.exit_code, (tmp_path / "out.jsonl").exists(), fake.made) == (2, False, [])
        assert message in result.stderr


class Timed(FakeModel):
    """One whose runs tell their processor seconds."""

    def run(self, clip, **options):
        return dataclasses.replace(super().run(clip, **options), times=Times(threads=1, processor=1.0))


def test_a_suite_may_leave_time_out_and_have_a_cache_that_is_told_the_timestep(tmp_path, monkeypatch):
    arm = '[[arm]]\nname = "p"\nnum_inference_steps = 4\ndiffusers = { PyramidAttentionBroadcastConfig = {} }\n'
    for _ in faked(monkeypatch, Timed):
        for more, times in (("timed = false\n", [None]), ("", [16.0])):
            (tmp_path / "s.toml").write_text(HEAD + "reference_steps = 16\n" + more + arm)
            done = command("run", tmp_path / "s.toml", "--out", tmp_path / f"{len(more)}.jsonl", "--cache", tmp_path)
            assert done.exit_code == 0, done.stderr
            lines = result_lines(tmp_path / f"{len(more)}.jsonl")
            assert [line.steps_in_time for line in lines if line.arm == "p"] == times


def test_arms_are_compared_with_dense_runs_of_their_work(job):
    run_arms(job, range(2))
    lines = result_lines(job.out)
    dense = ["unipc 2", "unipc 6", "unipc 7", "unipc 8"]
    assert [(line.clip, line.arm) for line in lines] == [(c, a) for c in (0, 1) for a in ("thin", "a", *dense)]
    thin = lines[0]
    assert (thin.work, thin.work_real, thin.attended, thin.forwards) == (7.5, 6.4, 0.5, 10.0)
    assert thin.rival_steps == {6, 7, 8}
    comparison, known = Comparison(lines), last_lines(lines)
    seven, eight = (known[f"unipc {steps}", 0].psnr for steps in (7, 8))
    assert comparison.rival_value(0, 7.25, "psnr") == pytest.approx(0.75 * seven + 0.25 * eight)
    assert comparison.rival_value(0, 7.0, "psnr") == seven
    assert comparison.rival_value(0, 9.5, "psnr") is None
    figures = {arm.name: arm for arm in suite_figures(job.suite, lines)}
    assert list(figures) == [*dense, "thin", "a"]
    leads = [known["thin", clip].psnr - comparison.rival_value(clip, 7.5, "psnr") for clip in (0, 1)]
    assert [*comparison.leads("thin", "work").values()] == leads
    assert figures["thin"].ahead["work"].mean == pytest.approx(np.mean(leads))
    assert figures["a"].ahead["work"].mean == pytest.approx(20 * np.log10(0.5), abs=0.1)  # its error is twice as large
    assert not figures["unipc 7"].ahead
    printed = suite_table(job.suite, lines)
    assert "| thin | 7.50 | 6.40 |" in printed
    assert "equal time" not in printed


def test_metrics_that_were_added_or_missing_are_measured_later(job, fake, monkeypatch):
    """One is kept by frame, one is of the library, one small frames have none of."""
    suite = dataclasses.replace(job.suite, metrics=("psnr", "psnr-change", "ms-ssim"))
    measuring = dataclasses.replace(job, suite=suite)
    run_arms(job, range(1))
    made = len(fake.made)
    absent = dataclasses.replace(metrics()["psnr-change"], missing=lambda: "it is not installed")
    with monkeypatch.context() as patch:
        patch.setitem(metrics(), "psnr-change", absent)
        for _ in range(2):
            run_arms(measuring, range(1))
            assert len(fake.made) == made + 2  # both arms once; dense runs are kept
    assert read_lines(job.out)[0]["unavailable"] == {"psnr-change": "it is not installed"}
    for _ in range(2):
        run_arms(measuring, range(1))
        assert len(fake.made) == made + 4
    line = read_lines(job.out)[0]
    assert len(line["by_frame"]["psnr"]) == 3
    assert np.mean(line["by_frame"]["psnr"]) == pytest.approx(line["psnr"], abs=0.1)
    assert "161 pixels" in line["skipped"]["ms-ssim"]
    assert len(line["dynamics"]["flickering"]) == 2  # beside the reference's
    assert "| psnr-change |" in suite_table(measuring.suite, result_lines(job.out))


def test_a_suite_goes_on_where_it_stopped_and_makes_no_dense_run_twice(job, fake):
    run_arms(job, range(1))
    first, made = job.out.read_text(), len(fake.made)
    lines = first.splitlines(keepends=True)
    for text, again in (
        (first, 0),
        ("".join(lines[:3]) + lines[3][:20], 0),  # stopped while it wrote; dense runs are found again
        ("".join(lines[1:]), 1),
    ):
        job.out.write_text(text)
        run_arms(job, range(1))
        assert (job.out.read_text(), len(fake.made)) == (first, made + again)


def test_timed_arms_are_compared_with_dense_runs_of_their_time(job, fake):
    run_arms(job, range(1))
    timed = dataclasses.replace(job, timed=True, threads=2)
    run_arms(timed, range(1))
    thin, euler, *dense = result_lines(job.out)
    assert (thin.seconds, thin.dense_seconds, thin.steps_in_time, thin.raw["threads"]) == (7.5, 10.0, 7.5, 2)
    assert euler.steps_in_time == 2
    assert all(line.seconds is None for line in dense)
    assert "| against fewer steps at equal time, dB (median) |" in suite_table(job.suite, result_lines(job.out))
    made = len(fake.made)
    run_arms(timed, range(1))
    assert len(fake.made) == made


def test_results_of_something_else_are_refused(job):
    run_arms(job, range(1))
    lines = read_lines(job.out)
    for key, value, message in (
        ("weights", "other", "weights 'other'"),
        ("reference", "euler, agreeing to 45 dB", "reference 'euler, agreeing to 45 dB'"),
        ("call", {"num_frames": 5}, "call {'num_frames': 5}"),
        ("num_inference_steps", 7, r"arm 'thin'.*num_inference_steps 7.*10"),
        ("methods", {}, r"arm 'thin'.*methods \{\}"),
    ):
        written(job.out, [{**lines[0], key: value}, *lines[1:]])
        with pytest.raises(ConfigError, match=message):
            run_arms(job, range(1))
    job.out.write_text("{\n")
    with pytest.raises(ConfigError, match=r"line.*JSON"):
        run_arms(job, range(1))
    methods = {"sol": {**lines[0]["methods"]["sol"], "gone": 1}}  # an option that this release no longer has
    written(job.out, [{**lines[0], "methods": methods}, *lines[1:]])
    run_arms(job, range(1))


def test_lines_of_another_prompt_or_seed_are_refused(tmp_path):
    line, own = {"clip": 0, "prompt": "a", "seed": 7}, OwnClips(prompts=("a",), seeds=(7,))
    check_clips(tmp_path, [line], own)
    check_clips(tmp_path, [{"clip": 3, "prompt": "held out"}], None)
    for changed, clips, message in (
        ({"prompt": "b"}, own, r"clip 0 of prompt 'b' and seed 7.*'a' and seed 7"),
        ({"seed": 8}, own, r"clip 0 of prompt 'a' and seed 8.*'a' and seed 7"),
        ({"clip": 1}, own, r"clip 1.*no such clip"),
        ({}, None, r"clip 0 of prompt 'a' and seed 7.*a held-out prompt"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_clips(tmp_path, [line | changed], clips)


def test_the_search_for_the_converged_run_doubles_and_ends(tmp_path, fake, monkeypatch, job, capsys):
    model = FakeModel()
    found = reference.converged(model, 0, tmp_path)
    # 1 / 16^2 - 1 / 32^2 is 50.7 dB
    assert (found.steps, [steps for _, steps, *_ in model.made]) == (32, [16, 32])
    assert found.agreement == pytest.approx(-20 * np.log10(1 / 256 - 1 / 1024), abs=0.5)
    assert found.step == Counts(blocks=12, attention=12)
    monkeypatch.setattr(reference, "AGREE", 70.0)
    capped = reference.converged(model, 0, tmp_path, most=64)
    assert (capped.steps, capped.agreement < 70) == (64, True)
    monkeypatch.setattr(running, "AGREE", 90.0)
    run_arms(job, range(1))
    said = capsys.readouterr().err
    assert "agree with half as many to" in said
    assert "clip 0 thin: " in said
    assert "dB at 7.5 steps' work" in said  # of a model whose attention is half of it


def test_a_dense_run_of_something_else_is_refused(tmp_path, fake):
    model = FakeModel()
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
    run_arms(dataclasses.replace(job, timed=True, threads=2), range(1))
    with_frames = dataclasses.replace(job, frames=job.out.parent / "frames")
    run_arms(with_frames, range(1))
    lines = read_lines(job.out)
    for line in lines:
        methods = [read_suite(job.out.parent / "s.toml").arms[0].methods[0]] if line["methods"] else ()
        made = fake().run(0, steps=line["num_inference_steps"], solver=line["solver"], methods=methods)
        found = read_kept(job.out.parent / line["kept"], run_of(line))
        assert np.abs(found / 255 - made.frames).max() < 0.5 / 255 + 5e-4  # dense runs are float16 in the cache
    assert lines[0]["seconds"] == 7.5  # what was timed before stays
    made = len(fake.made)
    run_arms(with_frames, range(1))
    assert len(fake.made) == made
    (job.out.parent / lines[0]["kept"]).unlink()
    run_arms(with_frames, range(1))
    assert len(fake.made) == made + 1


def test_the_command_runs_a_suite_goes_on_and_reports(job, fake, tmp_path):
    suite = ("run", tmp_path / "s.toml", "--out", job.out, "--cache", job.cache)
    assert "| arm |" in command(*suite, "--table").stdout
    assert (fake.made, job.out.exists()) == ([], False)
    first = command(*suite, "--frames", tmp_path / "frames")
    assert first.exit_code == 0, first.output
    assert "| thin | 7.50 | 6.40 |" in first.stdout
    assert "s: 2 clips x 2 arms, 0 of 4 runs are done; the dense runs that" in told(first)
    assert f"written to {job.out}" in told(first)
    made = len(fake.made)
    assert command(*suite, "--frames", tmp_path / "frames", "--quiet").stdout == ""
    assert "4 of 4 runs are done" in told(command(*suite))
    assert len(fake.made) == made
    assert command("report", job.out, "-o", tmp_path / "s.html").exit_code == 0
    text = (tmp_path / "s.html").read_text()
    assert any((tmp_path / "s.media").iterdir())
    assert "dit-accel eval run s.toml --out s.jsonl --frames frames" in text


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
        monkeypatch.setattr(running, "Ranks", lambda member=member: member)
        run_arms(job, clips)
    assert len(waited) == 4
    pairs = [(line["clip"], line["arm"]) for line in read_lines(job.out)]
    assert len(pairs) == len({*pairs})
    assert {clip for clip, _ in pairs} == {0, 1}
    for other, options in ((job, dict(workers=2)), (dataclasses.replace(job, timed=True), {})):
        with pytest.raises(ConfigError, match="2 processes, got --"):
            run_arms(other, clips, **options)


@pytest.mark.slow
def test_a_real_suite_runs_in_two_processes(tmp_path):
    call = "[call]\nnum_frames = 5\nheight = 32\nwidth = 32\n"
    path = tmp_path / "suites" / "s.toml"
    path.parent.mkdir()
    thin = '[[arm]]\nname = "thin"\nnum_inference_steps = 3\nsol = { block_size = 16, dense_steps = 0, beta = 0.5 }\n'
    path.write_text(HEAD.replace("clips = 1", "clips = 2") + call + thin + ARM)
    first = command("run", path, "--workers", "2", "--cache", tmp_path / "cache")
    assert first.exit_code == 0, first.output
    lines = result_lines(tmp_path / "results" / "s.jsonl")
    sparse = next(line for line in lines if line.arm == "thin")
    assert 0.3 < sparse.attended < 0.9
    assert sparse.work < 3 > sparse.work_real
    assert {line.forwards for line in lines if line.arm in ("thin", "unipc 3")} == {3.0}
    assert command("run", path, "--cache", tmp_path / "cache").stdout == first.stdout
    assert command("run", path, "--table").stdout == first.stdout


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
    for name, text, message in (
        ("broken_judge.py", "import nothing_of_this_name\n", r"broken_judge\.py.*ModuleNotFoundError.*nothing_of"),
        ("tableless_judge.py", "def measures(*of): return {}\n", r"tableless_judge\.py.*function table"),
        ("json.py", JUDGE, r"/json\.py.*module .*json.*rename"),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / "s.toml").write_text(HEAD + f'judge = "{name}"\n' + ARM)
        with pytest.raises(ConfigError, match=message):
            judge_of(read_suite(tmp_path / "s.toml"))
