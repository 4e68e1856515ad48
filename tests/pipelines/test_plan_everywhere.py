"""Each method on every family, and any two together: what plan, lists and attach say of them is one rule."""

import itertools
import json
import math
from functools import partial

import diffusers
import pytest
from dit_accel_pipelines import ADAPTERS
from some_cases import some
from tiny_stock import PIPELINES, stock_pipeline

import dit_accel
from dit_accel import ConfigError, DBCache
from dit_accel.adapters.cross_attention import CrossAttention
from dit_accel.adapters.installed import adapters
from dit_accel.adapters.joined_text import JoinedText
from dit_accel.adapters.noise import noise_of
from dit_accel.adapters.rotary import Rope
from dit_accel.errors import MissingOption
from dit_accel.estimate.prediction import estimate
from dit_accel.estimate.sizes import pixel_multiples
from dit_accel.methods.registry import handlers, methods
from dit_accel.methods.verdicts import refused_by

FAMILIES = {family.name: (adapter, family) for adapter in ADAPTERS for family in adapter.families}
QUICK = ("wan2.2-a14b", "hunyuan-video", "cogvideox-5b", "flux.1-dev", "z-image-turbo")
SMALL = {
    "ultravico": {"trained_frames": 3},
    "magcache": {"ratios": (1.0, 0.99, 0.98)},
    "teacache": {"polynomial": (1.0, 0.0)},
    "softpag": {"heads": "L1H0"},
    "pag": {"layers": "L1"},
    "seg": {"layers": "L1"},
    "slg": {"layers": "L1"},
    "profilingcache": {"blocks": (0,)},
    "lvsa": {"trained_frames": 3},
    "rope": {"kind": "ntk", "trained_frames": 3, "trained_height": 3, "trained_width": 3},
    "ultraimage": {"trained_height": 3, "trained_width": 3},
}
REFUSALS = (
    r"makes? no.*sense on|delta corrects.*sparse|both set.*the|both cache|needs.*the input.*of|would mix|"
    r"has none.*to change|both change what.*gave|negative text.*beside.* it can't|both change.*rotary frequencies|"
    r"lite takes.*all of|no rotary.*positions|scales.*positions along.*height|"
    r"needs.*noise level, which the scheduler that"
)
TOLD = CrossAttention | JoinedText
SPARSE = {"radial", "sol", "lite", "sparsed", "lvsa"}
BLOCK_CACHES = ("dbcache", "dbprune", "firstblockcache", "profilingcache")
APART = ({"rope", "ultraimage"}, {"lite", "dfa"}, *({"slg", name} for name in BLOCK_CACHES))
"""Methods that refuse each other, besides those that set the same thing."""


def without_positions(adapter, family) -> set[str]:
    """Return the methods that the rotary positions of a family, or that it has none, exclude."""
    rope = adapter.rope
    if not isinstance(rope, Rope) or (family.config and rope.absent and rope.absent(family.config)):
        return {"rope", "ultraimage"}
    if family.config and {"height", "width"} <= set(rope.fitted):
        return {"rope", "ultraimage"} if family.num_frames == 1 else {"ultraimage"}
    kinds = rope.kinds or ("ntk", "ultraimage")
    return {name for name, kind in (("rope", "ntk"), ("ultraimage", "ultraimage")) if kind not in kinds}


def without_noise(adapter) -> set[str]:
    """Return the methods that the noise level excludes which the scheduler of a family's pipeline tells."""
    if not adapter.noise:
        return set()
    return ({"dfa"} if "flow" not in adapter.noise else set()) | ({"seacache"} if adapter.noise == ("none",) else set())


@pytest.mark.parametrize("name", some(FAMILIES, *QUICK, slow=[*FAMILIES][::5]))
def test_every_method_and_pair_is_estimated_or_refused_in_words(name):
    adapter, family = FAMILIES[name]
    height, width = (6 * multiple for multiple in pixel_multiples(family))
    frames = 1 if family.num_frames == 1 else 4 * family.vae[0] * family.patch[0] + 1
    configs = {name: config(**SMALL.get(name, {})) for name, config in methods().items()}
    estimated = 0
    for names in [*((name,) for name in configs), *itertools.combinations(configs, 2)]:
        chosen = [configs[name] for name in names]
        plan = partial(estimate, adapter, family, height=height, width=width, num_frames=frames)
        exclusive = [handlers()[name].exclusive for name in names]
        alike = len(exclusive) == 2 and exclusive[0] & exclusive[1]
        unsaid = "teacache" in names and adapter.signal is None
        untold = "nag" in names and not isinstance(adapter.cross_attention or adapter.joined_text, TOLD)
        if (
            any(name in adapter.refused for name in names)
            or alike
            or unsaid
            or untold
            or any(pair <= set(names) for pair in APART)
            or without_positions(adapter, family) & set(names)
            or without_noise(adapter) & set(names)
            or ("delta" in names and not SPARSE & set(names))
        ):
            with pytest.raises(ConfigError, match=REFUSALS):
                plan(methods=chosen)
            continue
        found = plan(methods=chosen)
        estimated += 1
        values = found.to_dict()
        json.dumps(values, allow_nan=False)
        assert 0 < found.pair_density <= 1 + found.layout.tokens, names
        assert 0 <= found.dense_share <= 1
        assert math.isfinite(found.speedup)
        assert list(values["methods"]) == list(found.savings)
        assert plan(methods=chosen[::-1]).to_dict() == values
    assert estimated >= 9


FEW = (
    "WanPipeline", "MochiPipeline", "CogVideoXPipeline", "CosmosTextToWorldPipeline", "AllegroPipeline",
    "FluxPipeline", "StableDiffusion3Pipeline", "CogView3PlusPipeline", "PixArtSigmaPipeline", "HunyuanDiTPipeline",
    "LuminaPipeline",
)  # fmt: skip
FEWER_BLOCKS = {"dbcache": DBCache(first_blocks=1)}
"""Tiny models have fewer blocks than it usually computes."""


def wrong_of(name: str) -> list[str]:
    pipe, _ = stock_pipeline(name)
    pipe = getattr(pipe, "pipe", pipe)
    (*_, found) = dit_accel.describe(pipe).transformers
    assert set(found.methods) | set(found.needs) | set(found.refused) == set(methods())
    wrong = []
    for method, config_type in methods().items():
        listed = next(word for word in ("methods", "needs", "refused") if method in getattr(found, word))
        try:
            dit_accel.attach(pipe, FEWER_BLOCKS.get(method) or config_type()).detach()
            said, why = "methods", None
        except MissingOption as error:
            said, why = "needs", error.needs
        except ConfigError as error:
            said, why = "refused", str(error)
        if listed != said:
            wrong.append(f"{name}, {method}: listed as {listed}, and attach says {said}: {why}")
        elif why is not None and getattr(found, said)[method] not in why:
            wrong.append(f"{name}, {method}: {getattr(found, said)[method]} is listed, and attach says {why}")
    adapter = adapters()[found.adapter]
    if noise_of(pipe.components.get("scheduler")) in adapter.noise:  # as released
        unknown = set(refused_by(adapter)) - set(found.refused)
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
    found = dit_accel.describe(pipe)
    text = str(found)
    assert "transformer takes once it is given, " in text
    assert "nag (negative_prompt or negative_embeds)" in text
    assert "pag (layers)" in text
    assert "seacache" in text.split("transformer refuses ")[1]
    assert "refused, seacache needs the noise level, which CogVideoXDDIMScheduler does not tell" in found.options()
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    assert "seacache" in dit_accel.describe(pipe).transformers[0].methods
    assert "seacache" in dit_accel.describe(pipe.transformer).transformers[0].methods  # a loop may state it
