"""Ladders of rivals, clips that choose and judge, declared pairs, and other projects' caches as arms of a suite."""

import dataclasses

import best_rival
import numpy as np
import pytest
from dit_accel_eval.runs.loaded import EmbeddedModel
from dit_accel_eval.runs.results import ResultLine, result_lines
from dit_accel_eval.runs.rivals import cached_by, check_rival, require_rivals
from dit_accel_eval.suites.arms import Arm, dense_arm
from dit_accel_eval.suites.figures import pair_figures, pairs_markdown, suite_figures, suite_table
from dit_accel_eval.suites.job import Job
from dit_accel_eval.suites.running import run_arms
from dit_accel_eval.suites.suite import Pair, Suite, read_ladder, read_suite
from fake_model import ARM, HEAD, LADDER, THIN, command, faked, told

from dit_accel import ConfigError

fake = pytest.fixture(faked)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rivals.toml").write_text(LADDER)
    return tmp_path


def read(folder, text):
    (folder / "s.toml").write_text(text)
    return read_suite(folder / "s.toml")


def judging(folder, more="", arms=THIN + ARM):
    head = HEAD.replace("clips = 1", "clips = 2\nfirst_clip = 4")
    return read(folder, f'{head}rivals = "rivals.toml"\n{more}{arms}')


def job_of(suite, folder):
    return Job(suite=suite, out=folder / "s.jsonl", cache=folder / "cache", timed=False, threads=1)


def test_arms_are_compared_with_the_best_dense_run_of_their_work(folder, fake):
    job = job_of(judging(folder), folder)
    run_arms(job, range(4, 6))
    lines = result_lines(job.out)
    dense = {line.arm: (line.solver, line.flow_shift) for line in lines if line.arm.startswith("dense")}
    own, tuned = ("unipc", None), ("dpm++", 8.0)
    assert dense == {"dense 2": tuned, "dense 6": own, "dense 7": own, "dense 8": own}
    found = {arm.name: arm for arm in suite_figures(job.suite, lines)}
    assert list(found) == [*dense, "thin", "a"]
    assert not found["dense 7"].ahead
    assert {*found["thin"].ahead} == {"work", "work_real"}
    known = {line.key: line.psnr for line in lines}
    lead = [known["thin", c] - (known["dense 7", c] + known["dense 8", c]) / 2 for c in (4, 5)]
    assert found["thin"].ahead["work"].mean == pytest.approx(sum(lead) / 2)
    printed = suite_table(job.suite, lines)
    assert "best dense runs of the ladder of rivals: dpm++ shift 8 at 2; unipc at 6, 7, 8 steps." in printed
    made = len(fake.made)
    run_arms(job, range(4, 6))
    assert len(fake.made) == made
    (folder / "rivals.toml").write_text(LADDER.replace("8.0", "5.0"))
    with pytest.raises(ConfigError, match=r"arm 'dense 2'.*flow_shift 8\.0.*5\.0"):
        run_arms(dataclasses.replace(job, suite=judging(folder)), range(4, 6))


def test_without_a_ladder_the_table_says_so_and_declared_pairs_stand_below_it(folder, fake):
    suite = read(folder, HEAD + THIN + ARM + '[[compare]]\narm = "thin"\nagainst = "a"\nmargin = 3\n')
    assert suite.pairs == (Pair(arm="thin", against="a", margin=3),)
    assert suite.rival(9) == dense_arm(9)
    job = job_of(suite, folder)
    run_arms(job, range(1))
    printed = suite_table(suite, result_lines(job.out))
    assert "UniPC's at the model's own noise shift, not the best solver" in printed
    assert printed.index("not the best solver") < printed.index("| thin vs a | +")


def test_many_arms_are_warned_of_and_a_suite_may_be_timed_by_itself(folder, fake):
    arms = "".join(THIN.replace('"thin"', f'"thin {name}"') for name in "abcdefghijk")
    (folder / "s.toml").write_text(HEAD + arms)
    options = ("--out", folder / "s.jsonl", "--cache", folder / "cache")
    found = command("run", folder / "s.toml", "--table", *options)
    assert "s has 11 arms, more than 10: each must stand after Holm's correction over all of them" in told(found)
    (folder / "s.toml").write_text(HEAD + "timed = true\n" + THIN + ARM)
    found = command("run", folder / "s.toml", *options)
    assert found.exit_code == 0, found.output
    assert "| thin | 7.50 | 6.40 | 7.50 | 7.50, 75% |" in found.stdout
    assert "against fewer steps at equal time, dB" in found.stdout


def lines_of(arm, leads, steps=30, **more):
    values = {"arm": arm, "num_inference_steps": steps, "work": 20.0, **more}
    return [ResultLine.of({**values, "clip": clip, "psnr": 30.0 + clip % 3 + lead}) for clip, lead in enumerate(leads)]


OURS, WELL = [17.0, 16.0, 18.0, 15.5, 17.5, 16.5, 17.2, 16.8], [4.0, 5.0, 2.5, 4.5, 1.5, 5.5, 3.0, 3.9]
RUNS = [
    *lines_of("ours", OURS, steps_in_time=21.3), *lines_of("well", WELL, steps_in_time=22.2),
    *lines_of("other", [0.0] * 8, steps_in_time=22.2), *lines_of("dear", WELL, steps_in_time=24.0),
]  # fmt: skip


def test_declared_pairs_are_judged_together_by_their_margins_and_tell_both_times():
    wanted = [("ours", "other", 3.0), ("well", "other", 3.0), ("dear", "other", 0.0), ("other", "ours", 0.0)]
    declared = [Pair(arm=arm, against=against, margin=margin) for arm, against, margin in wanted]
    found = pair_figures(declared, RUNS, 30)
    assert [one.verdict for one in found] == [
        "ahead by more than 3 dB", "open", "ahead, at more time", "behind, at more time",
    ]  # fmt: skip
    assert found[1].ahead.low < 3 < found[1].ahead.mean
    assert {one.ahead.together for one in found} == {4}
    assert pair_figures([declared[0]], RUNS, 30)[0].ahead.p_holm < found[0].ahead.p_holm
    rows = pairs_markdown(found).splitlines()
    assert rows[2] == "| pair | PSNR ahead, dB (median) | Holm p | verdict | share of dense time |"
    assert rows[4].startswith("| ours vs other | +16.81 [")
    assert rows[4].endswith("(+16.90) | < .001 | ahead by more than 3 dB | 0.71 vs 0.74 |")
    assert pairs_markdown(pair_figures(declared, [], 30)) == pairs_markdown(pair_figures([], RUNS)) == ""


def test_an_arm_that_saved_nothing_and_references_that_did_not_converge_are_not_judged():
    values = {"ssim": 0.9, "work_real": 20.0, "methods": {}}
    lines = [
        *lines_of("ours", OURS, **{**values, "methods": {"easycache": {}}}),
        *lines_of("idle", [70.0] * 8, **{**values, "work": 30.01, "work_real": 30.01, "rival": {"cache-dit": {}}}),
        *lines_of("guided", WELL, **{**values, "work": 30.0, "work_real": 30.0, "methods": {"nag": {}}}),
        *(line for steps in (20, 30, 31) for line in lines_of(f"unipc {steps}", [0.0] * 8, steps, **values)),
    ]
    suite = Suite(name="s", model="wan-plain", clips=8, arms=(
        *(Arm(name=name, num_inference_steps=30, flow_shift=2.0) for name in ("ours", "idle", "guided")),
    ))  # fmt: skip
    found = {arm.name: arm for arm in suite_figures(suite, lines)}
    assert (found["idle"].saved_nothing, found["idle"].ahead) == (True, {})
    assert found["ours"].ahead["work"].together == 2
    assert found["guided"].ahead["work"].mean == pytest.approx(3.74, abs=0.01)
    printed = suite_table(suite, lines)
    (row,) = (line for line in printed.splitlines() if "| idle " in line)
    assert row.endswith("| saved nothing | saved nothing |")
    assert "correction over 2 arms" in printed
    for at, line in enumerate(lines):
        confirmed = {"reference_confirmed": {"steps": 512, "agreement": 68.4}} if line.clip == 1 else {}
        agreement = {"reference_agreement": 17.5 if line.clip in (0, 1) else 50.0, "reference_steps": 256}
        lines[at] = dataclasses.replace(line, **agreement, **confirmed)
    assert {arm.clips for arm in suite_figures(suite, lines)} == {7}
    printed = suite_table(suite, lines)
    assert "Left out, since their references did not converge to 45 dB: clip 0 (256 steps, 17.5 dB)." in printed
    assert "References that a run of twice as many steps confirmed: clip 1 (256 steps, 68.4 dB to 512)." in printed
    assert "| clips |" not in printed
    pair = Pair(arm="ours", against="guided")
    assert pair_figures([pair], lines)[0].ahead.count == 7


def test_the_judge_s_score_stands_beside_the_pairs_lead():
    lines = [dataclasses.replace(line, score=0.5 + 0.1 * (line.arm == "ours") + line.clip % 3 / 100) for line in RUNS]
    found = pair_figures([Pair(arm="ours", against="other"), Pair(arm="well", against="other")], lines, 30)
    assert [one.score.mean for one in found] == pytest.approx([10, 0])
    assert [one.score.verdict for one in found] == ["ahead", "open"]
    rows = pairs_markdown(found).splitlines()
    assert rows[2].endswith("| verdict | score, % | share of dense time |")
    assert rows[4].endswith("(+10.0) ahead | 0.71 vs 0.74 |")
    assert pair_figures([Pair(arm="ours", against="other")], RUNS, 30)[0].score is None


def test_a_margin_that_is_clearly_missed_is_told_and_few_clips_give_no_verdict():
    pair = Pair(arm="well", against="other", margin=9.0)
    assert pair_figures([pair], RUNS)[0].verdict == "not 9 dB ahead"
    short = [line for line in RUNS if line.clip < 5]
    (few,) = pair_figures([pair], short)
    assert (few.verdict, few.ahead.low) == ("too few", None)
    assert "no verdict under 6 clips" in pairs_markdown([few])
    untimed = [dataclasses.replace(line, steps_in_time=None) for line in RUNS]
    printed = pairs_markdown(pair_figures([pair], untimed))
    assert "share of dense work |" in printed
    assert "| 0.67 vs 0.67 |" in printed


def test_the_study_keeps_the_best_run_of_each_number_of_steps(folder):
    arms = best_rival.grid(["unipc", "dpm++"], [5.0, 8.0], [4, 8], own=5.0)
    assert [arm.name for arm in arms] == [
        "unipc 4", "unipc 8", "unipc shift 8, 4", "unipc shift 8, 8", "dpm++, 4", "dpm++, 8", "dpm++ shift 8, 4",
        "dpm++ shift 8, 8",
    ]  # fmt: skip
    suite = Suite(name="r", model="wan-plain", clips=2, first_clip=3, arms=arms, reference_steps=30)
    better = {"dpm++ shift 8, 4": 9.0, "unipc 8": 5.0}
    lines = [
        {"arm": arm.name, "clip": clip, "psnr": 20.0 + clip + better.get(arm.name, 0)}
        for arm in arms for clip in (3, 4)
    ]  # fmt: skip
    best_rival.write_ladder(best_rival.ladder_of(suite, lines), folder / "r.toml", "made so")
    ladder = read_ladder(folder / "r.toml")
    assert (ladder.model, ladder.first_clip, ladder.clips, ladder.reference_steps) == ("wan-plain", 3, 2, 30)
    assert [(rung.num_inference_steps, rung.solver, rung.flow_shift, rung.psnr) for rung in ladder.rungs] == [
        (4, "dpm++", 8.0, 32.5), (8, "unipc", None, 28.5),
    ]  # fmt: skip
    assert ladder.rungs[0].tried == {"unipc": 23.5, "unipc shift 8": 23.5, "dpm++": 23.5, "dpm++ shift 8": 32.5}
    with pytest.raises(ConfigError, match=r"of 4 steps"):
        best_rival.ladder_of(suite, lines[:1])


def test_a_rung_is_confirmed_on_clips_that_did_not_choose_it(folder, fake):
    tried = 'tried = {"dpm++ shift 8" = 20.0, "unipc" = 19.0, "dpm++" = 18.0, "unipc shift 3" = 2.0}\n'
    (folder / "rivals.toml").write_text(LADDER.replace("psnr = 20.0\n", f"psnr = 20.0\n{tried}"))
    ladder = read_ladder(folder / "rivals.toml")
    arms = best_rival.again(ladder)
    assert [arm.name for arm in arms] == ["dpm++ shift 8, 3", "unipc 3", "dpm++, 3"]
    assert (arms[0].solver, arms[0].flow_shift) == ("dpm++", 8.0)
    assert ladder.loose == "Not confirmed on prompts that did not choose: the rungs of 3, 7 steps."
    suite = Suite(name="r", model="wan-plain", clips=2, first_clip=5, arms=arms)
    for better, loose in ((0.4, "7 steps."), (0.6, "3, 7 steps.")):
        values = {"dpm++ shift 8, 3": 30.0, "unipc 3": 30.0 + better, "dpm++, 3": 20.0}
        lines = [{"arm": name, "clip": clip, "psnr": psnr} for name, psnr in values.items() for clip in (5, 6)]
        found = best_rival.confirmed(folder / "rivals.toml", suite, lines)
        best_rival.write_ladder(found, folder / "r.toml", "made so")
        ladder = read_ladder(folder / "r.toml")
        assert (ladder.confirmed_on, ladder.rungs[0].best_elsewhere) == ((5, 6), ("unipc", 30.0 + better))
        assert ladder.loose.endswith(loose)
    best_rival.write_ladder(found, folder / "rivals.toml", "made so")
    judged = judging(folder)
    job = job_of(judged, folder)
    run_arms(job, [4])
    assert ladder.loose in suite_table(judged, result_lines(job.out))


SETTINGS = {"enable_separate_cfg": True, "residual_diff_threshold": 2.0, "Fn_compute_blocks": 1, "max_warmup_steps": 2}


@pytest.fixture(scope="module")
def flux() -> EmbeddedModel:
    pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    return EmbeddedModel("flux-tiny", {})


def test_cache_dit_skips_blocks_and_leaves_the_model_as_it_was(flux: EmbeddedModel):
    def state():
        modules = flux.pipe.transformer.named_modules()
        return [
            (name, {key: id(one) for key, one in vars(module).items()}, [*module._modules]) for name, module in modules
        ]

    dense = flux.run(0, steps=4, solver="unipc")
    before, call = state(), type(flux.pipe).__call__
    made = flux.run(0, steps=4, solver="unipc", rival={"cache-dit": {**SETTINGS, "taylorseer_order": 1}})
    assert made.counts.blocks < dense.counts.blocks
    assert not np.array_equal(made.frames, dense.frames)
    assert state() == before  # in this order: cache-dit moves the first list behind the others
    with pytest.raises(KeyError), cached_by(flux.pipe, {"cache-dit": {}}):
        raise KeyError
    assert state() == before
    assert type(flux.pipe).__call__ is call
    assert np.array_equal(flux.run(0, steps=4, solver="unipc").frames, dense.frames)


def test_unknown_rivals_and_options_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="'cache-dit'"):
        check_rival("cachedit", {})
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    check_rival("cache-dit", {"an option": "of a suite whose results are read"})
    with pytest.raises(ConfigError, match=r"'\.\[eval\]'"):
        require_rivals(["cache-dit"])
