"""The embedded models by name: files, words, prompts and defaults."""

import json
from inspect import signature

import diffusers
import numpy as np
import pytest
from dit_accel_assets import (
    catalog,
    check_prompt,
    clips,
    held_out_prompts,
    model_defaults,
    model_names,
    model_path,
    model_score,
    painter,
    world,
)


def test_the_first_model_is_the_default_and_has_its_files():
    assert model_path() == model_path("wan-tiny")
    assert "wan-tiny" in model_names()


@pytest.mark.parametrize("name", model_names())
def test_each_model_is_what_the_catalog_says(name):
    index = json.loads((model_path(name) / "model_index.json").read_text())
    assert index["_class_name"] == catalog.KNOWN[name].pipeline
    known = json.loads((model_path(name) / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    assert set(known) - {"<pad>", "</s>", "<unk>"} == set(catalog.vocabulary(name))
    kind = getattr(diffusers, index["_class_name"])
    assert (
        {"height", "width", "num_inference_steps"}
        < set(model_defaults(name))
        < set(signature(kind.__call__).parameters)
    )


@pytest.mark.parametrize("name", catalog.KNOWN)
def test_held_out_prompts_are_many_always_the_same_and_in_known_words(name, monkeypatch):
    monkeypatch.setattr(catalog, "model_names", lambda: tuple(catalog.KNOWN))
    texts = held_out_prompts(name, 40)
    assert texts[:7] == held_out_prompts(name, 7)
    assert len(set(texts)) > 30
    for text in texts:
        check_prompt(text, name)


def test_unknown_names_and_counts_are_refused():
    for ask in (model_path, model_defaults, catalog.vocabulary):
        with pytest.raises(ValueError, match="'wan-huge' is no embedded model; choose one of wan-tiny"):
            ask("wan-huge")
    with pytest.raises(ValueError, match="count=-1: ask for 0 or more prompts"):
        held_out_prompts("wan-tiny", -1)


def test_drawn_clips_of_held_out_prompts_score_well_and_others_do_not(monkeypatch):
    monkeypatch.setattr(catalog, "model_names", lambda: tuple(catalog.KNOWN))
    drawn = clips.clip_of(3, held_out=True)[2]
    assert model_score("wan-tiny", 3, drawn) == 1.0
    assert model_score("wan-tiny", 3, drawn[::-1]) == 0.75  # another direction
    drawn = painter.draw(world.scene_of(0, 3, held_out=True), 17)
    assert (
        model_score("wan-tiny-2", 3, drawn)
        > 0.9
        > model_score("wan-tiny-2", 4, drawn)
        > model_score("wan-tiny-2", 3, np.zeros_like(drawn))
    )
    picture = painter.draw(world.scene_of(0, 3, height=96, width=96, held_out=True, still=True), 1)
    assert model_score("flux-tiny", 3, picture) > 0.9 > model_score("flux-tiny", 4, picture)
    with pytest.raises(ValueError, match="'wan-huge' is no embedded model"):
        model_score("wan-huge", 0, drawn)
