"""Tiny random weights of Tag2Text and GRiT, of the same names and forms as the published ones, and BERT's words."""

from pathlib import Path

import torch
from dit_accel_eval.vbench import bert
from tiny_vbench import linear, norm, random
from torch import Tensor

WIDTH, SWIN, TAGS = 24, 8, 3429
"""Of BERT, which has 12 heads, of Swin's first stage, and how many tags."""


def words() -> list[str]:
    """Return a vocabulary of BERT's form: special words at their places, letters, and made-up words."""
    found = ["[PAD]", *(f"[unused{number}]" for number in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(97, 123)]
    found += [*"!'(),-.:?|", *letters, *(f"##{letter}" for letter in letters), "picture", "of", "red", "##der", "tag"]
    return [*found, *(f"word{number}" for number in range(bert.WORDS - len(found)))]


def write_words(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{word}\n" for word in words()), encoding="utf-8")


def attention(at: str, width: int, seen: int) -> dict[str, Tensor]:
    found = linear(f"{at}.self.query", width, width) | linear(f"{at}.output.dense", width, width)
    found |= linear(f"{at}.self.key", width, seen, seed=2) | linear(f"{at}.self.value", width, seen, seed=3)
    return found | norm(f"{at}.output.LayerNorm", width)


def bert_layer(at: str, *, own: bool = True, seen: int = 0, width: int = WIDTH) -> dict[str, Tensor]:
    found = linear(f"{at}.intermediate.dense", 2 * width, width) | linear(f"{at}.output.dense", width, 2 * width)
    found |= norm(f"{at}.output.LayerNorm", width)
    found |= attention(f"{at}.attention", width, width) if own else {}
    return found | (attention(f"{at}.crossattention", width, seen) if seen else {})


def embeddings(at: str) -> dict[str, Tensor]:
    found = {f"{at}.word_embeddings.weight": random(bert.WORDS + 2, WIDTH)}
    return found | {f"{at}.position_embeddings.weight": random(512, WIDTH)} | norm(f"{at}.LayerNorm", WIDTH)


def swin(at: str, stages: int = 4, window: int = 12) -> dict[str, Tensor]:
    """As published, two blocks a stage, heads 4 wide."""
    found = {f"{at}patch_embed.proj.weight": random(SWIN, 3, 4, 4), f"{at}patch_embed.proj.bias": random(SWIN)}
    found |= norm(f"{at}patch_embed.norm", SWIN) | norm(f"{at}norm", SWIN << (stages - 1))
    for stage in range(stages):
        width = SWIN << stage
        for number in (0, 1):
            block = f"{at}layers.{stage}.blocks.{number}"
            found |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
            found |= linear(f"{block}.attn.qkv", 3 * width, width) | linear(f"{block}.attn.proj", width, width)
            found |= linear(f"{block}.mlp.fc1", 4 * width, width) | linear(f"{block}.mlp.fc2", width, 4 * width)
            table = random((2 * window - 1) ** 2, width // 4, seed=number)
            found[f"{block}.attn.relative_position_bias_table"] = 5 * table
        if stage < stages - 1:
            found |= norm(f"{at}layers.{stage}.downsample.norm", 4 * width)
            found[f"{at}layers.{stage}.downsample.reduction.weight"] = random(2 * width, 4 * width)
    return found


def tag2text() -> dict[str, Tensor]:
    seen = SWIN << 3
    found = swin("visual_encoder.") | embeddings("tag_encoder.embeddings")
    found |= bert_layer("tag_encoder.encoder.layer.0", seen=seen)
    found |= bert_layer("vision_multi.encoder.layer.0", own=False, seen=seen)
    found |= {"label_embed.weight": random(TAGS, WIDTH), "fc.W": random(1, TAGS, WIDTH), "fc.b": random(1, TAGS)}
    return found | decoder("text_decoder")


def decoder(at: str) -> dict[str, Tensor]:
    found = embeddings(f"{at}.bert.embeddings") | linear(f"{at}.cls.predictions.transform.dense", WIDTH, WIDTH)
    for number in (0, 1):
        found |= bert_layer(f"{at}.bert.encoder.layer.{number}", seen=WIDTH)
    found |= norm(f"{at}.cls.predictions.transform.LayerNorm", WIDTH)
    found[f"{at}.cls.predictions.decoder.weight"] = random(bert.WORDS + 2, WIDTH, seed=4)
    return found | {f"{at}.cls.predictions.bias": torch.zeros(bert.WORDS + 2)}
