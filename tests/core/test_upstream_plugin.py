"""The plugin for diffusers' own tests: it attaches to what they build, compares forwards and finds what is left."""

import gc
import importlib
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from wan_tiny import TINY

from dit_accel import LiteAttention, attach

UPSTREAM = Path(__file__).parents[1] / "upstream"
sys.path.insert(0, str(UPSTREAM))

import upstream_models  # noqa: E402
import upstream_plugin  # noqa: E402
from upstream_models import Watch, leftovers, same_bits, untouched  # noqa: E402


def toy_class(**body: Any) -> Any:
    """Return a class of its own that the Wan adapter covers, since following one changes it for good."""
    return type("WanTransformer3DModel", (diffusers.WanTransformer3DModel,), body)


def inputs(timestep: float) -> tuple[torch.Tensor, ...]:
    noise = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 12, 7, 8, 16, generator=noise), torch.randn(1, 6, 64, generator=noise)
    return latents, torch.tensor([timestep]), text


@torch.no_grad()
def forward(model: Any, timestep: float = 500.0) -> Any:
    return model(*inputs(timestep))


def watched(mode: str, cls: Any) -> Watch:
    watch = Watch(mode)
    watch.follow(cls)
    watch.begin(compiles=False)
    return watch


def test_a_model_that_is_built_is_attached_until_the_test_ends():
    for mode in upstream_models.METHODS:
        cls = toy_class()
        watch = watched(mode, cls)
        model = cls(**TINY)
        assert model.config.num_layers == TINY["num_layers"]
        assert {"_compiled_call_impl", "cache_context", "compile"} <= vars(model).keys()
        assert leftovers(type("Derived", (cls,), {})(**TINY)) == []  # whose class is not followed
        forward(model)
        forward(model, 400.0)
        assert watch.end() == []
        assert leftovers(model) == []
        assert {"_compiled_call_impl", "cache_context", "compile"}.isdisjoint(vars(model))
        planned = 0 if mode == "neutral" else 2 * TINY["num_layers"]
        compared = 0 if mode == "active" else 2
        assert watch.counts == dict(models=1, forwards=2, compared=compared, planned=planned)
        assert watch.built == {"WanTransformer3DModel"}
        forward(model)
        assert watch.counts["forwards"] == 2  # it is no longer watched


def test_what_is_left_after_detach_is_found():
    model = toy_class()(**TINY)
    assert leftovers(model) == []
    other = toy_class()(**TINY)
    attach(other, preset="none")
    with attach(model, preset="none"):
        call = vars(model)["_compiled_call_impl"]
        found = leftovers(model)
    top = type(model).__name__
    assert {f"{top}._compiled_call_impl", f"{top}.compile", f"{top}.cache_context"} <= {*found}
    assert "blocks.0.attn1.processor" in found
    assert leftovers(model) == []
    for plant, place in (
        (
            lambda: setattr(model.blocks[1].attn2, "processor", other.blocks[0].attn1.processor),
            "blocks.1.attn2.processor",
        ),
        (lambda: model.blocks[0].register_forward_hook(call), "blocks.0._forward_hooks"),
        (lambda: setattr(model.blocks[1], "_dit_accel_layer", 1), "blocks.1._dit_accel_layer"),
        (lambda: setattr(model.blocks[0].attn2.processor, "_dit_accel_layer", 1), "blocks.0.attn2.processor"),
    ):
        plant()
        assert place in leftovers(model)


def test_a_test_hears_of_what_is_left_and_of_a_detach_that_raises():
    cls = toy_class()
    watch = watched("neutral", cls)
    model = cls(**TINY)
    model.blocks[0].extra = vars(model)["_compiled_call_impl"]
    assert watch.end() == ["neutral: WanTransformer3DModel: blocks.0.extra is left after detach"]
    assert watch.end() == []  # of the next test nothing
    watch = watched("neutral", cls := toy_class())
    vars(cls(**TINY))["_compiled_call_impl"].owner.detach()
    assert "detach raised AttachError" in watch.end()[0]


def test_attach_and_detach_must_leave_every_attribute_the_object_that_it_was(monkeypatch):
    def leaves_something(model: Any, *methods: Any, preset: str) -> Any:
        model.blocks[0].attn1.processor.kept = 1
        return attach(model, *methods, preset="none")

    monkeypatch.setattr(upstream_models, "attach", leaves_something)
    cls = toy_class()
    watch = watched("neutral", cls)
    cls(**TINY)
    assert watch.end() == ["neutral: WanTransformer3DModel: attach and detach changed blocks.0.attn1.processor.kept"]


def test_forwards_are_compared_with_plain_ones():
    ones = torch.ones(3)
    for mode, attached, said in (
        ("neutral", ones, None),
        ("neutral", ones.nextafter(torch.full((3,), 2.0)), "in its bits"),
        ("neutral", torch.ones(4), "other shapes"),
        ("neutral", [ones, ones], "other shapes"),
        ("keep-all", torch.full((3,), 1.000001), None),
        ("keep-all", torch.full((3,), 1.0001), "by 0.0001 of its size"),
        ("keep-all", torch.full((3,), float("nan")), "by nan of its size"),
        ("active", torch.zeros(3), None),
    ):
        watch = watched(mode, cls := toy_class())
        watch.run(cls(**TINY), lambda attached=attached: attached, lambda: torch.ones(3))
        errors = watch.end()
        assert (errors == []) if said is None else (said in errors[0])


def test_a_plain_forward_draws_the_same_random_numbers_and_none_of_the_test():
    cls = toy_class()
    watch, model = watched("neutral", cls), cls(**TINY)
    torch.manual_seed(3)
    found = watch.run(model, lambda: torch.rand(4), lambda: torch.rand(4))
    torch.manual_seed(3)
    assert torch.equal(found, torch.rand(4))
    assert watch.end() == []


def test_a_forward_that_raises_must_raise_plain_too():
    def fails() -> None:
        raise ValueError("no")

    cls = toy_class()
    watch, model = watched("neutral", cls), cls(**TINY)
    with pytest.raises(ValueError, match="no"):
        watch.run(model, fails, fails)
    assert watch.end() == []
    model = cls(**TINY)
    with pytest.raises(ValueError, match="no"):
        watch.run(model, fails, lambda: torch.ones(1))
    assert "the attached forward alone raised" in watch.end()[0]
    model = cls(**TINY)
    watch.run(model, lambda: torch.ones(1), fails)
    assert "the plain forward alone raised" in watch.end()[0]
    watch.run(cls(**TINY), lambda: None, lambda: None)
    assert "NoneType holds no tensor to compare" in watch.end()[0]


def test_a_plain_forward_runs_nothing_of_ours():
    model = toy_class()(**TINY)
    with attach(model, LiteAttention(threshold=1e9, allow_positive_threshold=True, dense_steps=0, block_size=16)):
        forward(model)
        thinned = forward(model, 400.0).sample
        held = model.blocks[0].attn1.processor
        with untouched(model):
            assert not any("processor" in place for place in leftovers(model))
            plain = model._call_impl(*inputs(400.0)).sample
        assert model.blocks[0].attn1.processor is held
    assert same_bits(plain, forward(model, 400.0).sample)
    assert not torch.allclose(plain, thinned)


def test_keep_all_must_keep_all(monkeypatch):
    drops = LiteAttention(threshold=1e9, allow_positive_threshold=True, dense_steps=0, block_size=16)
    monkeypatch.setitem(upstream_models.METHODS, "keep-all", (drops,))
    cls = toy_class()
    watch, model = watched("keep-all", cls), cls(**TINY)
    forward(model)
    forward(model, 400.0)
    found = watch.end()
    assert any("dropped tiles" in text for text in found)
    assert any("of its size" in text for text in found)


def test_forwards_under_a_cache_or_a_compiler_are_not_compared():
    cls = toy_class()
    watch, model = watched("neutral", cls), cls(**TINY)
    hook = types.SimpleNamespace(_is_stateful=True)
    model.blocks[0]._diffusers_hook = types.SimpleNamespace(hooks={"cache": hook}, get_hook={"cache": hook}.get)
    forward(model)
    assert (watch.counts["forwards"], watch.counts["compared"]) == (1, 0)
    hook._is_stateful = False
    forward(model)
    assert (watch.counts["forwards"], watch.counts["compared"]) == (2, 1)
    watch.begin(compiles=True)
    assert "__call__" not in vars(cls)
    forward(model)
    assert watch.counts["forwards"] == 2
    assert watch.end() == []


TOY_MODELS = """
import diffusers

class WanTransformer3DModel(diffusers.WanTransformer3DModel):
    pass
"""
TOY_TESTS = """
import pytest
import toy_upstream_models
from wan_tiny import TINY

class TestCovered:
    model_class = toy_upstream_models.WanTransformer3DModel

    def test_alike(self):
        self.model_class(**TINY)

    def test_sees_us(self):
        assert "compile" not in vars(self.model_class(**TINY))

    def test_leaves_us(self):
        model = self.model_class(**TINY)
        model.extra = vars(model).get("compile")

    def test_fails(self):
        assert False, "as ever"

    @pytest.mark.skip
    def test_skipped(self):
        pass

    @pytest.mark.xfail
    def test_known(self):
        assert False

class TestForeign:
    model_class = int

    def test_left_out(self):
        assert False

def test_of_no_model():
    pass
"""


def run_toys(mode: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (folder / "toy_upstream_models.py").write_text(TOY_MODELS)
    (folder / "test_toys.py").write_text(TOY_TESTS)
    (folder / "test_broken.py").write_text("import not_installed_anywhere")
    monkeypatch.syspath_prepend(folder)
    toys = importlib.import_module("toy_upstream_models")
    monkeypatch.setattr(upstream_plugin, "covered_classes", lambda: [toys.WanTransformer3DModel])
    plugin = upstream_plugin.UpstreamPlugin(mode, folder / "out.json")
    options = ["-c", os.devnull, f"--rootdir={folder}", "--import-mode=importlib", "-p", "no:cacheprovider", "-p"]
    options += ["no:xdist", "--continue-on-collection-errors", "-q", str(folder)]
    try:
        pytest.main(options, plugins=[plugin])
    finally:
        gc.unfreeze()
        for name in ("toy_upstream_models", "test_toys"):
            sys.modules.pop(name, None)
    return json.loads((folder / "out.json").read_text())


def test_the_plugin_writes_down_how_tests_end(tmp_path, monkeypatch):
    plain, attached = (run_toys(mode, tmp_path, monkeypatch) for mode in ("plain", "neutral"))
    ends = {test.rpartition("::")[2]: outcome for test, (outcome, _) in plain["tests"].items()}
    assert ends == dict(
        test_alike="passed", test_sees_us="passed", test_leaves_us="passed", test_fails="failed",
        test_skipped="skipped", test_known="xfailed", test_of_no_model="passed",
    )  # fmt: skip
    assert plain["counts"] == {}
    assert plain["built"] == []
    assert [*plain["not_collected"]] == ["test_broken.py"]
    assert "not_installed_anywhere" in plain["not_collected"]["test_broken.py"]
    now = {test.rpartition("::")[2]: end for test, end in attached["tests"].items()}
    assert {test for test in now if now[test][0] != ends[test]} == {"test_sees_us", "test_leaves_us"}
    assert now["test_sees_us"][0] == "failed"
    assert now["test_leaves_us"][0] == "error"
    assert "extra is left after detach" in now["test_leaves_us"][1]
    assert attached["counts"]["models"] == 3
    assert attached["built"] == ["WanTransformer3DModel"]
