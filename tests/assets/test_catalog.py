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


def test_the_video_model_of_the_richer_world_is_the_default():
    assert model_path() == model_path("wan-tiny")
    assert model_names() == ("wan-tiny", "wan-plain", "flux-tiny")


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


@pytest.mark.parametrize("name", catalog.KNOWN)
def test_every_model_s_world_is_drawn_by_number_with_captions_in_known_words(name):
    size = {key: model_defaults(name)[key] for key in ("height", "width")}
    frames = catalog.longest_trained(name)
    made = [catalog.drawn_clip(name, number, **size, frames=frames) for number in range(12)]
    again = catalog.drawn_clip(name, 7, **size, frames=frames)
    assert (made[7][0], made[7][1].tobytes()) == (again[0], again[1].tobytes())
    for caption, clip in made:
        check_prompt(caption, name)
        assert (clip.shape, clip.dtype) == ((frames, size["height"], size["width"], 3), np.uint8)
    captions = {caption for caption, _ in made}
    assert len(captions) > 8
    assert not captions & set(held_out_prompts(name, 40))


def test_worlds_that_are_drawn_in_one_size_say_so():
    assert catalog.drawn_clip("wan-tiny", 0, height=64, width=96, frames=5)[1].shape == (5, 64, 96, 3)
    with pytest.raises(ValueError, match="64 x 64 pixels, got 96 x 64"):
        catalog.drawn_clip("wan-plain", 0, height=64, width=96, frames=5)
    with pytest.raises(ValueError, match=r"frames=7: .*4k\+1 frames"):
        catalog.drawn_clip("wan-tiny", 0, height=64, width=64, frames=7)


def test_unknown_names_and_counts_are_refused():
    for ask in (model_path, model_defaults, catalog.vocabulary):
        with pytest.raises(ValueError, match=r"'wan-huge'.*wan-tiny"):
            ask("wan-huge")
    with pytest.raises(ValueError, match="count=-1"):
        held_out_prompts("wan-plain", -1)


def test_drawn_clips_of_held_out_prompts_score_well_and_others_do_not(monkeypatch):
    monkeypatch.setattr(catalog, "model_names", lambda: tuple(catalog.KNOWN))
    drawn = clips.clip_of(3, held_out=True)[2]
    assert model_score("wan-plain", 3, drawn) == 1.0
    assert model_score("wan-plain", 3, drawn[::-1]) == 0.75  # another direction
    drawn = painter.draw(world.scene_of(0, 3, held_out=True), 17)
    assert (
        model_score("wan-tiny", 3, drawn)
        > 0.9
        > model_score("wan-tiny", 4, drawn)
        > model_score("wan-tiny", 3, np.zeros_like(drawn))
    )
    picture = painter.draw(world.scene_of(0, 3, height=96, width=96, held_out=True, still=True), 1)
    assert model_score("flux-tiny", 3, picture) > 0.9 > model_score("flux-tiny", 4, picture)
    with pytest.raises(ValueError, match=r"'wan-huge'.*wan-tiny"):
        model_score("wan-huge", 0, drawn)
