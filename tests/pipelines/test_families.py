"""The families' sizes against real transformers, their recipes against the methods, and what is recommended."""

from dataclasses import replace
from pathlib import Path

import diffusers
import dit_accel_assets
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from dit_accel_assets import model_path
from dit_accel_pipelines import ADAPTERS
from dit_accel_pipelines.families.wan import WAN

import dit_accel
from dit_accel import ConfigError, DeltaAttention, SparseD
from dit_accel.adapters.cross_attention import CrossAttention
from dit_accel.adapters.joined_text import JoinedText
from dit_accel.adapters.model_files import read_model_files
from dit_accel.adapters.rotary import Rope
from dit_accel.cli.method_options import select_methods
from dit_accel.estimate import tuned
from dit_accel.estimate.prediction import estimate
from dit_accel.estimate.sizes import rounded_frames, token_layout
from dit_accel.methods.registry import methods

THINNING = {"radial", "sol", "sparsed", "delta"}  # delta beside sparsed
LONGER = {"ultravico", "lvsa", "rope", "ultraimage"}
STATIC = {"magcache", "staticcache"}
CALIBRATED = {"magcache", "teacache", "profilingcache"}
GUIDED = {"softpag": "heads", "pag": "layers", "seg": "layers", "slg": "layers"}
RECIPES = sorted((Path(__file__).parents[2] / "pipelines/recipes").glob("*.toml"))
FAMILIES = {family.name: (adapter, family) for adapter in ADAPTERS for family in adapter.families}

# Parameters that the model cards name, in billions.
SIZES = {"wan2.1-1.3b": 1.42, "wan2.1-14b": 14.3, "wan2.2-ti2v-5b": 5.0}


def transformer_of(name: str) -> diffusers.WanTransformer3DModel:
    family = FAMILIES[name][1]
    channels = 48 if family.vae[1] == 16 else 16
    with init_empty_weights():
        return diffusers.WanTransformer3DModel(
            patch_size=family.patch, num_attention_heads=family.heads, attention_head_dim=family.head_dim,
            num_layers=family.layers, ffn_dim=family.ffn_dim, in_channels=channels, out_channels=channels,
        )  # fmt: skip


@pytest.mark.parametrize(("name", "billions"), SIZES.items())
def test_sizes_make_models_of_the_released_size(name, billions):
    count = sum(parameter.numel() for parameter in transformer_of(name).parameters())
    assert count / 1e9 == pytest.approx(billions, rel=0.01)


def test_released_configs_are_recognised():
    for name in ("wan2.1-1.3b", "wan2.1-14b", "wan2.2-ti2v-5b", "wan-plain"):
        assert WAN.family(transformer_of(name).config).name == name
    assert WAN.family(transformer_of("wan2.1-14b").config, experts=2).name == "wan2.2-a14b"


@pytest.mark.parametrize("name", dit_accel_assets.model_names())
def test_embedded_models_are_their_families(name):
    files = read_model_files(str(dit_accel_assets.model_path(name)))
    _, found = files.identify()
    family, defaults = FAMILIES[name][1], dit_accel_assets.model_defaults(name)
    assert found == replace(family, repo=found.repo)
    assert (family.height, family.width) == (defaults["height"], defaults["width"])
    assert (family.num_frames, family.num_inference_steps) == (
        defaults.get("num_frames", 1), defaults["num_inference_steps"],
    )  # fmt: skip


POSITIONS = "no rotary.*positions|scales.*positions along.*height"


def refusal(adapter, family, name: str) -> str | None:
    """Why a method on positions can't be planned with its defaults, or None."""
    rope = adapter.rope
    if not isinstance(rope, Rope):
        return f"has none.*to change|{POSITIONS}" + ("" if family.trained_size else f"|{name} needs.*the size")
    if family.config:
        absent = rope.absent is not None and rope.absent(family.config)
        fitted = {"height", "width"} <= set(rope.fitted) and (name == "ultraimage" or family.num_frames == 1)
        if absent or fitted:
            return f"{POSITIONS}|{name} needs.*the size"
    if isinstance(rope, Rope) and rope.kinds is not None:
        return "kind '(riflex|ultraimage)'.*no sense on|needs.*the size"
    known = family.trained if name == "rope" else family.trained_size
    return None if known else f"{name} needs.*the size"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_consistent(name):
    adapter, family = FAMILIES[name]
    assert rounded_frames(family, family.num_frames) == family.num_frames
    layout = token_layout(family, height=family.height, width=family.width, num_frames=family.num_frames)
    assert layout.frames == 1 or family.vae[0] > 1
    assert bool(family.text_tokens) != bool(family.cross_tokens)
    for name, config_type in methods().items():
        if name in adapter.refused:
            continue
        if name in ("ultravico", "lvsa") and family.trained_frames is None:
            with pytest.raises(ConfigError, match=rf"{name} needs.*the length.*{family.name} does not"):
                estimate(adapter, family, methods=[config_type()])
            continue
        if name in ("rope", "ultraimage") and (why := refusal(adapter, family, name)):
            with pytest.raises(ConfigError, match=why):
                estimate(adapter, family, methods=[config_type()])
            continue
        if name in ("dfa", "seacache") and adapter.noise == ("none",):
            with pytest.raises(ConfigError, match=rf"^{name}.*noise level.*scheduler that {adapter.name} is"):
                estimate(adapter, family, methods=[config_type()])
            continue
        if name == "teacache" and adapter.signal is None:
            with pytest.raises(ConfigError, match=rf"^teacache.*input of.*adapter of {adapter.name} does"):
                estimate(adapter, family, methods=[config_type()])
            continue
        if name in CALIBRATED and name not in family.recipes:
            with pytest.raises(
                ConfigError,
                match=rf"{name} has no.*{getattr(config_type, 'numbers', 'blocks')}.*'{family.name}'",
            ):
                estimate(adapter, family, methods=[config_type()])
            continue
        text = adapter.cross_attention or adapter.joined_text
        if name == "nag" and not isinstance(text, CrossAttention | JoinedText):
            with pytest.raises(ConfigError, match=r"nag.*negative text.*can't: "):
                estimate(adapter, family, methods=[config_type()])
            continue
        if name in GUIDED and name not in {**adapter.recipes, **family.recipes}:
            with pytest.raises(ConfigError, match=rf"{name}.{GUIDED[name]}.*not set.*published for"):
                estimate(adapter, family, methods=[config_type()])
            continue
        partner = [SparseD()] if name == "delta" else []
        found = estimate(adapter, family, methods=[config_type(), *partner])
        saving = found.savings[name]
        assert 0 < found.pair_density <= 1
        assert (found.pair_density < 1) == (name in THINNING)
        assert saving.counted == (
            name in THINNING | STATIC | LONGER | {*GUIDED, "autoguidance", "profilingcache", "nag"}
        )  # which save nothing at the trained size, as is known
        assert (saving.forwards > 0) == (name in STATIC)
        assert (saving.exact_rows > 0) == (name == "delta")
    if "delta" not in adapter.refused:
        with pytest.raises(ConfigError, match=r"delta corrects.*sparse.*none is.*RadialAttention\(\)"):
            estimate(adapter, family, methods=[DeltaAttention()])


def test_names_are_unique():
    assert len(FAMILIES) == sum(len(adapter.families) for adapter in ADAPTERS)
    assert len({family.repo for _, family in FAMILIES.values()}) == len(FAMILIES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_can_be_planned(path):
    methods = select_methods([], path, [])
    assert methods
    family = "hunyuan-video" if path.stem.startswith("hunyuan") else "wan2.1-14b"
    found = estimate(*FAMILIES[family], methods=methods, num_frames=161)  # some are for longer clips alone
    assert found.speedup > 1


def test_there_are_recipes():
    assert len(RECIPES) >= 3


def test_a_loaded_pipeline_is_recommended_as_its_family_is_with_what_was_tuned_on_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pipe = DiffusionPipeline.from_pretrained(model_path("wan-plain"), dtype=torch.bfloat16)
    found, named = dit_accel.recommend(pipe), dit_accel.recommend("wan-plain")
    assert [*found.settings] == [*named.settings]
    count = sum(weight.numel() for weight in pipe.transformer.parameters())
    assert 2 * count < found.weight_bytes < 2.1 * count  # diffusers keeps a few of Wan's in float32
    assert found.weight_bytes > named.weight_bytes
    assert str(found) in str(dit_accel.describe(pipe))
    result = tuned.TunedResult(
        model="wan-plain", height=64, width=64, num_frames=17, num_inference_steps=20, metric="psnr", quality=30.5,
        speedup=2.0, prompts=6,
    )  # fmt: skip
    text = tuned.tuned_text([dit_accel.EasyCache(threshold=0.1)], {"num_inference_steps": 16}, result, "cached 16")
    tuned.keep_tuned("mine.toml", text, "wan-plain")
    assert dit_accel.recommend(pipe).settings[0].name == "mine"
