"""The settings that `tune pipeline` tries: all that a model takes, and none that it refuses."""

import dataclasses

import pytest
from dit_accel_assets import model_names, model_path
from dit_accel_eval.tune.space import default_space, space_of

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
    caches = {"easycache", "teacache", "magcache", "firstblockcache", "dbcache", "dbprune", "staticcache"}
    assert {method.name for arm in space for method in arm.methods} == sparse | caches
    for arm in space:
        assert from_toml(to_toml(arm.methods)) == list(arm.methods)
