"""Every adapter's sizes against real transformers, and plans of models of no released size."""

import inspect
import re

import diffusers
import pytest
from dit_accel_pipelines import ADAPTERS
from dit_accel_pipelines.families.image_queries import NUCLEUS_IMAGE
from tiny_models import MODELS
from torch import nn

from dit_accel import UnsupportedModel
from dit_accel.adapters import installed
from dit_accel.adapters.block_lists import block_lists, blocks_of
from dit_accel.adapters.model_files import ModelFiles
from dit_accel.estimate.prediction import estimate
from dit_accel.methods import registry as methods
from dit_accel.testing.tiny_models import Case

FEED_FORWARD = re.compile(
    r"(video_dec_block\.|block\.)?(ff|ffn|mlp_moe_gen|mlp|img_mlp|feed_forward|ff_i\.shared_experts|ff_i\.experts\.0)\..+"
    r"|(gate|up|down)_proj"
)
"""Modules that a visual token passes; of the two tiny experts one is activated."""

FROM_DEFAULTS = {  # released models whose class has their sizes as defaults, but for what is given here
    "wan2.1-14b": ("WanTransformer3DModel", {}),
    "wan2.1-vace-14b": ("WanVACETransformer3DModel", {}),
    "wan2.2-animate-14b": ("WanAnimateTransformer3DModel", {}),
    "anyflow-14b": ("AnyFlowTransformer3DModel", {}),
    "helios-14b": ("HeliosTransformer3DModel", {}),
    "hunyuan-video": ("HunyuanVideoTransformer3DModel", {}),
    "hunyuan-video-1.5-480p": ("HunyuanVideo15Transformer3DModel", {}),
    "framepack": ("HunyuanVideoFramepackTransformer3DModel", {}),
    "ltx-video-2b": ("LTXVideoTransformer3DModel", {}),
    "ltx-2-19b": ("LTX2VideoTransformer3DModel", {}),
    "kandinsky-6-pro": ("Kandinsky6Transformer3DModel", {}),
    "cosmos-1-7b": ("CosmosTransformer3DModel", {}),
    "mochi-1": ("MochiTransformer3DModel", {}),
    "cogvideox-2b": ("CogVideoXTransformer3DModel", {}),
    "easyanimate-5.1-12b": ("EasyAnimateTransformer3DModel", dict(patch_size=2)),
    "flux.1-dev": ("FluxTransformer2DModel", {}),
    "flux.2-dev": ("Flux2Transformer2DModel", {}),
    "qwen-image": ("QwenImageTransformer2DModel", {}),
    "z-image-turbo": ("ZImageTransformer2DModel", {}),
    "chroma1-hd": ("ChromaTransformer2DModel", {}),
    "hunyuan-image-2.1": ("HunyuanImageTransformer2DModel", {}),
    "hidream-i1": ("HiDreamImageTransformer2DModel", dict(patch_size=2)),
    "cogview3-plus-3b": ("CogView3PlusTransformer2DModel", {}),
    "cogview4-6b": ("CogView4Transformer2DModel", dict(num_layers=28, num_attention_heads=32, attention_head_dim=128)),
    "lumina-image-2.0": ("Lumina2Transformer2DModel", {}),
    "aura-flow-0.3": ("AuraFlowTransformer2DModel", {}),
    "pixart-sigma": ("PixArtTransformer2DModel", {}),
    "sd3.5-large": ("SD3Transformer2DModel", dict(num_layers=38, num_attention_heads=38)),
    "kandinsky-5-lite": ("Kandinsky5Transformer3DModel", dict(model_dim=1792, ff_dim=7168)),
}


def defaults(cls):
    parameters = inspect.signature(getattr(diffusers, cls).__init__).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.name != "self"}


def test_sizes_of_released_models_are_those_of_diffusers_defaults():
    for name, (cls, changes) in FROM_DEFAULTS.items():
        adapter, config = installed.adapter_for(cls), defaults(cls) | changes
        found, family = adapter.sizes(config), installed.family(name)
        assert adapter.family(config) is family or (adapter.name, name) == ("wan", "wan2.1-14b"), name
        told = (family.layers, family.heads, family.head_dim, family.ffn_dim, family.patch)
        assert (found.layers, found.heads, found.head_dim, found.ffn_dim, found.patch) == told, name


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_those_of_the_model(name):
    adapter = installed.adapters()[name]
    for model in MODELS[name]:
        transformer = Case(adapter, model).transformer
        sizes, listed = adapter.sizes(transformer.config), block_lists(adapter, transformer)
        blocks = [module for blocks in listed for _, module in blocks_of(blocks, adapter, transformer)]
        assert sizes.layers == len(blocks) + (transformer.config.get("num_decoder_layers") or 0)
        widths = {part.out_features for part in blocks[0].modules() if isinstance(part, nn.Linear)}
        assert widths & {sizes.heads * sizes.head_dim, 3 * sizes.heads * sizes.head_dim}
        linears = {at: part for at, part in blocks[0].named_modules() if isinstance(part, nn.Linear)}
        text = "mlp." if any(at.startswith("mlp_moe_gen.") for at in linears) else "-"  # Cosmos 3 has one for text too
        passed = [at for at in linears if FEED_FORWARD.fullmatch(at) and not at.startswith(text)]
        weights = [linears[at].weight.numel() for at in passed]
        assert len(weights) >= 2
        assert sizes.ffn_dim == sum(weights) // (2 * sizes.heads * sizes.head_dim)


def test_experts_count_as_often_as_a_token_passes_one():
    config = defaults("NucleusMoEImageTransformer2DModel")
    routed, dense = 9 * 1344, 5376  # eight experts a token and the shared one; blocks without experts
    for strategy, blocks in (("leave_first_three_and_last_block_dense", 4), ("all_moe", 0), ("all_dense", 24)):
        mean = (blocks * dense + (24 - blocks) * routed) / 24
        found = NUCLEUS_IMAGE.sizes({**config, "dense_moe_strategy": strategy}).ffn_dim
        assert found == pytest.approx(1.5 * mean, abs=2)
    assert NUCLEUS_IMAGE.sizes({**config, "moe_enabled": False}).ffn_dim == 1.5 * dense
    assert NUCLEUS_IMAGE.sizes({**config, "capacity_factors": [8.0] * 12 + [2.0] * 12}).ffn_dim < 1.5 * 6 * 1344 * 1.1


def files_of(adapter, model, **changes):
    config = {**Case(adapter, model).transformer.config, "_class_name": model.transformer.__name__, **changes}
    return ModelFiles(name="some/model", index={"transformer": ["diffusers", "x"]}, transformer=config, vae={})


@pytest.mark.parametrize("name", [adapter.name for adapter in ADAPTERS if adapter.families])
def test_a_model_of_no_released_size_can_be_planned(name):
    adapter = installed.adapters()[name]
    for model in MODELS[name]:
        found, family = files_of(adapter, model).identify()
        assert found is adapter
        assert (family.name, family.repo) == (adapter.name, "some/model")
        sol = [methods.method("sol")()] if "sol" not in adapter.refused else []
        assert estimate(adapter, family, methods=sol).speedup > 0


def test_packed_latents_are_counted_in_tokens():
    config = {**defaults("FluxTransformer2DModel"), "_class_name": "FluxTransformer2DModel"}
    index = {"transformer": ["diffusers", "x"]}
    adapter, family = ModelFiles(name="my/flux", index=index, transformer=config, vae={}).identify()
    assert (family.name, family.patch) == ("flux.1-dev", (1, 2, 2))  # the config's own patch is of packed latents
    assert estimate(adapter, family).layout.visual_tokens == 64 * 64


@pytest.mark.parametrize(
    ("name", "entry"), [("wan", "ffn_dim"), ("wan", "patch_size"), ("wan", "num_layers"), ("sd3", "patch_size")]
)
def test_a_config_that_lacks_a_size_is_refused(name, entry):
    files = files_of(installed.adapters()[name], MODELS[name][0], **{entry: None})
    config = {key: value for key, value in files.transformer.items() if value is not None}
    lacking = ModelFiles(name=files.name, index=files.index, transformer=config, vae={})
    with pytest.raises(UnsupportedModel, match=rf"some/model.*'{entry}'.*--family"):
        lacking.identify()
