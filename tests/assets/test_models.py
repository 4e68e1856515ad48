"""The embedded models: files, words, prompts and scores by name, and pipelines whose call needs but a prompt."""

import copy
import inspect
import json
import pickle

import diffusers
import dit_accel_assets as assets
import numpy as np
import pytest
import torch
from dit_accel_assets import catalog, checker, clips, loading, painter, world
from some_cases import some

import dit_accel

EVERY_MODEL = pytest.mark.parametrize("name", [name for name, model in catalog.KNOWN.items() if not model.base])


@pytest.fixture(scope="module", params=some(assets.model_names(), "flux-tiny", "wan-tiny-4"))
def named(request):
    torch.set_num_threads(1)
    pipe = assets.load(request.param)
    pipe.set_progress_bar_config(disable=True)
    return request.param, pipe


@pytest.fixture(scope="module")
def plain():
    """The smaller of the video models."""
    return assets.load("wan-plain")


def run(call, *arguments, **options):
    """What a pipeline gives from a fixed seed, as an array."""
    return call(*arguments, generator=torch.Generator().manual_seed(0), output_type="np", **options)[0]


@pytest.mark.parametrize("name", assets.model_names())
def test_each_model_is_what_the_catalog_says(name):
    index = json.loads((assets.model_path(name) / "model_index.json").read_text())
    assert index["_class_name"] == catalog.KNOWN[name].pipeline
    weights = assets.model_path(catalog.KNOWN[name].base or name)
    known = json.loads((weights / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    assert set(known) - {"<pad>", "</s>", "<unk>"} == set(catalog.vocabulary(name))
    accepted = set(inspect.signature(getattr(diffusers, index["_class_name"]).__call__).parameters)
    assert {"height", "width", "num_inference_steps"} < set(assets.model_defaults(name)) < accepted
    assert sum(file.stat().st_size for file in assets.model_path(name).rglob("*") if file.is_file()) <= 25_000_000


def test_names():
    assert assets.model_path() == assets.model_path("wan-tiny")
    assert assets.model_names()[:4] == ("wan-tiny", "wan-plain", "flux-tiny", "flux-sizes")
    assert {catalog.KNOWN[name].base for name in assets.model_names()[4:]} <= {"wan-tiny", "flux-tiny"}
    for ask in (assets.model_path, assets.model_defaults, catalog.vocabulary, assets.load):
        with pytest.raises(ValueError, match=r"'wan-huge'.*wan-tiny"):
            ask("wan-huge")
    with pytest.raises(ValueError, match=r"'wan-huge'.*wan-tiny"):
        assets.model_score("wan-huge", 0, np.zeros((1, 64, 64, 3)))
    with pytest.raises(ValueError, match="count=-1"):
        assets.held_out_prompts("wan-plain", -1)
    with pytest.raises(AttributeError, match="wan-huge"):
        getattr(loading, "wan-huge")


@EVERY_MODEL
def test_held_out_prompts_are_many_always_the_same_and_in_known_words(name, monkeypatch):
    monkeypatch.setattr(catalog, "model_names", lambda: tuple(catalog.KNOWN))
    texts = assets.held_out_prompts(name, 40)
    assert texts[:7] == assets.held_out_prompts(name, 7)
    assert len(set(texts)) > 30
    for text in texts:
        assets.check_prompt(text, name)


@EVERY_MODEL
def test_every_model_s_world_is_drawn_by_number_with_captions_in_known_words(name):
    size = {key: assets.model_defaults(name)[key] for key in ("height", "width")}
    frames = catalog.longest_trained(name)
    drawn = [catalog.drawn_clip(name, number, **size, frames=frames) for number in range(12)]
    again = catalog.drawn_clip(name, 7, **size, frames=frames)
    assert (drawn[7][0], drawn[7][1].tobytes()) == (again[0], again[1].tobytes())
    for caption, clip in drawn:
        assets.check_prompt(caption, name)
        assert (clip.shape, clip.dtype) == ((frames, size["height"], size["width"], 3), np.uint8)
    captions = {caption for caption, _ in drawn}
    assert len(captions) > 8
    assert not captions & set(assets.held_out_prompts(name, 40))


def test_worlds_that_are_drawn_in_one_size_say_so():
    def drawn(name: str, width: int, frames: int) -> tuple[int, ...]:
        return catalog.drawn_clip(name, 0, height=64, width=width, frames=frames)[1].shape

    assert drawn("wan-tiny", 96, 5) == (5, 64, 96, 3)
    for name, width, frames, said in (("wan-plain", 96, 5, "got 96 x 64"), ("wan-tiny", 64, 7, r"frames=7: .*4k\+1")):
        with pytest.raises(ValueError, match=said):
            drawn(name, width, frames)


def test_drawn_clips_of_held_out_prompts_score_well_and_others_do_not(monkeypatch):
    monkeypatch.setattr(catalog, "model_names", lambda: tuple(catalog.KNOWN))
    drawn = clips.clip_of(3, held_out=True)[2]
    assert assets.model_score("wan-plain", 3, drawn) == 1.0
    assert assets.model_score("wan-plain", 3, drawn[::-1]) == 0.75  # another direction
    drawn = painter.draw(world.scene_of(0, 3, held_out=True), 17)
    right, other, empty = (
        assets.model_score("wan-tiny", *x) for x in ((3, drawn), (4, drawn), (3, np.zeros_like(drawn)))
    )
    assert right > 0.9 > other > empty
    picture = painter.draw(world.scene_of(0, 3, height=96, width=96, held_out=True, still=True), 1)
    assert assets.model_score("flux-tiny", 3, picture) > 0.9 > assets.model_score("flux-tiny", 4, picture)


def test_a_prompt_alone_is_sampled_as_the_model_is_meant_to_be(named):
    name, pipe = named
    (prompt,) = assets.held_out_prompts(name, 1)
    own, stock = {**assets.model_defaults(name), "num_inference_steps": 1}, type(pipe).__mro__[1].__call__
    image = run(pipe, prompt, num_inference_steps=1)
    assert image.tobytes() == run(stock, pipe, prompt, **own).tobytes()
    assert image.shape[-3:-1] == (own["height"], own["width"])


def test_the_signature_tells_the_model_s_own_values(named):
    name, pipe = named
    own, usual = (
        assets.model_defaults(name),
        inspect.signature(getattr(diffusers, catalog.KNOWN[name].pipeline).__call__),
    )
    for call in (inspect.signature(pipe), inspect.signature(type(pipe).__call__)):
        defaults = {key: place.default for key, place in call.parameters.items()}
        assert {key: defaults[key] for key in own} == own
    assert defaults == {key: place.default for key, place in usual.parameters.items()} | own
    assert pipe.__call__.__doc__ == getattr(diffusers, catalog.KNOWN[name].pipeline).__call__.__doc__


def test_a_call_s_arguments_come_before_the_model_s_own(named, monkeypatch):
    name, pipe = named
    kind, calls = type(pipe).__mro__[1], []
    places = list(inspect.signature(kind.__call__).parameters)[1:3]
    monkeypatch.setattr(kind, "__call__", lambda **call: calls.append(call))
    pipe("a red circle", "a blue circle", num_inference_steps=3)
    pipe(prompt_embeds="given", negative_prompt_embeds="given")
    own = {**assets.model_defaults(name), "num_inference_steps": 3}
    assert calls[0] == own | {"self": pipe, places[0]: "a red circle", places[1]: "a blue circle"}
    assert calls[1]["num_inference_steps"] == assets.model_defaults(name)["num_inference_steps"]
    assert not {"prompt", "negative_prompt"} & set(calls[1])  # which the stock call refuses beside embeddings


def test_it_is_a_stock_pipeline_to_all_that_ask(named, tmp_path):
    name, pipe = named
    kind = getattr(diffusers, catalog.KNOWN[name].pipeline)
    assert isinstance(pipe, kind)
    assert type(pipe).__name__ == kind.__name__
    assert {part.dtype for part in pipe.components.values() if hasattr(part, "dtype")} == {torch.float32}
    for prompts in ("a red zebra", ["a red circle", "a red zebra"]):  # never seen, refused before anything runs
        with pytest.raises(ValueError, match=r"zebra.*circle"):
            pipe(prompts)
    with pytest.raises(ValueError, match="zebra"):
        pipe("a red circle", negative_prompt="a zebra")
    if name != "flux-tiny":  # the rest is the same code for all: the fastest is enough
        return
    half = assets.load(name, dtype=torch.bfloat16)
    assert (type(half), half.transformer.dtype) == (type(pipe), torch.bfloat16)
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert type(twin) is type(pipe)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == kind.__name__
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is kind
    again.set_progress_bar_config(disable=True)
    own = {**assets.model_defaults(name), "num_inference_steps": 1}
    found, expected = (run(x, "a red circle", **own) for x in (again, pipe))
    assert np.allclose(found, expected, atol=1e-4)  # where the weights lie in memory moves the last bits
    with dit_accel.attach(pipe, dit_accel.EasyCache()) as attachment:
        run(pipe, assets.held_out_prompts(name, 1), num_inference_steps=2)
        assert attachment.report()


def test_words_are_tokens_and_the_autoencoder_reconstructs_held_out_clips_from_normalised_latents(plain):
    mean, std = (torch.tensor(getattr(plain.vae.config, f"latents_{x}")).view(1, -1, 1, 1, 1) for x in ("mean", "std"))
    tokens = plain.tokenizer("A red Circle, moving up-left.").input_ids
    assert plain.tokenizer.convert_ids_to_tokens(tokens) == ["a", "red", "circle", "moving", "up-left", "</s>"]
    latents = []
    for seed, frames in ((0, 17), (1, 33), (2, 17)):
        video = torch.from_numpy(clips.clip_of(seed, frames=frames, held_out=True)[2])
        x = video.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad():
            encoded = plain.vae.encode(x).latent_dist.mode()
            y = plain.vae.decode(encoded).sample
        assert -10 * torch.log10(((x - y) / 2).pow(2).mean()).item() >= 27.0, seed
        latents.append(((encoded - mean) / std).flatten())
    assert torch.cat(latents).mean().abs() < 0.3
    assert 0.6 < torch.cat(latents).std() < 1.5


@pytest.mark.slow
def test_generated_clips_have_the_colour_asked_for(plain):
    pairs = [clips.clip_of(seed, frames=1, held_out=True)[:2] for seed in range(4)]
    generator = [torch.Generator().manual_seed(seed) for seed in range(4)]
    options = dict(num_frames=17, num_inference_steps=20, guidance_scale=4.0)
    videos = plain([prompt for prompt, _ in pairs], height=64, width=64, generator=generator, **options).frames
    right = [checker.check_clip(video).color == scene.color for video, (_, scene) in zip(videos, pairs, strict=True)]
    assert sum(right) >= 3
