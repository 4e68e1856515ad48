"""Objectives that published models judge by, on tiny random models of the same classes."""

import itertools
import json

import numpy as np
import pytest
import torch
from dit_accel_eval.tune.objectives import objective_of
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from dit_accel import ConfigError

WORDS = ("a</w>", "red</w>", "circle</w>", "photo</w>", "depicts</w>")
TEXT = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
VISION = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=8)


@pytest.fixture
def folder(tmp_path):
    """A tiny CLIP with its processor, as the hub's repositories hold them."""
    torch.manual_seed(0)
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    names = [*letters, *WORDS, "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({name: at for at, name in enumerate(names)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tokenizer).save_pretrained(tmp_path)
    config = CLIPConfig(
        text_config=dict(TEXT, bos_token_id=31, eos_token_id=32, max_position_embeddings=77),
        vision_config=dict(VISION, image_size=16, projection_dim=12), projection_dim=12,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(tmp_path)
    return tmp_path


def clips():
    generator = np.random.default_rng(0)
    return generator.random((3, 16, 16, 3), np.float32), generator.random((1, 16, 16, 3), np.float32)


@pytest.mark.parametrize("name", ["clip", "pickscore"])
def test_scores_are_the_model_s_own_averaged_over_frames(folder, name):
    judge = objective_of(f"{name}={folder}", None)
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    for clip in clips():
        frames = [(frame * 255).round().astype(np.uint8) for frame in clip]
        text = "A photo depicts a red circle" if name == "clip" else "a red circle"
        given = processor(text=[text], images=frames, return_tensors="pt")
        with torch.no_grad():
            out = model(**given)
            image = normalize(
                model.vision_model(given["pixel_values"]).pooler_output @ model.visual_projection.weight.T
            )
            prompt = {key: given[key] for key in ("input_ids", "attention_mask")}
            words = normalize(model.text_model(**prompt).pooler_output @ model.text_projection.weight.T)
        scale = 100.0 if name == "clip" else model.logit_scale.exp().item()
        expected = scale * float((image * words).sum(-1).mean())
        assert judge(clip, "a red circle") == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert len(out.logits_per_image) == len(clip)
    assert judge(clips()[0], "a red circle") != judge(clips()[1], "a red circle")
    assert np.isfinite(judge(clips()[0], "a red circle " * 40))  # longer than the model's text


@pytest.mark.parametrize("kind", ["V1", "V2Linear", "V2ReLU"])
def test_the_aesthetic_head_lies_over_the_normed_embedding(folder, kind):
    weights, sizes = load_file(folder / "model.safetensors"), [12, 1] if kind == "V1" else [12, 6, 1]
    names = ["predictor"] if kind == "V1" else ["layers.0", "layers.2"]
    layers = [torch.nn.Linear(into, out) for into, out in itertools.pairwise(sizes)]
    for name, layer in zip(names, layers, strict=True):
        weights |= {f"{name}.weight": layer.weight.detach(), f"{name}.bias": layer.bias.detach()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [f"AestheticsPredictor{kind}"]}))
    judge, clip = objective_of(f"aesthetic={folder}", None), clips()[0]
    vision, images = CLIPVisionModelWithProjection.from_pretrained(folder), CLIPImageProcessor.from_pretrained(folder)
    frames = [(frame * 255).round().astype(np.uint8) for frame in clip]
    with torch.no_grad():
        x = normalize(vision(images(images=frames, return_tensors="pt")["pixel_values"]).image_embeds)
        for at, layer in enumerate(layers):
            x = layer(torch.relu(x) if kind == "V2ReLU" and at else x)
    assert judge(clip, "whatever") == pytest.approx(float(x.mean()), rel=1e-4)


def test_weights_that_lack_a_part_are_told(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("clip", "aesthetic"):
        with pytest.raises(ConfigError, match=r"visual_projection\.weight of CLIP"):
            objective_of(f"{name}={folder}", None)


def test_weights_without_a_head_are_told(folder):
    with pytest.raises(ConfigError, match=r"CLIP.*predictor\.weight.*layers\.N\.weight"):
        objective_of(f"aesthetic={folder}", None)


@pytest.mark.parametrize("name", ["clip", "aesthetic", "pickscore"])
def test_weights_that_are_not_there_are_told_before_any_work(tmp_path, name):
    with pytest.raises(ConfigError, match=rf"objective '{name}'.*hub id"):
        objective_of(f"{name}={tmp_path}", None)
