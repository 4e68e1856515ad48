"""Released models: their sizes, and what of every method and pair is planned, refused with a reason or recommended."""

import inspect
import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import diffusers
import dit_accel_assets
import pytest
import torch
from dit_accel_assets import model_path
from dit_accel_pipelines import ADAPTERS
from dit_accel_pipelines.families.image_queries import NUCLEUS_IMAGE
from dit_accel_pipelines.families.wan import WAN
from some_cases import some
from tiny_models import MODELS
from tiny_stock import PIPELINES, stock_pipeline

import dit_accel
from dit_accel import ConfigError, DBCache, SparseD, UnsupportedModel
from dit_accel.adapters import installed
from dit_accel.adapters.cross_attention import CrossAttention
from dit_accel.adapters.joined_text import JoinedText
from dit_accel.adapters.model_files import ModelFiles, read_model_files
from dit_accel.adapters.noise import noise_of
from dit_accel.adapters.rotary import Rope
from dit_accel.cli.method_options import select_methods
from dit_accel.errors import MissingOption
from dit_accel.estimate import tuned
from dit_accel.estimate.prediction import estimate
from dit_accel.estimate.sizes import pixel_multiples, rounded_frames, token_layout
from dit_accel.methods.registry import handlers, methods
from dit_accel.methods.verdicts import refused_by
from dit_accel.testing.tiny_models import Case

FAMILIES = {family.name: (adapter, family) for adapter in ADAPTERS for family in adapter.families}
RECIPES = sorted((Path(__file__).parents[2] / "pipelines/recipes").glob("*.toml"))

# Sizes

FROM_DEFAULTS = {
    "wan2.1-14b": "Wan", "wan2.1-vace-14b": "WanVACE", "wan2.2-animate-14b": "WanAnimate", "anyflow-14b": "AnyFlow",
    "helios-14b": "Helios", "hunyuan-video": "HunyuanVideo", "hunyuan-video-1.5-480p": "HunyuanVideo15",
    "framepack": "HunyuanVideoFramepack", "ltx-video-2b": "LTXVideo", "ltx-2-19b": "LTX2Video",
    "kandinsky-6-pro": "Kandinsky6", "kandinsky-5-lite": "Kandinsky5", "cosmos-1-7b": "Cosmos", "mochi-1": "Mochi",
    "cogvideox-2b": "CogVideoX", "easyanimate-5.1-12b": "EasyAnimate", "flux.1-dev": "Flux", "flux.2-dev": "Flux2",
    "qwen-image": "QwenImage", "z-image-turbo": "ZImage", "chroma1-hd": "Chroma", "hunyuan-image-2.1": "HunyuanImage",
    "hidream-i1": "HiDreamImage", "cogview3-plus-3b": "CogView3Plus", "cogview4-6b": "CogView4",
    "lumina-image-2.0": "Lumina2", "aura-flow-0.3": "AuraFlow", "pixart-sigma": "PixArt", "sd3.5-large": "SD3",
}  # fmt: skip
"""Released model -> its class, which has the model's sizes as defaults, but for these."""

OTHERWISE = {
    "easyanimate-5.1-12b": dict(patch_size=2), "hidream-i1": dict(patch_size=2),
    "cogview4-6b": dict(num_layers=28, num_attention_heads=32, attention_head_dim=128),
    "sd3.5-large": dict(num_layers=38, num_attention_heads=38), "kandinsky-5-lite": dict(model_dim=1792, ff_dim=7168),
}  # fmt: skip
READ = {  # further names of sizes in a config
    "kandinsky-5-pro": dict(num_visual_blocks=60, model_dim=4096, axes_dims=(32, 48, 48)),
    "kandinsky-6-pro": dict(num_visual_blocks=60, model_dim=4096, axes_dims=(32, 48, 48)),
    "hunyuan-video": dict(num_layers=20, num_single_layers=40, num_attention_heads=24, attention_head_dim=128),
    "mochi-1": dict(num_layers=48, num_attention_heads=24, attention_head_dim=128),
    "wan2.1-vace-1.3b": dict(
        num_layers=30, num_attention_heads=12, attention_head_dim=128, vace_layers=list(range(0, 30, 2))
    ),
}


def defaults(cls):
    parameters = inspect.signature(getattr(diffusers, cls).__init__).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.name != "self"}


def files_of(cls, config):
    index = {"transformer": ["diffusers", "x"]}
    return ModelFiles(name="some/model", index=index, transformer={**config, "_class_name": cls}, vae={})


def test_sizes_of_released_models_are_those_of_diffusers_defaults():
    for name, kind in FROM_DEFAULTS.items():
        cls = next(cls for n in "23" if hasattr(diffusers, cls := f"{kind}Transformer{n}DModel"))
        adapter, config = installed.adapter_for(cls), defaults(cls) | OTHERWISE.get(name, {})
        sizes, family = adapter.sizes(config), installed.family(name)
        assert adapter.family(config) is family or (adapter.name, name) == ("wan", "wan2.1-14b"), name
        for size in ("layers", "heads", "head_dim", "ffn_dim", "patch"):
            assert getattr(sizes, size) == getattr(family, size), (name, size)
    for name, config in READ.items():
        assert FAMILIES[name][0].family(config).name == name
    assert WAN.family(defaults("WanTransformer3DModel"), experts=2).name == "wan2.2-a14b"
    assert FAMILIES["kandinsky-6-pro"][0].family({}) is None
    assert installed.adapters()["cosmos-3"].family(dict(num_hidden_layers=36, num_attention_heads=32)) is None


@pytest.mark.parametrize("name", dit_accel_assets.model_names())
def test_embedded_models_are_their_families(name):
    _, identified = read_model_files(str(dit_accel_assets.model_path(name))).identify()
    family, own = FAMILIES[name][1], dit_accel_assets.model_defaults(name)
    assert identified == replace(family, repo=identified.repo)
    assert (family.height, family.width) == (own["height"], own["width"])
    assert (family.num_frames, family.num_inference_steps) == (own.get("num_frames", 1), own["num_inference_steps"])


def test_sizes_are_read_over_both_block_lists_and_latents_may_be_packed():
    adapter, family = files_of(
        "HunyuanVideoTransformer3DModel", READ["hunyuan-video"] | dict(patch_size=2, patch_size_t=1)
    ).identify()
    assert (adapter.name, family.layers, family.patch, family.ffn_dim) == ("hunyuan-video", 60, (1, 2, 2), 12288)
    assert adapter.recipe("radial", None)["sink"] is False
    adapter, family = files_of("FluxTransformer2DModel", defaults("FluxTransformer2DModel")).identify()
    assert (family.name, family.patch) == ("flux.1-dev", (1, 2, 2))  # the config's own patch is of packed latents
    assert estimate(adapter, family).layout.visual_tokens == 64 * 64
    config = defaults("NucleusMoEImageTransformer2DModel")
    routed, dense = 9 * 1344, 5376  # eight experts a token and the shared one; blocks without experts
    for strategy, blocks in (("leave_first_three_and_last_block_dense", 4), ("all_moe", 0), ("all_dense", 24)):
        mean = (blocks * dense + (24 - blocks) * routed) / 24
        width = NUCLEUS_IMAGE.sizes({**config, "dense_moe_strategy": strategy}).ffn_dim
        assert width == pytest.approx(1.5 * mean, abs=2)
    assert NUCLEUS_IMAGE.sizes({**config, "moe_enabled": False}).ffn_dim == 1.5 * dense
    assert NUCLEUS_IMAGE.sizes({**config, "capacity_factors": [8.0] * 12 + [2.0] * 12}).ffn_dim < 1.5 * 6 * 1344 * 1.1


def test_a_model_without_sizes_is_refused():
    for name, entry in (("wan", "ffn_dim"), ("wan", "patch_size"), ("wan", "num_layers"), ("sd3", "patch_size")):
        model = MODELS[name][0]
        config = Case(installed.adapters()[name], model).transformer.config
        files = files_of(model.transformer.__name__, {key: value for key, value in config.items() if key != entry})
        with pytest.raises(UnsupportedModel, match=rf"some/model.*'{entry}'.*--family"):
            files.identify()
    with pytest.raises(UnsupportedModel, match=r"some/model.*flux-kin.*sizes.*--fam"):
        files_of("OvisImageTransformer2DModel", {}).identify()


# What is planned

THINNING = {"radial", "sol", "sparsed", "delta"}  # delta beside sparsed
STATIC = {"magcache", "staticcache", "progressive"}
GUIDED = {"softpag": "heads", "pag": "layers", "seg": "layers", "slg": "layers"}
COUNTED = THINNING | STATIC | {"ultravico", "lvsa", "rope", "ultraimage", *GUIDED, "autoguidance"}
COUNTED |= {"profilingcache", "cfgcache"}
"""Methods of which a plan knows what they save: some of them nothing at the trained size."""

CALIBRATED = {"magcache": "ratios", "teacache": "polynomial", "profilingcache": "blocks"}
GIVEN = {
    "ultravico": {"trained_frames": 3}, "lvsa": {"trained_frames": 3},
    "magcache": {"ratios": (1.0, 0.99, 0.98)}, "teacache": {"polynomial": (1.0, 0.0)},
    "profilingcache": {"blocks": (0,)}, "softpag": {"heads": "L1H0"},
    "pag": {"layers": "L1"}, "seg": {"layers": "L1"}, "slg": {"layers": "L1"},
    "rope": {"kind": "ntk", "trained_frames": 3, "trained_height": 3, "trained_width": 3},
    "ultraimage": {"trained_height": 3, "trained_width": 3},
}  # fmt: skip
"""What methods need that no recipe may have."""

SPARSE = {"radial", "sol", "lite", "sparsed", "lvsa"}
BLOCK_CACHES = ("dbcache", "dbprune", "firstblockcache", "profilingcache")
APART = [{"rope", "ultraimage"}, {"lite", "dfa"}, *({"slg", name} for name in BLOCK_CACHES)]
"""Methods that refuse each other, besides those that set the same thing."""

TOGETHER = (
    r"both set.*the|both cache|would mix|both change what.*gave|negative text.*beside|both change.*rotary freq|"
    r"lite takes.*all of|delta corrects.*sparse"
)


def why_not(name, adapter, family, *, given):
    """Return the words with which a method can't be planned on a family, with what it needs given or not, or None."""
    text, recipes = adapter.cross_attention or adapter.joined_text, {**adapter.recipes, **family.recipes}
    if name in adapter.refused:
        return re.escape(adapter.refused[name])
    untold = {"dfa", "seacache"} if adapter.noise == ("none",) else {"dfa"}
    if adapter.noise and "flow" not in adapter.noise and name in untold:
        return rf"^{name}.*noise level.*scheduler that {adapter.name} is"
    if name == "teacache" and adapter.signal is None:
        return rf"^teacache.*input of.*adapter of {adapter.name} does"
    if name == "referencecache" and not isinstance(adapter.references, tuple):
        return rf"referencecache keeps.*{adapter.name} has none"
    if name == "progressive" and not adapter.flow:
        return rf"progressive can't.*{adapter.name}.*Adapter.flow"
    if name == "nag" and not isinstance(text, CrossAttention | JoinedText):
        return r"nag.*negative text.*can't: "
    if name in ("rope", "ultraimage") and (why := why_not_on_positions(name, adapter.rope, family, given)):
        return why
    if given:
        return None
    if name in ("ultravico", "lvsa") and family.trained_frames is None:
        return rf"{name} needs.*the length.*{family.name} does not"
    if name in CALIBRATED and name not in family.recipes:
        return rf"{name} has no.*{CALIBRATED[name]}.*'{family.name}'"
    if name in GUIDED and name not in recipes:
        return rf"{name}.{GUIDED[name]}.*not set.*published for"
    return None


def why_not_on_positions(name, rope, family, given):
    size = "" if given else f"|{name} needs.*the size"
    absent = not isinstance(rope, Rope) or (family.config and rope.absent and rope.absent(family.config))
    if absent or (
        family.config and {"height", "width"} <= set(rope.fitted) and (name == "ultraimage" or family.num_frames == 1)
    ):
        return f"has none.*to change|no rotary.*positions|scales.*positions along.*height{size}"
    kind = name if name == "ultraimage" else "ntk" if given else "riflex"
    if rope.kinds is not None and kind not in rope.kinds:
        return rf"kind '{kind}'.*sense on{size}"
    known = given or (family.trained if name == "rope" else family.trained_size)
    return None if known else f"{name} needs.*the size"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_method_is_planned_at_a_familys_size_or_refused_with_the_reason(name):
    adapter, family = FAMILIES[name]
    assert rounded_frames(family, family.num_frames) == family.num_frames
    layout = token_layout(family, height=family.height, width=family.width, num_frames=family.num_frames)
    assert layout.frames == 1 or family.vae[0] > 1
    assert bool(family.text_tokens) != bool(family.cross_tokens)
    for method, config_type in methods().items():
        beside = [SparseD()] if method == "delta" else []
        if why := why_not(method, adapter, family, given=False):
            with pytest.raises(ConfigError, match=why):
                estimate(adapter, family, methods=[config_type()])
            continue
        plan = estimate(adapter, family, methods=[config_type(), *beside])
        saving = plan.savings[method]
        assert 0 < plan.pair_density <= 1
        assert (plan.pair_density < 1) == (method in THINNING), method
        assert saving.counted == (method in COUNTED | {"nag"}), method
        halved = method == "cfgcache" and family.forwards_per_step > 1
        assert (saving.forwards > 0) == (method in STATIC or halved)
        assert (saving.exact_rows > 0) == (method == "delta")


QUICK = ("wan2.2-a14b", "cogvideox-5b", "flux.1-dev")


@pytest.mark.parametrize("name", some(FAMILIES, *QUICK, slow=[*FAMILIES][::5]))
def test_every_pair_of_methods_is_estimated_in_either_order_or_refused(name):
    adapter, family = FAMILIES[name]
    height, width = (6 * multiple for multiple in pixel_multiples(family))
    frames = 1 if family.num_frames == 1 else 4 * family.vae[0] * family.patch[0] + 1
    configs = {name: config(**GIVEN.get(name, {})) for name, config in methods().items()}
    why = {name: why_not(name, adapter, family, given=True) for name in configs}
    exclusive = {name: handlers()[name].exclusive for name in configs}
    for names in itertools.combinations(configs, 2):
        chosen, size = [configs[one] for one in names], dict(height=height, width=width, num_frames=frames)
        reasons = [why[one] for one in names if why[one]]
        alike = exclusive[names[0]] & exclusive[names[1]] or {*names} in APART
        if reasons or alike or ("delta" in names and not SPARSE & {*names}):
            with pytest.raises(ConfigError, match="|".join([*reasons, TOGETHER])):
                estimate(adapter, family, methods=chosen, **size)
            continue
        plan = estimate(adapter, family, methods=chosen, **size)
        values = plan.to_dict()
        json.dumps(values, allow_nan=False)
        assert 0 < plan.pair_density <= 1 + plan.layout.tokens, names
        assert 0 <= plan.dense_share <= 1
        assert math.isfinite(plan.speedup)
        assert list(values["methods"]) == list(plan.savings)
        assert estimate(adapter, family, methods=chosen[::-1], **size).to_dict() == values


def test_names_are_unique_and_recipes_can_be_planned():
    assert len(RECIPES) >= 3
    for path in RECIPES:
        family = "hunyuan-video" if path.stem.startswith("hunyuan") else "wan2.1-14b"
        plan = estimate(*FAMILIES[family], methods=select_methods([], path, []), num_frames=161)  # some for longer
        assert plan.speedup > 1, path.stem
    assert len(FAMILIES) == sum(len(adapter.families) for adapter in ADAPTERS)
    assert len({family.repo for _, family in FAMILIES.values()}) == len(FAMILIES)


# What is described and recommended

FEW = ("WanPipeline", "CogVideoXPipeline", "FluxPipeline", "PixArtSigmaPipeline", "HunyuanDiTPipeline")


def wrong_of(name):
    """Say where a description of a pipeline, or the table of models, says of a method what `attach` does not."""
    pipe, _ = stock_pipeline(name)
    pipe = getattr(pipe, "pipe", pipe)
    (*_, described) = dit_accel.describe(pipe).transformers
    assert set(described.methods) | set(described.needs) | set(described.refused) == set(methods())
    wrong = []
    for method, config_type in methods().items():
        try:  # tiny models have fewer blocks than DBCache usually computes
            dit_accel.attach(pipe, DBCache(first_blocks=1) if method == "dbcache" else config_type()).detach()
            verdict, why = "methods", None
        except MissingOption as error:
            verdict, why = "needs", error.needs
        except ConfigError as error:
            verdict, why = "refused", str(error)
        listed = getattr(described, verdict).get(method)
        if listed is None or (why is not None and listed not in why):
            wrong.append(f"{name}, {method}: attach says {verdict}: {why}, and described is {listed}")
    adapter = installed.adapters()[described.adapter]
    if noise_of(pipe.components.get("scheduler")) in adapter.noise:  # as released
        unknown = set(refused_by(adapter)) - set(described.refused)
        wrong += [f"{name}, {method}: the table of models refuses it" for method in unknown]
    return wrong


@pytest.mark.parametrize("name", FEW)
def test_describe_and_the_table_of_models_say_what_attach_says(name):
    assert not wrong_of(name)


@pytest.mark.slow
def test_every_pipeline_says_what_attach_says():
    names = [name for name in PIPELINES if name not in FEW and "," not in name and "Modular" not in name]
    assert not [text for name in names for text in wrong_of(name)]


def test_a_description_says_what_must_be_given_and_names_the_scheduler():
    pipe, _ = stock_pipeline("CogVideoXPipeline")
    described = dit_accel.describe(pipe)
    text = str(described)
    assert "transformer takes once it is given, " in text
    assert "nag (negative_prompt or negative_embeds)" in text
    assert "pag (layers)" in text
    assert "seacache" in text.split("transformer refuses ")[1]
    assert "refused, seacache needs the noise level, which CogVideoXDDIMScheduler does not tell" in described.options()
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    assert "seacache" in dit_accel.describe(pipe).transformers[0].methods
    assert "seacache" in dit_accel.describe(pipe.transformer).transformers[0].methods  # a loop may state it


def test_a_loaded_pipeline_is_recommended_as_its_family_is_with_what_was_tuned_on_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pipe = diffusers.DiffusionPipeline.from_pretrained(model_path("wan-plain"), dtype=torch.bfloat16)
    recommended, named = dit_accel.recommend(pipe), dit_accel.recommend("wan-plain")
    assert [*recommended.settings] == [*named.settings]
    count = sum(weight.numel() for weight in pipe.transformer.parameters())
    assert 2 * count < recommended.weight_bytes < 2.1 * count  # diffusers keeps a few of Wan's in float32
    assert recommended.weight_bytes > named.weight_bytes
    assert str(recommended) in str(dit_accel.describe(pipe))
    result = tuned.TunedResult(
        model="wan-plain", height=64, width=64, num_frames=17, num_inference_steps=20, metric="psnr", quality=30.5,
        speedup=2.0, prompts=6,
    )  # fmt: skip
    text = tuned.tuned_text([dit_accel.EasyCache(threshold=0.1)], {"num_inference_steps": 16}, result, "cached 16")
    tuned.keep_tuned("mine.toml", text, "wan-plain")
    assert dit_accel.recommend(pipe).settings[0].name == "mine"
