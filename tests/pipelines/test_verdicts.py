"""What lists say of a method (taken, needs an option, refused) is what `attach` says: one rule, scheduler included."""

import diffusers
import pytest
from tiny_stock import PIPELINES, stock_pipeline

import dit_accel
from dit_accel import ConfigError, DBCache
from dit_accel.adapters.installed import adapters
from dit_accel.adapters.noise import noise_of
from dit_accel.errors import MissingOption
from dit_accel.methods.registry import methods
from dit_accel.methods.verdicts import refused_by

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
