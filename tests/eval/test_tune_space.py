"""The settings of `tune pipeline`: all that a model takes, the winners of the evidence, none that it refuses."""

import dataclasses
import re
from pathlib import Path

import pytest
from dit_accel_assets import model_names, model_path
from dit_accel_eval.runs.model import shipped_scheduler
from dit_accel_eval.suites.suite import read_suite
from dit_accel_eval.tune.space import BY_HAND, default_space, space_of

from dit_accel.adapters.model_files import read_model_files
from dit_accel.methods.toml import from_toml, to_toml


def test_methods_that_a_model_does_not_take_or_has_no_numbers_for_are_left_out():
    adapter, family = read_model_files(str(model_path("wan-plain"))).identify()
    plain = dataclasses.replace(family, recipes={})
    refusing = dataclasses.replace(adapter, refused={"sparsed": "no reason"})
    names = {method.name for arm in space_of(50, refusing, plain) for method in arm.methods}
    assert not {"sparsed", "teacache", "magcache"} & names
    assert {"sol", "radial", "easycache"} <= names
    assert {arm.num_inference_steps for arm in space_of(50, adapter, family)} >= {25, 30, 40, 50}
    assert all(
        getattr(method, "block_size", None) is None for arm in space_of(50, adapter, family) for method in arm.methods
    )


@pytest.mark.parametrize("model", model_names())
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


def test_other_noise_shifts_are_tried_where_the_model_has_one():
    path = str(model_path("wan-plain"))
    adapter, family = read_model_files(path).identify()
    with_shift = space_of(20, adapter, family, scheduler=shipped_scheduler(path))
    assert {arm.flow_shift for arm in with_shift} == {None, 3.0, 5.0, 8.0}  # its own is 12
    assert {arm.flow_shift for arm in space_of(20, adapter, family)} == {None}
