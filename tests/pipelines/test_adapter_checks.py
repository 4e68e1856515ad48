"""Every adapter under the checks that its users get, and the checks against adapters that are wrong."""

import dataclasses

import pytest
import tiny_models
import torch
from dit_accel_pipelines import ADAPTERS as PACKAGED
from dit_accel_pipelines.families.image_families import IMAGE_ADAPTERS
from dit_accel_pipelines.families.wan import WAN
from shallow_models import shallow
from some_cases import some

from dit_accel.adapters import installed
from dit_accel.methods.attention.sol import SolHandler
from dit_accel.methods.caches.engine import StepCacheHandler
from dit_accel.methods.caches.history import History
from dit_accel.methods.caches.static import StaticCache
from dit_accel.testing import CHECKS, METHOD_CASES, check_adapter
from dit_accel.testing.method_cases import CACHE_CASES

ADAPTERS = {adapter.name: adapter for adapter in PACKAGED}
FAST = [name for name in CHECKS if name != "compile"]
WITH_METHODS = ["caches", "block caches", "active", "batch", "padding", "guidance"]
ALONE = [name for name in FAST if name not in (*WITH_METHODS, "pairs")]
SAMPLE = ("wan", "hunyuan-video", "cogvideox", "ltx", "flux", "sd3", "qwen-image", "z-image")
MASKED = {
    "qwen-image", "chroma", "krea2", "hunyuan-image", "lumina2", "bria-fibo-2", "nucleus-image", "prx",
    "joyimage-edit-plus", "pixart",
}  # fmt: skip
"""Image families whose tiny models hide text; of the video families the inputs tell."""
ADDED_POSITIONS = {
    "CogVideoXTransformer3DModel 0", "ConsisIDTransformer3DModel 2", "SD3Transformer2DModel 0",
    "SD3Transformer2DModel 1", "CogView3PlusTransformer2DModel 0", "AuraFlowTransformer2DModel 0",
    "PixArtTransformer2DModel 0",
}  # fmt: skip
"""Models whose sinusoidal or learned positions are added to the patches."""
SAME_BLOCKS = {"framepack", "flux-kin", "bria-fibo", "joyimage-edit", "hidream"}
"""Others have the same blocks; HiDream's choose their experts by values: no full graph, untouched either."""


def check(name, models, only):
    """Check some models of an adapter, and that what passes is what applies."""
    adapter, image = ADAPTERS[name], ADAPTERS[name] in IMAGE_ADAPTERS
    verdicts = check_adapter(adapter, *models, only=only)
    assert len(verdicts) == len(models)
    applying = set(METHOD_CASES) - set(adapter.refused)
    must = set(only) - {"padding", "rope", "signal"} if image else {"places", "layout", "blocks"} & set(only)
    must -= {"pairs"} if len(applying) < 2 else set()
    must |= {"signal"} & set(only) if image and adapter.signal else set()
    for model, results in verdicts.items():
        assert list(results) == only
        assert all(results[one] == "passed" for one in must)
        if model in ADDED_POSITIONS and "rope" in only:
            assert "positions to the patches" in results["rope"]
        elif "rope" in only:
            assert results["rope"] == "passed"
        if "batch" in only:
            assert (results["batch"] == "passed") == (models[0].max_batch > 1)
    if "padding" in only:
        masked = any("encoder" in word and "mask" in word for model in models for word in model.inputs(1))
        passed = [results["padding"] == "passed" for results in verdicts.values()]
        assert any(passed) == (name in MASKED if image else masked)


@pytest.mark.parametrize("name", some(ADAPTERS, "wan", "flux"))
def test_every_model_passes_the_checks_of_the_adapter_alone(name):
    check(name, tiny_models.MODELS[name], ALONE)


@pytest.mark.parametrize("name", some(ADAPTERS, "wan", "flux", slow=(*SAMPLE, "mochi", "cosmos-3", "ideogram4")))
def test_its_first_model_passes_those_with_methods(name):
    """All but pairs of methods."""
    check(name, tiny_models.MODELS[name][:1], WITH_METHODS)


@pytest.mark.parametrize("name", some(ADAPTERS, slow=SAMPLE))
def test_pairs_of_methods_pass(name):
    models = tiny_models.MODELS[name]
    check(name, [*map(shallow, models[:1] if name in ("wan", "flux") else models)], ["pairs"])


@pytest.mark.parametrize(
    "name", some([name for name in ADAPTERS if len(tiny_models.MODELS[name]) > 1], slow=("hunyuan-video", "sd3"))
)
def test_every_model_passes(name):
    check(name, tiny_models.MODELS[name][1:], ["active", "batch"])


@pytest.mark.parametrize("name", some([name for name in ADAPTERS if name not in SAME_BLOCKS], slow=SAMPLE))
def test_its_blocks_compile_full_graph(name):
    check_adapter(ADAPTERS[name], tiny_models.MODELS[name][0], only=["compile"])


def test_caches_measure_what_is_made_beside_an_image_that_is_given():
    check("cosmos-3", tiny_models.MODELS["cosmos-3"][1:], ["caches"])


@pytest.fixture
def only(monkeypatch):
    """Return a function that makes one adapter the only registered one."""

    def only(adapter):
        class Fake:
            name, value, group = "us", "stranger:ADAPTERS", "dit_accel.adapters"

            def load(self):
                return (adapter,)

        monkeypatch.setattr(installed, "entry_points", lambda group: [Fake()])
        installed.adapters.cache_clear()
        return adapter

    yield only
    monkeypatch.undo()
    installed.adapters.cache_clear()


def transposed(config, inputs):
    frames, height, width = inputs["hidden_states"].shape[-3:]
    return frames, width // 2, height // 2, 0, 0


def framed_last(config, inputs):
    frames, height, width = inputs["hidden_states"].shape[-3:]
    return height // 2, width // 2, frames, 0, 0


def with_text(before, after):
    def grid(config, inputs):
        frames, height, width = inputs["hidden_states"].shape[-3:]
        return frames - 1, height // 2, width // 2, before, after

    return grid


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(self_attention=("blocks.*.attn*",)), r"'places' failed: left_alone names modules"),
        (dict(self_attention=("blocks.0.attn1",)), r"'places' failed: neither.*left_alone"),
        (dict(self_attention=("blocks.*.attn1", "blocks.1.attn1")), r"'places' failed: patterns overlap"),
        (dict(latents="x"), r"'places' failed: forward .*input 'x'; .*hidden_states, timestep,"),
        (dict(timestep="t"), r"'places' failed: forward .*input 't'; .*hidden_states, timestep,"),
        (
            dict(grid=lambda config, inputs: (7, 4, 8)),
            r"'neutral' failed: .*grid.*'wan' gave \(7, 4, 8\);",
        ),
        (dict(grid=lambda config, inputs: inputs["x"]), r"'neutral' failed: .*grid .*input 'x', but"),
        (dict(grid=transposed), r"'layout' failed: along axis 3 .*latents"),
        (dict(grid=framed_last), r"'layout' failed: along axis"),
        (dict(grid=with_text(32, 0)), r"'layout' failed: .*visual token.*0, .*32"),
        (dict(grid=with_text(0, 32)), r"'layout' failed: .*token 192, .*counts 192"),
        (dict(grid=with_text(0, 0)), r"'full' failed: .*layer 0.*224 tokens"),
        (dict(refused=dict.fromkeys(METHOD_CASES, "no reason")), None),
    ],
)
def test_a_wrong_adapter_fails_by_name(only, change, message):
    adapter = only(dataclasses.replace(WAN, transformers=("WanTransformer3DModel",), side_attention=(), **change))
    if message is None:
        found = check_adapter(adapter, tiny_models.WAN[0], only=FAST)["WanTransformer3DModel 0"]
        assert found["active"] == "every method with a case is refused"
        assert found["refused"] == "passed"
        return
    with pytest.raises(AssertionError, match=rf"WanTransformer3DModel 0: check {message}"):
        check_adapter(adapter, tiny_models.WAN[0], only=FAST)


def test_a_refused_method_that_is_none_is_named(only):
    adapter = only(dataclasses.replace(WAN, refused={"none": "no reason"}))
    with pytest.raises(AssertionError, match=r"'refused' failed: .*'none'"):
        check_adapter(adapter, *tiny_models.MODELS["wan"], only=["refused"])


def test_methods_that_depend_on_the_order_of_the_arguments_are_found(monkeypatch):
    route = SolHandler.plan
    monkeypatch.setattr("dit_accel.methods.compose.sorted", lambda given, key=None: list(given), raising=False)
    monkeypatch.setattr(
        SolHandler,
        "plan",
        lambda self, plan, call, context: route(self, plan, call, context) if plan.tiles is not None else plan,
    )
    text = r"'pairs' failed: .*SolAttention.*other order"
    with pytest.raises(AssertionError, match=text):
        check_adapter(WAN, tiny_models.WAN[0], only=["pairs"])


def shared_history(self, shapes, beside=False, kept=[]):  # noqa: B006 - one for all branches is what is wrong
    kept[:] = kept or [History(self.settings, shapes, self._start)]
    return kept[0]


@pytest.mark.parametrize(
    ("owner", "method", "wrong", "message"),
    [
        (StaticCache, "always_computed", lambda *_: None, "staticcache.*step 1,"),
        (StepCacheHandler, "_stored", lambda *_: False, "staticcache .*skip step 1"),
        (StepCacheHandler, "_new_history", shared_history, ".*cond branch.*held output"),
    ],
)
def test_a_cache_that_does_not_what_it_says_is_found(monkeypatch, owner, method, wrong, message):
    monkeypatch.setattr(owner, method, wrong)
    monkeypatch.setattr("dit_accel.testing.method_cases.CACHE_CASES", {"staticcache": CACHE_CASES["staticcache"]})
    with pytest.raises(AssertionError, match=f"check 'caches' failed: {message}"):
        check_adapter(WAN, tiny_models.MODELS["wan"][0], only=["caches"])


def test_a_model_too_small_to_be_thinned_out_is_told_so():
    def inputs(batch):
        return {**tiny_models.WAN[0].inputs(batch), "hidden_states": torch.randn(batch, 12, 2, 4, 8)}

    model = dataclasses.replace(tiny_models.WAN[0], inputs=inputs)
    with pytest.raises(AssertionError, match=r"'active' failed: .*every tile"):
        check_adapter(WAN, model, only=["active"])


def test_what_is_missing_is_named(only):
    text = r"adapter 'wan'.*ChronoEdit.*, WanTransf.*, WanVACE.*of WanTransformer3DModel;"
    with pytest.raises(AssertionError, match=text):
        check_adapter(WAN, tiny_models.WAN[0])
    typo = dataclasses.replace(WAN, transformers=("WanTransformer4D",))
    text = "names WanTransformer4D, .*of WanTransformer3DModel; "
    for checks in (None, ["places"]):
        with pytest.raises(AssertionError, match=text):
            check_adapter(typo, tiny_models.WAN[0], only=checks)
    install = "; .*package.*entry point"
    only(dataclasses.replace(WAN))
    with pytest.raises(AssertionError, match=rf"WanTransformer3DModel.*adapter object{install}"):
        check_adapter(WAN, *tiny_models.WAN)
    only(typo)
    with pytest.raises(AssertionError, match=rf"no adapter.*WanTransformer3DModel{install}"):
        check_adapter(WAN, *tiny_models.WAN)


def test_a_pattern_that_matches_no_module_is_named():
    adapter = dataclasses.replace(WAN, side_attention=("vace.*.attn1",))
    text = r"'wan'.*'places' failed: side_attention 'vace.\*.attn1'"
    with pytest.raises(AssertionError, match=text):
        check_adapter(adapter, *tiny_models.WAN)


def test_a_tiny_model_that_does_not_run_is_told_so():
    inputs = {name: value for name, value in tiny_models.WAN[0].inputs(1).items() if name != "timestep"}
    model = dataclasses.replace(tiny_models.WAN[0], inputs=lambda batch: inputs)
    text = r"Model 0: .*forward fails.*TypeError: .*'timestep'"
    with pytest.raises(AssertionError, match=text):
        check_adapter(WAN, model, only=["neutral"])
