"""Tag2Text: against transformers' Swin and BERT and the official code on random weights, and `scene`."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_captioners as tiny
import torch
from dit_accel_eval.vbench import official, rules, sampling, weight_files
from dit_accel_eval.vbench.measures import WAYS, Means, missing_reason
from dit_accel_eval.vbench.networks import bert, ported, tag2text
from dit_accel_eval.vbench.networks.beams import search
from dit_accel_eval.vbench.networks.loading import Networks
from dit_accel_eval.vbench.prompts import Prompt
from dit_accel_eval.vbench.sampling import Video

from dit_accel import ConfigError

WORDS = tiny.words()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_swin_is_that_of_transformers():
    from transformers import SwinConfig, SwinModel

    window, weights = 4, tiny.swin("at.", stages=3, window=4)
    config = SwinConfig(image_size=64, patch_size=4, embed_dim=tiny.SWIN, depths=[2, 2, 2], num_heads=[2, 4, 8],
                        window_size=window, mlp_ratio=4.0)  # fmt: skip
    other = SwinModel(config, add_pooling_layer=False).eval()
    names = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection", "patch_embed.norm": "embeddings.norm",
        "attn.relative": "attention.relative_position_bias.relative", "attn.proj": "attention.o_proj",
        ".norm1": ".layernorm_before", ".norm2": ".layernorm_after", "norm.": "layernorm.", "": "encoder.",
    }  # fmt: skip
    held = {}
    for name in (name for name in other.state_dict() if not name.endswith("relative_position_index")):
        at, attention, inner = name.removeprefix("encoder.").partition(".attention.")
        if attention and inner[:2] in ("q_", "k_", "v_"):
            whole = weights[f"at.{at}.attn.qkv.{inner.partition('.')[2]}"]
            held[name] = whole.chunk(3)["qkv".index(inner[0])]
            continue
        mine = name
        for ours, theirs in names.items():
            mine = mine.replace(theirs, ours)
        held[name] = weights[f"at.{mine}"]
    other.load_state_dict(held, strict=False)
    pictures = 3 * tiny.random(2, 3, 64, 64)
    with torch.inference_mode():
        found = tag2text.features(pictures, ported.swin(weights, "at."))
        expected = other(pictures).last_hidden_state
    assert found.shape == (2, 1 + 16, 32)
    assert torch.allclose(found[:, 1:], expected, atol=1e-4)
    assert torch.allclose(found[:, 0], expected.mean(1), atol=1e-4)


def test_captions_follow_as_transformers_bert_has_it():
    from transformers import BertConfig, BertLMHeadModel

    weights = tiny.decoder("text_decoder")
    config = BertConfig(vocab_size=bert.WORDS + 2, hidden_size=tiny.WIDTH, num_hidden_layers=2, num_attention_heads=12,
                        intermediate_size=2 * tiny.WIDTH, is_decoder=True, add_cross_attention=True,
                        tie_word_embeddings=False)  # fmt: skip
    other = BertLMHeadModel(config).eval()
    held = other.state_dict() | {name.removeprefix("text_decoder."): value for name, value in weights.items()}
    held["bert.embeddings.token_type_embeddings.weight"] = torch.zeros(2, tiny.WIDTH)
    held["cls.predictions.decoder.bias"] = held["cls.predictions.bias"]
    other.load_state_dict(held)
    tokens, guide = torch.tensor([[30522, 7, 8, 9], [30522, 8, 8, 7]]), tiny.random(2, 40, tiny.WIDTH, seed=5)
    with torch.inference_mode():
        expected = other(input_ids=tokens, encoder_hidden_states=guide).logits[:, -1]
        assert torch.allclose(tag2text.following(tokens, guide, weights), expected, atol=1e-4)


def test_tags_are_encoded_as_bert_has_it_and_what_pads_is_looked_at_by_none():
    from transformers import BertConfig, BertModel

    weights = tiny.embeddings("embeddings") | tiny.bert_layer("encoder.layer.0")
    config = BertConfig(vocab_size=bert.WORDS + 2, hidden_size=tiny.WIDTH, num_hidden_layers=1, num_attention_heads=12,
                        intermediate_size=2 * tiny.WIDTH)  # fmt: skip
    other = BertModel(config, add_pooling_layer=False).eval()
    held = other.state_dict() | weights
    held["embeddings.token_type_embeddings.weight"] = torch.zeros(2, tiny.WIDTH)
    other.load_state_dict(held)
    tokens = tag2text.tag_tokens("red | reder", bert.tokenizer(WORDS))
    with torch.inference_mode():
        mask = (tokens != bert.PAD)[:, None, None]
        x = bert.embedded(tokens, weights, "embeddings")
        found = bert.layer(x, weights, "encoder.layer.0", 12, mask=mask)
        expected = other(input_ids=tokens, attention_mask=(tokens != bert.PAD).long()).last_hidden_state
        assert torch.allclose(found, expected, atol=1e-4)
        whole = tiny.tag2text()
        seen = tiny.random(1, 145, 64)
        guide = tag2text.encoded(tokens, seen, whole)
        assert guide.shape == (1, 40, tiny.WIDTH)
        assert not torch.allclose(tag2text.encoded(tokens, 2 * seen, whole), guide, atol=1e-3)


def test_tags_are_told_above_a_threshold_in_order_without_the_deleted_ones():
    logits = torch.full((2, tiny.TAGS), -9.0)
    logits[0, [5, 2, 127]] = torch.tensor([0.848, 3.0, 9.0])  # the sigmoid of .8473 is .7
    logits[0, 6] = 0.847
    tags = [f"tag {number}" for number in range(tiny.TAGS)]
    assert tag2text._recognized(logits, tags) == ["tag 2 | tag 5", ""]
    tokenizer = bert.tokenizer(WORDS)
    assert tag2text.tag_tokens("", tokenizer)[0].tolist() == [30523, 102, *[0] * 38]
    long = tag2text.tag_tokens(" | ".join(["red"] * 30), tokenizer)[0].tolist()
    assert (len(long), long[0], long[-1], long.count(WORDS.index("red"))) == (40, 30523, 102, 19)


def test_each_tag_asks_for_itself():
    weights, seen = tiny.tag2text(), tiny.random(2, 145, 64)
    found = tag2text.tag_logits(seen, weights)
    turned = weights | {name: weights[name].flip(-2) for name in ("label_embed.weight", "fc.W")}
    assert found.shape == (2, tiny.TAGS)
    assert torch.allclose(
        tag2text.tag_logits(seen, turned | {"fc.b": weights["fc.b"].flip(1)}), found.flip(1), atol=1e-5
    )


def test_words_are_cut_and_joined_as_bert_has_them(tmp_path):
    tokenizer = bert.tokenizer(WORDS)
    cut = tokenizer.encode("A Redder  picture, of caf\u00e9!").tokens
    assert cut == ["a", "red", "##der", "picture", ",", "of", "c", "##a", "##f", "##e", "!"]
    assert tokenizer.encode("\u4e2d").tokens == ["[UNK]"]
    places = [WORDS.index(word) for word in cut]
    assert bert.text([30522, *places, bert.END, bert.PAD], WORDS) == "a redder picture, of cafe!"
    said = [WORDS.index(word) for word in ("tag", "'", "s", "red", "?")]
    assert bert.text(said, WORDS) == "tag's red?"
    path = tmp_path / "vocab.txt"
    tiny.write_words(path)
    assert bert.read_words(path) == WORDS
    path.write_text("a\nb\n")
    with pytest.raises(ConfigError, match=r"2 words.*bert-base-uncased.*30522"):
        bert.read_words(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="BERT's vocabulary"):
        bert.read_words(path)


def all_sentences(logits: torch.Tensor, least: int, most: int) -> list[tuple[float, list[int]]]:
    """Return all sentences from token 1 with the means of their log-probabilities; token 0 ends them."""
    likely, found = logits.log_softmax(-1), []
    for length in range(1, most + 1):
        for rest in itertools.product((1, 2), repeat=length - 1):
            sentence = [1, *rest]
            score = sum(float(likely[one, other]) for one, other in itertools.pairwise(sentence))
            if length == most:
                found.append((score / length, sentence))
            elif length >= least:
                found.append(((score + float(likely[sentence[-1], 0])) / length, sentence))
    return found


@pytest.mark.parametrize("seed", range(8))
def test_wide_search_finds_the_best_of_all_sentences(seed):
    logits = 10 * tiny.random(3, 3, seed=100 * seed)
    found = search(lambda tokens: logits[tokens[:, -1]], [1], beams=32, least=2, most=5, end=0)
    scores = {tuple(sentence): score for score, sentence in all_sentences(logits, 2, 5)}
    assert scores[tuple(found)] == pytest.approx(max(scores.values()), abs=1e-5)  # a sentence may have an equal


def test_narrow_search_counts_no_end_that_is_not_among_the_best():
    likely = torch.tensor([[1.0, 0.0, 0.0], [0.45, 0.05, 0.5], [0.33, 0.34, 0.33]])

    def step(tokens):
        return likely[tokens[:, -1]].log()

    found = search(step, [1], beams=1, least=1, most=30, end=0)
    assert found == [1, 2] * 15
    score = sum(float(likely[one, other].log()) for one, other in itertools.pairwise(found)) / len(found)
    assert score < float(likely[1, 0].log())  # that of the sentence that ends at once


def test_search_stops_when_no_open_sentence_can_do_better():
    logits, asked = torch.tensor([[0.0, 0.0, 0.0], [9.0, 0.0, -9.0], [9.0, 0.0, -9.0]]), []

    def step(tokens):
        asked.append(tokens.shape[1])
        return logits[tokens[:, -1]]

    assert search(step, [1, 2], beams=2, least=3, most=30, end=0) == [1, 2, 1]
    assert asked == [2, 3, 4, 5, 6]


def test_frames_are_squeezed_whole_for_tag2text():
    frames = noise(2, 96, 160, 3).repeat(8, 1).repeat(8, 2)
    found = sampling.for_tag2text(frames)
    sized = torch.nn.functional.interpolate(
        sampling.tensor(frames), size=[384, 384], mode="bilinear", antialias=True, align_corners=False
    )
    assert found.shape == (2, 3, 384, 384)
    assert (found - sampling.scaled(sized, sampling.IMAGENET)).abs().max() < 1.5 / 255 / 0.224


@pytest.fixture
def networks(tmp_path, monkeypatch) -> Networks:
    monkeypatch.setattr(official, "missing", lambda: None)
    monkeypatch.setattr(official, "tags", lambda: [f"word{number}" for number in range(tiny.TAGS)])
    return tiny.networks_of("tag2text", {"model": tiny.tag2text(), "epoch": 3}, tmp_path, monkeypatch)


def colours() -> np.ndarray:
    """Return 16 small pictures of noise about a colour each."""
    rng = np.random.default_rng(0)
    found = rng.integers(0, 256, (16, 1, 1, 3)) * 0.7 + rng.integers(-90, 90, (16, 6, 6, 3))
    return np.clip(found, 0, 255).astype(np.uint8)


def test_tags_captions_and_scene_are_those_of_the_official_code(networks):
    told = json.loads((Path(__file__).parent / "vbench_tag2text.json").read_text(encoding="utf-8"))
    means, frames = Means(networks=networks), colours()
    weights, pictures = weight_files.read("tag2text", networks.folder), sampling.for_tag2text(frames)
    with torch.inference_mode():
        seen = tag2text.features(pictures[:6], ported.swin(weights, "visual_encoder."))
        logits = tag2text.tag_logits(seen, weights)
    assert tag2text._recognized(logits, official.tags()) == told["tags"]
    assert tag2text.looked_at(16) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5]
    asked = told["captions"][9].split()[-1]
    prompt = Prompt(text="", dimensions=(), targets={"scene": asked})
    seen = []
    networks.scenes = lambda given: seen.extend(Networks.scenes(networks, given)) or seen
    assert missing_reason("scene", means) is None
    score = WAYS["scene"].measure(Video(name="a-0.mp4", frames=frames, fps=8), prompt, means)
    assert seen == told["captions"]
    assert score == rules.share(asked in caption for caption in told["captions"])


def test_what_scene_lacks_is_told_with_what_else_could_be_brought(tmp_path):
    reason = str(missing_reason("scene", Means(networks=Networks(tmp_path))))
    assert "tag2text is missing: put https://huggingface.co/spaces/xinyu1205/recognize-anything/resolve/main/" in reason
    assert f"at {tmp_path / 'caption_model' / 'tag2text_swin_14m.pth'}" in reason
    assert "bert-words is missing: put https://huggingface.co/google-bert/bert-base-uncased" in reason
    assert reason.endswith("; or bring the scenes by Tag2Text with --observations")


def test_tags_are_read_from_the_package_and_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(official, "unpacked", lambda: tmp_path)
    monkeypatch.setattr(official, "missing", lambda: None)
    path = tmp_path / official.TAGS
    path.parent.mkdir(parents=True)
    names = [f"tag {number}" for number in range(official.TAG_COUNT)]
    path.write_text(f"import nothing_of_this_name\ntra_array = {names!r}\ntra_array = nothing(tra_array)\n")
    assert official.tags() == names
    path.write_text("tra_array = ['a']\n")
    with pytest.raises(ConfigError, match=r"1 tags.*3429"):
        official.tags()
