"""What all tuners share: the search that goes on, its file, what every command refuses; settings of `tune pipeline`."""

import dataclasses
import json
import re
from pathlib import Path

import dit_accel_eval.tune.base as base
import pytest
from dit_accel_assets import model_path
from dit_accel_eval.runs.model import shipped_scheduler
from dit_accel_eval.suites.suite import read_suite
from dit_accel_eval.tune.base import TuningRun, replaced_method
from dit_accel_eval.tune.caches import tune_magcache
from dit_accel_eval.tune.heads import tune_heads
from dit_accel_eval.tune.lite import tune_lite
from dit_accel_eval.tune.period import tune_period
from dit_accel_eval.tune.pipeline import BY_HAND, default_space, space_of
from dit_accel_eval.tune.profile import tune_profile
from dit_accel_eval.tune.schedule import tune_schedule
from tuning import PROMPTS, SMALL, request, tune

from dit_accel import ConfigError, EasyCache, MagCache, RadialAttention, SoftPAG
from dit_accel.adapters.model_files import read_model_files
from dit_accel.methods.toml import from_toml, to_toml

TUNERS = {"heads": tune_heads, "lite": tune_lite, "magcache": tune_magcache,
          "period": tune_period, "profile": tune_profile, "schedule": tune_schedule}  # fmt: skip
SUFFIX = {"heads": ".json", "profile": ".json"}


@pytest.fixture
def free(monkeypatch):
    """Loads no model."""
    monkeypatch.setattr(base, "load_pipeline", lambda asked: None)


def test_a_search_that_was_stopped_goes_on_and_scores_nothing_twice(free, tmp_path):
    scored, output = [], tmp_path / "a.toml"

    def score(point):
        if len(scored) == stop:
            raise KeyboardInterrupt
        scored.append(point)
        return {"of": point}

    stop = 2
    with pytest.raises(KeyboardInterrupt):
        TuningRun(request(), output, ".toml", None, goal=3).search(["x", ("y", 1), ["z"]], score)
    stop = None
    runs = TuningRun(request(), output, ".toml", None, goal=3)
    assert runs.scored == 2
    assert runs.search([["z"], "x", ("y", 1)], score) == [{"of": ["z"]}, {"of": "x"}, {"of": ["y", 1]}]
    assert scored == ["x", ("y", 1), ["z"]]
    assert runs.over_prompts(lambda prompt: prompt) == [*PROMPTS]
    assert [path.name for path in tmp_path.iterdir()] == ["a.toml.progress.json"]
    runs.finish()
    assert not list(tmp_path.iterdir())


def test_scores_of_another_run_or_none_at_all_are_refused(free, tmp_path):
    output, kept = tmp_path / "a.toml", tmp_path / "a.toml.progress.json"
    TuningRun(request(EasyCache()), output, ".toml", None, goal=3).search(["x"], str)
    for changed, options, message in (
        (request(EasyCache()), dict(goal=4), r"progress.*goal = 3.*4"),
        (request(EasyCache(), seed=1), dict(goal=3), r"progress.*seed = 0.*1"),
        (request(), dict(goal=3), r"progress.*methods = .*easycache"),
    ):
        with pytest.raises(ConfigError, match=message):
            TuningRun(changed, output, ".toml", None, **options)
    for text in ("{", '{"version": 9, "settings": {}, "scores": []}', "[]", json.dumps({"version": 1})):
        kept.write_text(text)
        with pytest.raises(ConfigError, match=r"tuning progress.*release"):
            TuningRun(request(), output, ".toml", None)


@pytest.mark.parametrize("name", TUNERS)
def test_an_output_that_can_not_be_written_is_refused_before_a_model_is_loaded(name, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "load_pipeline", lambda asked: pytest.fail("it was loaded"))
    suffix = SUFFIX.get(name, ".toml")
    options = dict(computed=3) if name == "schedule" else {}
    for output in (tmp_path / "own.txt", tmp_path / "none" / f"own{suffix}"):
        with pytest.raises(ConfigError, match=rf"output.*\{suffix}.*got"):
            TUNERS[name](request(), output, **options)
    (tmp_path / f"own{suffix}.progress.json").mkdir()
    with pytest.raises(ConfigError, match=r"progress file .*a folder"):
        TUNERS[name](request(), tmp_path / f"own{suffix}", **options)
    (tmp_path / f"own{suffix}").mkdir()
    with pytest.raises(ConfigError, match=r"output .*own\S+ .*a folder"):
        TUNERS[name](request(), tmp_path / f"own{suffix}", **options)


def test_a_request_s_own_config_is_tuned_and_its_other_methods_stay():
    mine, radial = MagCache(threshold=0.3), RadialAttention()
    assert replaced_method(request(radial, mine), MagCache) == (mine, (radial,))
    assert replaced_method(request(radial), MagCache) == (MagCache(), (radial,))
    assert replaced_method(request(), SoftPAG, SoftPAG(u=0.5))[0].u == 0.5


def test_bad_commands_are_one_line_and_exit_code_2(tmp_path, monkeypatch):
    for arguments, text in (
        (["radial"], "tune has no command 'radial'; known: heads"),
        (["lite", "--prompt", "a", "--prompt-file", "b"], "tune takes --prompt or --prompt-file, got both"),
        (["lite", "--model", "some/model"], "tune has no prompts of its own for some/model; give --prompt"),
        (["lite", "--set", "lite.threshold=-3"], "tune lite finds the thresholds itself, got lite.threshold = -3"),
        (["schedule", *SMALL, "--num-inference-steps", "5", "--computed", "9"], "computed = 9"),
        (["lite", "--rounds", "2"], "No such option: --rounds"),
    ):
        monkeypatch.chdir(tmp_path)
        result = tune(*arguments)
        assert (result.exit_code, text in " ".join(result.stderr.split())) == (2, True)
        assert not list(tmp_path.iterdir())


def test_a_command_writes_its_file_and_prints_a_table_or_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = tune("magcache", *SMALL, "--num-inference-steps", "4")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("magcache.toml\n")
    assert "largest over smallest" in result.stdout
    result = tune("magcache", *SMALL, "--num-inference-steps", "4", "--json", "-o", "own.toml")
    told = json.loads(result.stdout)
    assert (told["output"], told["model"], len(told["ratios"])) == ("own.toml", "wan-plain", 4)
    assert {path.name for path in Path().iterdir()} == {"magcache.toml", "own.toml"}
    helped = tune("heads", "--help").stdout
    assert all(option in helped for option in ("--rounds", "--num-frames", "--softpag"))
    assert "--target-error" not in helped


def test_methods_that_a_model_does_not_take_or_has_no_numbers_for_are_left_out():
    adapter, family = read_model_files(str(model_path("wan-plain"))).identify()
    plain = dataclasses.replace(family, recipes={})
    refusing = dataclasses.replace(adapter, refused={"sparsed": "no reason"})
    names = {method.name for arm in space_of(50, refusing, plain) for method in arm.methods}
    assert not {"sparsed", "teacache", "magcache"} & names
    assert {"sol", "radial", "easycache"} <= names
    assert {arm.num_inference_steps for arm in space_of(50, adapter, family)} >= {25, 30, 40, 50}
    methods = [method for arm in space_of(50, adapter, family) for method in arm.methods]
    assert {getattr(method, "block_size", None) for method in methods} == {None}
    with_shift = space_of(20, adapter, family, scheduler=shipped_scheduler(str(model_path("wan-plain"))))
    assert {arm.flow_shift for arm in with_shift} == {None, 3.0, 5.0, 8.0}  # its own is 12
    assert {arm.flow_shift for arm in space_of(20, adapter, family)} == {None}


@pytest.mark.parametrize("model", ["wan-tiny", "wan-plain", "flux-tiny"])
def test_the_default_space_has_every_kind_of_setting(model):
    space = default_space(model)
    assert len({arm.name for arm in space}) == len(space)
    assert {arm.solver for arm in space} == {"unipc", "dpm++", "euler"}
    assert {1, 2} <= {len(arm.methods) for arm in space}
    sparse = {"sol", "sparsed", "lite"} | ({"radial", "dfa"} if model.startswith("wan") else set())
    caches = {"easycache", "seacache", "teacache", "magcache", "firstblockcache", "dbcache", "dbprune", "staticcache"}
    assert {method.name for arm in space for method in arm.methods} == sparse | caches
    for arm in space:
        assert from_toml(to_toml(arm.methods)) == list(arm.methods)


ROOT = Path(__file__).parents[2]


def test_the_winners_of_the_evidence_page_are_always_run():
    """Those that its table calls ahead by time, but for diffusers' own caches; tiles are the model's own business."""
    rows = re.findall(
        r"^\| ([\w-]+) \| ([^|]+) \|.* ahead \|$", (ROOT / "docs/evidence/index.md").read_text(), re.MULTILINE
    )
    ours = [(model, name) for model, name in rows if not name.startswith("diffusers ")]
    assert ours
    for model, name in ours:
        arms = {arm.name: arm for arm in read_suite(ROOT / f"eval/suites/report-{model}.toml").arms}
        known = [_bare(arm) for arm in default_space(model) if arm.name in BY_HAND]
        assert _bare(arms[name]) in known


def _bare(arm):
    methods = [{**one.to_dict(), "name": one.name, "block_size": None} for one in arm.methods]
    return arm.num_inference_steps, arm.solver, arm.flow_shift, methods
