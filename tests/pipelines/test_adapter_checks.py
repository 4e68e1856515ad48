"""Every adapter under the checks that its users get, and the checks against adapters that are wrong."""

import dataclasses
import re
from dataclasses import replace

import diffusers
import pytest
import tiny_models
import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from dit_accel_pipelines import ADAPTERS as PACKAGED
from dit_accel_pipelines.families.all_families import IMAGES
from dit_accel_pipelines.families.wan import WAN
from some_cases import some

from dit_accel.adapters import installed
from dit_accel.adapters.block_lists import block_lists, blocks_of, registered_blocks
from dit_accel.adapters.model_files import ModelFiles
from dit_accel.estimate.prediction import estimate
from dit_accel.methods import registry
from dit_accel.methods.attention.sol import SolHandler
from dit_accel.methods.caches.engine import StepCacheHandler
from dit_accel.methods.caches.history import History
from dit_accel.methods.caches.static import StaticCache
from dit_accel.methods.site import target_sample
from dit_accel.rules.foreground import predicted
from dit_accel.testing import CHECKS, METHOD_CASES, check_adapter
from dit_accel.testing.adapter_checks import TinyModel
from dit_accel.testing.method_cases import CACHE_CASES
from dit_accel.testing.tiny_models import Case

DEPTHS = {"num_layers", "num_single_layers", "num_visual_blocks", "num_hidden_layers", "n_layers", "depth"}
ONE_A_BLOCK = {  # settings of models that have more for each block: its text, what is beside it
    "vace_layers", "dual_attention_layers", "llama_layers", "injection_layer_ids", "num_decoder_layers",
    "inject_face_latents_blocks", "text_encoder_dim",
}  # fmt: skip


def shallow(model: TinyModel) -> TinyModel:
    """The model with two blocks, or one of each of two kinds; as it is where more than a number counts them."""
    counted = DEPTHS & set(model.config)
    if not counted or ONE_A_BLOCK & set(model.config):
        return model
    blocks = 2 if len(counted) == 1 else 1
    return replace(model, config={**model.config, **{name: min(blocks, model.config[name]) for name in counted}})


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

WRONGLY_REGISTERED = {"BriaTransformerBlock", "ZImageTransformerBlock"}
FEED_FORWARD = re.compile(
    r"(video_dec_block\.|block\.)?(ff|ffn|mlp_moe_gen|mlp|img_mlp|feed_forward|ff_i\.shared_experts|ff_i\.experts\.0)\..+"
    r"|(gate|up|down)_proj"
)
"""Modules that a visual token passes; of the two tiny experts one is activated."""


def check(name, models, only):
    """Check some models of an adapter, and that what passes is what applies."""
    adapter, image = ADAPTERS[name], ADAPTERS[name] in IMAGES
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


def test_tiny_models_are_of_the_classes_that_adapters_name():
    for name, models in tiny_models.MODELS.items():
        classes = {getattr(diffusers, cls) for cls in ADAPTERS[name].transformers}
        assert {model.transformer for model in models} == classes


@pytest.mark.parametrize("name", ADAPTERS)
def test_sizes_are_those_of_the_model_and_predictions_lie_on_its_tokens(name):
    for model in tiny_models.MODELS[name]:
        case = Case(ADAPTERS[name], model)
        require_sizes(case)
        require_registered(case)
        if case.adapter.families:
            require_planned(case)
        if "dfa" not in case.adapter.refused:
            require_predictions(case)


def require_sizes(case):
    sizes, listed = case.adapter.sizes(case.transformer.config), block_lists(case.adapter, case.transformer)
    blocks = [module for blocks in listed for _, module in blocks_of(blocks, case.adapter, case.transformer)]
    assert sizes.layers == len(blocks) + (case.transformer.config.get("num_decoder_layers") or 0)
    linears = {at: part for at, part in blocks[0].named_modules() if isinstance(part, torch.nn.Linear)}
    widths, width = {part.out_features for part in linears.values()}, sizes.heads * sizes.head_dim
    assert widths & {width, 3 * width}
    text = "mlp." if any(at.startswith("mlp_moe_gen.") for at in linears) else "-"  # Cosmos 3 has one for text too
    passed = [at for at in linears if FEED_FORWARD.fullmatch(at) and not at.startswith(text)]
    assert len(passed) >= 2
    assert sizes.ffn_dim == sum(linears[at].weight.numel() for at in passed) // (2 * width)


def require_registered(case):
    """Require that diffusers' own registry of blocks, where it knows one, says what the adapter does."""
    for listed in block_lists(case.adapter, case.transformer):
        for cls in {type(module) for _, module in blocks_of(listed, case.adapter, case.transformer)}:
            if cls in TransformerBlockRegistry._registry and cls.__name__ not in WRONGLY_REGISTERED:
                registered = registered_blocks(listed.pattern, cls, case.adapter.name)
                assert (registered.takes, registered.gives) == (listed.takes, listed.gives), cls


def require_planned(case):
    """Require that a model of no released size can be planned."""
    config = {**case.transformer.config, "_class_name": type(case.transformer).__name__}
    files = ModelFiles(name="some/model", index={"transformer": ["diffusers", "x"]}, transformer=config, vae={})
    adapter, family = files.identify()
    assert (adapter, family.name, family.repo) == (case.adapter, case.adapter.name, "some/model")
    methods = [] if "sol" in case.adapter.refused else [registry.method("sol")()]
    assert estimate(adapter, family, methods=methods).speedup > 0


def require_predictions(case):
    """Require it whatever stands among the latents besides the video: reference frames, keyframes, given images."""
    inputs = case.inputs()
    frames, height, width, before, after = case.adapter.grid(case.transformer.config, inputs)
    with torch.no_grad():
        v = target_sample(case.transformer(**inputs, return_dict=False))
    x = target_sample(inputs[case.adapter.latents])
    clean = predicted(x, v, 0.5, (frames, height, width), before, after)
    assert clean.shape[:4] == (len(v), frames, height, width)


@pytest.mark.parametrize("name", some(ADAPTERS, *[*ADAPTERS][::2]))
def test_every_models_blocks_and_positions_are_as_the_adapter_says(name):
    check(name, tiny_models.MODELS[name], ["places", "blocks", "rope"])


@pytest.mark.parametrize("name", some(ADAPTERS, "mochi", "flux"))
def test_every_model_passes_the_checks_of_the_adapter_alone(name):
    check(name, tiny_models.MODELS[name], ALONE)


@pytest.mark.parametrize("name", some(ADAPTERS, "flux", slow=(*SAMPLE, "mochi", "cosmos-3", "ideogram4")))
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


# Adapters and methods that are wrong


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


ONE_CLASS = dataclasses.replace(WAN, transformers=("WanTransformer3DModel",), side_attention=())


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


WRONG = [
    (dict(self_attention=("blocks.*.attn*",)), "places", "left_alone names modules"),
    (dict(self_attention=("blocks.0.attn1",)), "places", "neither.*left_alone"),
    (dict(self_attention=("blocks.*.attn1", "blocks.1.attn1")), "places", "patterns overlap"),
    (dict(latents="x"), "places", "forward .*input 'x'; .*hidden_states, timestep,"),
    (dict(timestep="t"), "places", "forward .*input 't'; .*hidden_states, timestep,"),
    (dict(grid=lambda config, inputs: (7, 4, 8)), "neutral", r".*grid.*'wan' gave \(7, 4, 8\);"),
    (dict(grid=lambda config, inputs: inputs["x"]), "neutral", ".*grid .*input 'x', but"),
    (dict(grid=transposed), "layout", "along axis 3 .*latents"),
    (dict(grid=framed_last), "layout", "along axis"),
    (dict(grid=with_text(32, 0)), "layout", ".*visual token.*0, .*32"),
    (dict(grid=with_text(0, 32)), "layout", ".*token 192, .*counts 192"),
    (dict(grid=with_text(0, 0)), "full", ".*layer 0.*224 tokens"),
    (dict(refused={"none": "no reason"}), "refused", ".*'none'"),
]


@pytest.mark.parametrize(("change", "which", "message"), WRONG)
def test_a_wrong_adapter_fails_by_name(only, change, which, message):
    adapter, checks = only(dataclasses.replace(ONE_CLASS, **change)), FAST[: FAST.index(which) + 1]
    with pytest.raises(AssertionError, match=f"WanTransformer3DModel 0: check '{which}' failed: {message}"):
        check_adapter(adapter, tiny_models.WAN[0], only=["refused"] if which == "refused" else checks)


def test_an_adapter_that_refuses_every_method_passes(only):
    adapter = only(dataclasses.replace(ONE_CLASS, refused=dict.fromkeys(METHOD_CASES, "no reason")))
    results = check_adapter(adapter, tiny_models.WAN[0], only=["active", "refused"])["WanTransformer3DModel 0"]
    assert results == {"active": "every method with a case is refused", "refused": "passed"}


def test_methods_that_depend_on_the_order_of_the_arguments_are_found(monkeypatch):
    route = SolHandler.plan
    monkeypatch.setattr("dit_accel.methods.compose.sorted", lambda given, key=None: list(given), raising=False)
    monkeypatch.setattr(
        SolHandler,
        "plan",
        lambda self, plan, call, context: route(self, plan, call, context) if plan.tiles is not None else plan,
    )
    with pytest.raises(AssertionError, match=r"'pairs' failed: .*SolAttention.*other order"):
        check_adapter(WAN, shallow(tiny_models.WAN[0]), only=["pairs"])


def shared_history(self, shapes, beside=False, kept=[]):  # noqa: B006 - one for all branches is what is wrong
    kept[:] = kept or [History(self.settings, shapes, self._start, None, False)]
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


def test_tiny_models_that_show_nothing_or_do_not_run_are_told_of():
    def small(batch):
        return {**tiny_models.WAN[0].inputs(batch), "hidden_states": torch.randn(batch, 12, 2, 4, 8)}

    def without_timestep(batch):
        return {name: value for name, value in tiny_models.WAN[0].inputs(batch).items() if name != "timestep"}

    for inputs, which, message in (
        (small, "active", "'active' failed: .*every tile"),
        (without_timestep, "neutral", "Model 0: .*forward fails.*TypeError: .*'timestep'"),
    ):
        with pytest.raises(AssertionError, match=message):
            check_adapter(WAN, dataclasses.replace(tiny_models.WAN[0], inputs=inputs), only=[which])


def test_what_is_missing_is_named(only):
    def refused(adapter, models, message, **options):
        with pytest.raises(AssertionError, match=message):
            check_adapter(adapter, *models, **options)

    one, install = tiny_models.WAN[:1], "; .*package.*entry point"
    refused(WAN, one, r"adapter 'wan'.*ChronoEdit.*, WanTransf.*, WanVACE.*of WanTransformer3DModel;")
    pattern = dataclasses.replace(WAN, side_attention=("vace.*.attn1",))
    refused(pattern, tiny_models.WAN, r"'wan'.*'places' failed: side_attention 'vace.\*.attn1'")
    typo = dataclasses.replace(WAN, transformers=("WanTransformer4D",))
    for checks in (None, ["places"]):
        refused(typo, one, "names WanTransformer4D, .*of WanTransformer3DModel; ", only=checks)
    only(dataclasses.replace(WAN))
    refused(WAN, tiny_models.WAN, rf"WanTransformer3DModel.*adapter object{install}")
    only(typo)
    refused(WAN, tiny_models.WAN, rf"no adapter.*WanTransformer3DModel{install}")
