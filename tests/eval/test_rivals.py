"""Other projects' caches as arms of a suite: they act, they leave nothing behind, and what they can't do is refused."""

from pathlib import Path

import numpy as np
import pytest
from dit_accel_eval.runs.loaded import EmbeddedModel
from dit_accel_eval.runs.rivals import cached_by, check_rival
from dit_accel_eval.suites.suite import read_suite

from dit_accel import ConfigError

SETTINGS = {"enable_separate_cfg": True, "residual_diff_threshold": 2.0, "Fn_compute_blocks": 1, "max_warmup_steps": 2}


@pytest.fixture(scope="module")
def flux() -> EmbeddedModel:
    pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    return EmbeddedModel("flux-tiny", {})


def test_cache_dit_skips_blocks_and_leaves_the_model_as_it_was(flux: EmbeddedModel):
    dense = flux.run(0, steps=6, solver="unipc")
    before = [
        (name, dict(vars(module)), list(module._modules)) for name, module in flux.pipe.transformer.named_modules()
    ]
    call = type(flux.pipe).__call__
    made = flux.run(0, steps=6, solver="unipc", rival={"cache-dit": {**SETTINGS, "taylorseer_order": 1}})
    assert made.counts.blocks < dense.counts.blocks
    assert not np.array_equal(made.frames, dense.frames)
    after = [
        (name, dict(vars(module)), list(module._modules)) for name, module in flux.pipe.transformer.named_modules()
    ]
    assert [one[0] for one in after] == [one[0] for one in before]  # cache-dit moves the first list behind the others
    for (name, old, children), (_, new, left) in zip(before, after, strict=True):
        assert {key: id(value) for key, value in old.items()} == {key: id(value) for key, value in new.items()}, name
        assert children == left, name
    assert type(flux.pipe).__call__ is call
    again = flux.run(0, steps=6, solver="unipc")
    assert np.array_equal(again.frames, dense.frames)


def test_an_error_inside_takes_the_rival_off(flux: EmbeddedModel):
    forward = flux.pipe.transformer.forward
    with pytest.raises(KeyError), cached_by(flux.pipe, {"cache-dit": {}}):
        raise KeyError
    assert flux.pipe.transformer.forward == forward
    assert not hasattr(flux.pipe.transformer, "_is_cached")


def test_unknown_rivals_and_options_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="'cache-dit'"):
        check_rival("cachedit", {})
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"'\.\[eval\]'"):
        check_rival("cache-dit", {})


def test_an_option_is_named_with_its_neighbours(flux: EmbeddedModel):
    with pytest.raises(ConfigError, match="residual_diff_threshold"):
        check_rival("cache-dit", {"residual_threshold": 0.1})


def test_a_rival_stands_alone_in_its_arm(tmp_path: Path, flux: EmbeddedModel):
    path = tmp_path / "suite.toml"
    head = 'version = 2\nname = "x"\nmodel = "flux-tiny"\nclips = 1\n[[arm]]\nname = "a"\nnum_inference_steps = 4\n'
    path.write_text(head + "rival = { cache-dit = {} }\n")
    assert read_suite(path).arms[0].rival == {"cache-dit": {}}
    path.write_text(head + "rival = { cache-dit = {} }\neasycache = { threshold = 0.1 }\n")
    with pytest.raises(ConfigError, match="easycache"):
        read_suite(path)
