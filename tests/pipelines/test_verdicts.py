"""What lists say of a method (taken, needs an option, refused) is what `attach` says: one rule, scheduler included."""

import diffusers
import pytest
import tiny_other_pipelines
import tiny_pipelines
import tiny_video_pipelines
import tiny_wan_pipelines

import dit_accel
from dit_accel import ConfigError, DBCache
from dit_accel.adapters.installed import adapters
from dit_accel.adapters.noise import noise_of
from dit_accel.errors import MissingOption
from dit_accel.methods.registry import methods
from dit_accel.methods.verdicts import refused_by

PIPELINES = {
    "wan": tiny_wan_pipelines.wan, **tiny_pipelines.PIPELINES, **tiny_video_pipelines.PIPELINES,
    **tiny_other_pipelines.PIPELINES,
}  # fmt: skip
FEW = (
    "wan",
    "mochi",
    "cogvideox",
    "cosmos",
    "allegro",
    "flux",
    "sd3",
    "cogview-3",
    "pixart",
    "hunyuan-dit",
    "lumina-next",
)
FEWER_BLOCKS = {"dbcache": DBCache(first_blocks=1)}
"""Tiny models have fewer blocks than it usually computes."""


def wrong_of(name: str) -> list[str]:
    made, _ = PIPELINES[name]()
    pipe = getattr(made, "pipe", made)
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
    if noise_of(pipe.scheduler) in adapter.noise:  # as released
        unknown = set(refused_by(adapter)) - set(found.refused)
        wrong += [f"{name}, {method}: the table of models refuses it" for method in unknown]
    return wrong


@pytest.mark.parametrize("name", FEW)
def test_describe_and_the_table_of_models_say_what_attach_says(name):
    assert not wrong_of(name)


@pytest.mark.slow
def test_every_pipeline_says_what_attach_says():
    assert not [text for name in PIPELINES if name not in FEW for text in wrong_of(name)]


def test_a_description_says_what_must_be_given_and_names_the_scheduler():
    pipe, _ = tiny_pipelines.cogvideox()
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
