"""Embedded models as pipelines whose call needs no more than a prompt."""

import copy
import inspect
import json
import pickle

import diffusers
import pytest
import torch
from dit_accel_assets import catalog, held_out_prompts, load, loading, model_defaults, model_names, model_path

import dit_accel


@pytest.fixture(scope="module", params=model_names())
def named(request):
    pipe = load(request.param)
    pipe.set_progress_bar_config(disable=True)
    return request.param, pipe


def made(pipe, prompt, **call):
    return pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="np", **call)[0]


def stock(name):
    pipe = diffusers.DiffusionPipeline.from_pretrained(model_path(name), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_prompt_alone_is_sampled_as_the_model_is_meant_to_be(named):
    name, pipe = named
    (prompt,) = held_out_prompts(name, 1)
    own = {**model_defaults(name), "num_inference_steps": 2}
    found = made(pipe, prompt, num_inference_steps=2)
    assert found.tobytes() == made(stock(name), prompt, **own).tobytes()
    assert found.shape[-3:-1] == (own["height"], own["width"])


def test_the_signature_tells_the_model_s_own_values(named):
    name, pipe = named
    own, usual = model_defaults(name), inspect.signature(getattr(diffusers, catalog.KNOWN[name].pipeline).__call__)
    for call in (inspect.signature(pipe), inspect.signature(type(pipe).__call__)):
        told = {key: place.default for key, place in call.parameters.items()}
        assert {key: told[key] for key in own} == own
    assert told == {key: place.default for key, place in usual.parameters.items()} | own
    assert pipe.__call__.__doc__ == getattr(diffusers, catalog.KNOWN[name].pipeline).__call__.__doc__


def test_a_call_s_arguments_come_before_the_model_s_own(named, monkeypatch):
    name, pipe = named
    kind, calls = type(pipe).__mro__[1], []
    places = list(inspect.signature(kind.__call__).parameters)[1:3]
    monkeypatch.setattr(kind, "__call__", lambda **call: calls.append(call))
    pipe("a red circle", "a blue circle", num_inference_steps=3)
    pipe(prompt_embeds="given", negative_prompt_embeds="given")
    own = {**model_defaults(name), "num_inference_steps": 3}
    assert calls[0] == own | {"self": pipe, places[0]: "a red circle", places[1]: "a blue circle"}
    assert calls[1]["num_inference_steps"] == model_defaults(name)["num_inference_steps"]
    assert not {"prompt", "negative_prompt"} & set(calls[1])  # which the stock call refuses beside embeddings


def test_it_is_a_stock_pipeline_to_all_that_ask(named, tmp_path):
    name, pipe = named
    kind = getattr(diffusers, catalog.KNOWN[name].pipeline)
    assert isinstance(pipe, kind)
    assert (type(pipe).__name__, type(pipe)) == (kind.__name__, type(load(name)))
    assert {part.dtype for part in pipe.components.values() if hasattr(part, "dtype")} == {torch.float32}
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert type(twin) is type(pipe)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == kind.__name__
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path)) is kind
    with dit_accel.attach(pipe, dit_accel.EasyCache()) as attachment:
        made(pipe, held_out_prompts(name, 1), num_inference_steps=2)
        assert attachment.report()


def test_words_that_the_model_never_saw_are_refused_before_anything_runs(named):
    _, pipe = named
    for prompts in ("a red zebra", ["a red circle", "a red zebra"]):
        with pytest.raises(ValueError, match=r"zebra.*circle"):
            pipe(prompts)
    with pytest.raises(ValueError, match="zebra"):
        pipe("a red circle", negative_prompt="a zebra")


def test_options_go_to_diffusers_and_unknown_names_are_refused():
    pipe = load("flux-tiny", dtype=torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"'wan-huge'.*wan-tiny"):
        load("wan-huge")
    with pytest.raises(AttributeError, match="wan-huge"):
        getattr(loading, "wan-huge")
