"""What a suite's file and a ladder of rivals may say, and that everything else is refused by its name and value."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
from diffusers import FirstBlockCacheConfig
from dit_accel_assets.catalog import KNOWN
from dit_accel_eval.protocol import prompts_in_order
from dit_accel_eval.runs.loaded import OwnClips
from dit_accel_eval.runs.results import result_lines
from dit_accel_eval.runs.servers import Server
from dit_accel_eval.suites.job import Job, check_lines, checked
from dit_accel_eval.suites.suite import read_ladder, read_suite
from fake_model import ARM, HEAD, LADDER, THIN

from dit_accel import ConfigError
from dit_accel.adapters.embedded import assets

ROOT = Path(__file__).parents[2] / "eval"
BARE = '[[arm]]\nname = "a"\nnum_inference_steps = 2\n'
RIVALS = 'rivals = "rivals.toml"\n'


def top(text, arm=ARM):
    return HEAD + text + arm


def own(text):
    return HEAD.replace("clips = 1\n", "") + text + ARM


def clips(text, arm=THIN):
    return HEAD.replace("clips = 1\n", text) + arm


def compare(text):
    return HEAD + THIN + ARM + f"[[compare]]\n{text}\n"


BAD = [
    (HEAD, r"lacks.*\[\[arm\]\]"),
    (own(""), "lacks clips"),
    (top("clip = 3\n"), r"'clip'.*'clips'\?"),
    (HEAD.replace('"s"', "3") + ARM, r"name = 3.*kind"),
    (HEAD.replace("version = 2", "version = 1") + ARM, "of version 2,"),
    ("version", r"s\.toml.*TOML"),
    (HEAD + ARM + ARM, "arms called 'a'"),
    (HEAD + ARM + "step = 3", r"arm 'a'.*key 'step'"),
    (HEAD + ARM + "[arm.radial]\ndecay = 1", r"'a': radial.*'decay'"),
    (HEAD + "[[arm]]\nstep = 3", r"arm.*name: {'step': 3}"),
    (HEAD + '[[arm]]\nname = "a"', "num_inference_steps = None"),
    (HEAD + ARM.replace("= 2", "= [2, 0]"), r"num_inference_steps = \[2, 0\]"),
    (HEAD + ARM.replace("euler", "heun"), r"solver 'heun'.*dpm\+\+, euler"),
    (HEAD + BARE, r"arm 'a'.*unipc \(the default\).*'unipc 2'"),
    (HEAD + ARM.replace('"a"', '"unipc 2"'), r"'unipc 2'.*runs.*unipc"),
    (HEAD + ARM.replace('"a"', '"dense 2"'), r"'dense 2'.*ladder"),
    (HEAD + ARM.replace("_steps = 2", "_steps = 99999999999999"), r"'a': num_inference_steps.*10,000, got 99,999,"),
    (HEAD + ARM + "diffusers = { BlockCacheConfig = {} }", r"'BlockCacheConfig'.*'First"),
    (HEAD + ARM + "diffusers = { FirstBlockCacheConfig = 0.1 }", r"FirstBlockCacheConfig = 0.1"),
    (HEAD + ARM + "diffusers = { FirstBlockCacheConfig = { thresh = 0.1 } }", r"FirstBlockCacheConfig.*'thresh'"),
    (HEAD + BARE + "scheduler = { UniPC = {} }", r"arm 'a': .*scheduler 'UniPC'; "),
    (HEAD + BARE + "scheduler = { EDMEulerScheduler = {} }", r"arm 'a': EDMEulerScheduler.*noise schedule"),
    (HEAD + BARE + "scheduler = { UniPCMultistepScheduler = { order = 3 } }", r"UniPCMultistepScheduler.*'order'; "),
    (HEAD + BARE + "scheduler = { A = {}, B = {} }", r"one class; write scheduler = "),
    (HEAD + ARM + "scheduler = { UniPCMultistepScheduler = {} }", r"scheduler.*beside solver"),
    (HEAD + BARE + "guider = { Guidance = {} }", r"guider 'Guidance'; "),
    (HEAD + BARE + "guider = { AutoGuidance = { scale = 3 } }", r"AutoGuidance.*'scale'; did"),
    (HEAD + BARE + "rival = { cachedit = {} }", r"rival.*'cachedit'.*'cache-dit'"),
    (top('metrics = ["pnsr"]\n'), r"s.toml: .*metric 'pnsr'.*'psnr'"),
    (top("first_clip = -1\n"), "first_clip = -1"),
    (top('dtype = "float8"\n'), r"'float8'.*'float32'"),
    (top('judge = "gone.py"\n'), r"s.toml.*judge 'gone.py'.*name one"),
    (top(f'judge = "{ROOT}/studies/judge_longer.py"\ntimed = true\n'), r"timed.*judge = '.*judge_longer\.py'"),
    (top('reference_solver = "own"\n'), "reference_solver without reference_steps"),
    (top('reference_steps = 9\nreference_solver = "onw"\n'), r"reference_solver 'onw'.*'own'"),
    (own("seeds = [1]\n"), r"seeds.*prompts = \[...\]"),
    (own("prompts = []\n"), r"prompts.*empty list"),
    (own('prompts = "judgin"\n'), r"prompts 'judgin'.*'judging'"),
    (own('prompts = ["a", "a"]\n'), r"prompts.*'a' twice"),
    (own('prompts = ["a"]\nseeds = [-1]\n'), r"seeds.*-1"),
    (top('prompts = ["a"]\n'), r"clips.*beside prompts"),
    (own('prompts = ["a"]\nprompt_file = "p.txt"\n'), r"prompts and.*prompt_file"),
    (own('prompt_file = "p.txt"\n'), r"prompt_file.*p.txt"),
    (own('prompts = ["a"]\njudge = "j.py"\n'), r"judge = 'j.py', which.*held-out"),
    (clips(f"clips = 2\n{RIVALS}"), r"0 to 1,.* 0 to 3;.*first_clip"),
    (clips(f"clips = 3\nfirst_clip = 3\n{RIVALS}"), r"3 to 5,.*rivals"),
    (clips("clips = 2\nfirst_clip = 15\nchosen_on = [0, 15]\n"), r"15 to 16,.*\(chosen_on\).* 0 to 15"),
    (clips("clips = 2\nchosen_on = [3]\n"), r"chosen_on = \[3\]"),
    (clips("clips = 2\nchosen_on = [3, 1]\n"), r"chosen_on = \[3, 1\]"),
    (clips('clips = 2\nrivals = "none.toml"\n'), r"rivals at.*none\.toml.*best_rival"),
    (clips(f"clips = 2\nfirst_clip = 4\nreference_steps = 30\n{RIVALS}"), r"reference_steps 30.*None"),
    (clips(f"clips = 2\nfirst_clip = 4\n{RIVALS}call = {{ num_frames = 5 }}\n"), r"call \{'num_frames': 5\}"),
    (compare('arm = "thin"\nagainst = "thn"'), r"'thn'.*'thin'"),
    (compare('arm = "thin"'), r"without against"),
    (compare('arm = "thin"\nagainst = "thin"'), r"'thin' with 'thin'"),
    (compare('arm = "thin"\nagainst = "a"\nmargin = "3"'), r"margin = '3'"),
]

BAD_LADDERS = [
    ("version = 1", "version = 9", r"rivals\.toml.*version 1"),
    ("first_clip = 0\n", "", r"lacks first_clip"),
    ("psnr = 20.0\n", "", r"rung.*'dpm\+\+'.*needs"),
    ('"dpm++"', '"dpm"', r"rivals\.toml: .*solver 'dpm'"),
    ("psnr = 30.0", "psnr = 30.0\nshift = 2", r"'shift'.*'flow_shift'"),
    ("[[rung]]", "[rung]]", r"rivals\.toml.*TOML"),
    ("wan-plain", "wan-tiny", r"model 'wan-plain'.*'wan-tiny'.*best_rival"),
]


CARDS = {"card-wan-1.3b": "wan-tiny", "card-flux-dev": "flux-tiny"}
"""Suite for a card -> an embedded model of its model's class."""


def read(folder, text):
    (folder / "s.toml").write_text(text)
    return read_suite(folder / "s.toml")


def test_bad_files_say_what_is_wrong(tmp_path):
    (tmp_path / "rivals.toml").write_text(LADDER)
    (tmp_path / "j.py").touch()
    for text, message in BAD:
        with pytest.raises(ConfigError, match=message):
            read(tmp_path, text)
    for before, after, message in BAD_LADDERS:
        (tmp_path / "rivals.toml").write_text(LADDER.replace(before, after, 1))
        with pytest.raises(ConfigError, match=message):
            read(tmp_path, clips(f"clips = 2\nfirst_clip = 4\n{RIVALS}"))


def test_committed_suites_read_and_match_their_results_without_the_rivals(tmp_path, monkeypatch):
    """As `make demo` reads one where no rival is installed; to run a rival is refused before anything runs."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: find(name, *more) if name != "cache_dit" else None
    )
    rival = read(tmp_path, HEAD + BARE + "rival = { cache-dit = {} }\n")
    job = Job(suite=rival, out=tmp_path / "s.jsonl", cache=tmp_path, timed=False, threads=None)
    with pytest.raises(ConfigError, match=r"cache-dit.*'\.\[eval\]'"), checked(job, [0]):
        pass
    for path in sorted((ROOT / "suites").glob("*.toml")):
        suite = read_suite(path)
        assert suite.name == path.stem
        assert suite.model in KNOWN or path.stem in CARDS
        results = ROOT / "results" / f"{suite.name}.jsonl"
        lines = result_lines(results)
        listed = {arm.name: arm.to_dict() for arm in suite.arms}
        assert {line.arm for line in lines if not line.is_rival} <= {*listed}
        if lines:
            job = Job(suite=suite, out=results, cache=results, timed=False, threads=None)
            check_lines(results, [line.raw for line in lines], job.setting, job.settings(lines))


@pytest.mark.parametrize("name", CARDS)
def test_a_suite_for_a_card_fits_its_class_and_judges_on_the_protocols_prompts(name, tmp_path, monkeypatch):
    suite, asked = read_suite(ROOT / "suites" / f"{name}.toml"), []
    monkeypatch.setattr(Server, "_answer", lambda server, *_, **__: asked.append(server.url))
    suite = dataclasses.replace(suite, model=str(assets().model_path(CARDS[name])))
    with checked(Job(suite=suite, out=tmp_path / "s", cache=tmp_path, timed=True, threads=None), range(16)):
        assert suite.own.prompts == prompts_in_order("judging")
    assert len(asked) == 4


def test_arms_may_hold_diffusers_caches_lists_of_steps_and_another_projects_cache(tmp_path):
    (arm,) = read(tmp_path, HEAD + ARM + "diffusers = { FirstBlockCacheConfig = { threshold = 0.1 } }").arms
    assert isinstance(arm.methods[0].config, FirstBlockCacheConfig)
    assert arm.to_dict()["methods"] == {"diffusers-cache": {"config": "FirstBlockCacheConfig", "threshold": 0.1}}
    suite = read(tmp_path, HEAD + '[[arm]]\nname = "unipc"\nnum_inference_steps = [4, 5]\n' + ARM)
    arms = [(arm.name, arm.num_inference_steps, arm.is_dense) for arm in suite.arms]
    assert arms == [("unipc 4", 4, True), ("unipc 5", 5, True), ("a", 2, False)]
    rival = read(tmp_path, top('reference_steps = 9\nreference_solver = "own"\n')).rival(4)
    assert (rival.name, rival.num_inference_steps, rival.solver) == ("dense 4", 4, "own")
    pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    assert read(tmp_path, HEAD + BARE + "rival = { cache-dit = {} }\n").arms[0].rival == {"cache-dit": {}}
    for more, message in (("easycache = { threshold = 0.1 }", "easycache"), ("", "residual_diff_threshold")):
        options = "" if more else "residual_threshold = 0.1"
        with pytest.raises(ConfigError, match=message):
            read(tmp_path, HEAD + BARE + f"rival = {{ cache-dit = {{ {options} }} }}\n{more}\n")


def test_clips_are_every_prompt_with_every_seed(tmp_path):
    for prompts, seeds, expected in (
        (("a", "b"), (), [("a", 0), ("b", 1)]),
        (("a", "b"), (7,), [("a", 7), ("b", 7)]),
        (("a", "b"), (3, 5), [("a", 3), ("a", 5), ("b", 3), ("b", 5)]),
    ):
        given = OwnClips(prompts=prompts, seeds=seeds)
        assert [(given.prompt(clip), given.seed(clip)) for clip in range(len(given))] == expected
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    suite = read(tmp_path, own('prompt_file = "p.txt"\nseeds = [4, 5]\n'))
    assert (suite.clips, suite.own) == (4, OwnClips(prompts=("one", "two"), seeds=(4, 5)))


def test_the_ladder_s_nearest_rung_gives_solver_and_shift(tmp_path):
    (tmp_path / "rivals.toml").write_text(LADDER)
    ladder = read_ladder(tmp_path / "rivals.toml")
    assert [ladder.arm(steps).solver for steps in (1, 3, 4, 5, 7, 50)] == ["dpm++"] * 3 + ["unipc"] * 3
    assert (ladder.arm(4).name, ladder.arm(4).flow_shift) == ("dense 4", 8.0)
    assert ladder.arm(9).is_dense  # found among the dense runs on disk
    assert str(ladder) == "3 dpm++ shift 8, 7 unipc, chosen on clips 0 to 3"
