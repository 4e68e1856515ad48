"""Tiny random weights of Tag2Text and GRiT, of the same names and forms as the published ones, and BERT's words."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dit_accel_eval.vbench import weight_files
from dit_accel_eval.vbench.networks import bert
from dit_accel_eval.vbench.networks.loading import Networks
from tiny_vbench import linear, norm, random
from torch import Tensor

WIDTH, SWIN, TAGS = 24, 8, 3429
"""Of BERT, which has 12 heads, of Swin's first stage, and how many tags."""


def networks_of(name: str, saved: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Networks:
    """Return the networks of a folder that holds one file of weights, and BERT's words, whose hashes are not asked."""
    for file in (name, "bert-words"):
        one = weight_files.WEIGHT_FILES[file]
        monkeypatch.setitem(weight_files.WEIGHT_FILES, file, replace(one, sha256=""))
        (folder / one.path).parent.mkdir(parents=True)
    write_words(folder / weight_files.WEIGHT_FILES["bert-words"].path)
    torch.save(saved, folder / weight_files.WEIGHT_FILES[name].path)
    return Networks(folder)


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
            found[f"{block}.attn.relative_position_index"] = places_in_window(window)
        if stage < stages - 1:
            found |= norm(f"{at}layers.{stage}.downsample.norm", 4 * width)
            found[f"{at}layers.{stage}.downsample.reduction.weight"] = random(2 * width, 4 * width)
    return found


def places_in_window(window: int) -> Tensor:
    """Return which row of a table of relative positions belongs to two tokens of a window, [tokens, tokens]."""
    row, column = (one.flatten() for one in torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij"))
    down, right = (one[:, None] - one[None] + window - 1 for one in (row, column))
    return down * (2 * window - 1) + right


def tag2text() -> dict[str, Tensor]:
    """Return weights by which a picture of noise has some tags; what the official code ties is equal, as trained."""
    seen = SWIN << 3
    found = swin("visual_encoder.") | embeddings("tag_encoder.embeddings") | decoder("text_decoder")
    for number in (0, 1):
        found |= bert_layer(f"tag_encoder.encoder.layer.{number}", seen=seen)
    tied = [name for name in found if name.startswith("tag_encoder.encoder.layer.0.") and ".attention." not in name]
    found |= {name.replace("tag_encoder", "vision_multi"): found[name] for name in tied}
    found |= {"label_embed.weight": 5 * random(TAGS, WIDTH), "fc.W": random(1, TAGS, WIDTH)}
    return found | {"fc.b": random(1, TAGS) - 2}


def decoder(at: str) -> dict[str, Tensor]:
    found = embeddings(f"{at}.bert.embeddings") | linear(f"{at}.cls.predictions.transform.dense", WIDTH, WIDTH)
    for number in (0, 1):
        found |= bert_layer(f"{at}.bert.encoder.layer.{number}", seen=WIDTH)
    found |= norm(f"{at}.cls.predictions.transform.LayerNorm", WIDTH)
    found[f"{at}.cls.predictions.decoder.weight"] = found[f"{at}.bert.embeddings.word_embeddings.weight"]
    found[f"{at}.cls.predictions.bias"] = random(bert.WORDS + 2, seed=4)
    found[f"{at}.cls.predictions.bias"][bert.END] += 2
    return found


CHANNELS, FC = 32, 16
"""Of GRiT's pyramid and of its boxes' heads; its transformer is one head of 64 wide."""


class Drawn:
    """Draws tensors one after the other, so that no two of one shape are alike."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(7)

    def add(self, at: str, *shape: int, by: float = 1.0) -> None:
        """Draw a kernel whose outputs are about as large as its inputs, times ``by``, and a bias."""
        self.one(f"{at}.weight", *shape, by=by / (torch.Size(shape[1:]).numel()) ** 0.5)
        self.one(f"{at}.bias", shape[0], by=0.1)

    def one(self, name: str, *shape: int, by: float) -> None:
        self.tensors[name] = by * torch.randn(*shape, generator=self._generator)

    def norm(self, at: str, width: int) -> None:
        self.one(f"{at}.weight", width, by=0.2)
        self.tensors[f"{at}.weight"] += 1
        self.one(f"{at}.bias", width, by=0.2)


def vitdet(drawn: Drawn, width: int = 64, blocks: int = 3) -> None:
    at = "backbone.bottom_up"
    drawn.add(f"{at}.patch_embed.proj", width, 3, 16, 16)
    drawn.one(f"{at}.pos_embed", 1, 17, width, by=0.5)
    for number in range(blocks):
        block, places = f"{at}.blocks.{number}", 127 if number % 3 == 2 else 27
        for name in ("rel_pos_h", "rel_pos_w"):
            drawn.one(f"{block}.attn.{name}", places, 64, by=0.3)
        for name in ("norm1", "norm2"):
            drawn.norm(f"{block}.{name}", width)
        drawn.add(f"{block}.attn.qkv", 3 * width, width)
        drawn.add(f"{block}.attn.proj", width, width)
        drawn.add(f"{block}.mlp.fc1", 4 * width, width)
        drawn.add(f"{block}.mlp.fc2", width, 4 * width)


def grit() -> dict[str, Tensor]:
    """Return weights by which a picture of noise holds some things, whose texts end after some tokens."""
    drawn = Drawn()
    vitdet(drawn)
    drawn.one("backbone.fpn_stride_16_8.weight", 64, 64, 2, 2, by=0.125)
    for stride in (8, 16, 32):
        at = f"backbone.fpn_stride{stride}"
        drawn.one(f"{at}_conv1.weight", CHANNELS, 64, 1, 1, by=0.125)
        drawn.one(f"{at}_conv2.weight", CHANNELS, CHANNELS, 3, 3, by=0.06)
        for number in (1, 2):
            drawn.norm(f"{at}_norm{number}", CHANNELS)
    for name in ("p6", "p7"):
        drawn.add(f"backbone.top_block.{name}", CHANNELS, CHANNELS, 3, 3)
    at = "proposal_generator.centernet_head"
    for number in range(0, 12, 3):
        drawn.add(f"{at}.bbox_tower.{number}", CHANNELS, CHANNELS, 3, 3)
        drawn.norm(f"{at}.bbox_tower.{number + 1}", CHANNELS)
    drawn.add(f"{at}.bbox_pred", 4, CHANNELS, 3, 3)
    drawn.tensors[f"{at}.bbox_pred.bias"] += 3
    drawn.add(f"{at}.agn_hm", 1, CHANNELS, 3, 3, by=2.0)
    for number in range(5):
        drawn.tensors[f"{at}.scales.{number}.scale"] = torch.tensor([1 + number / 10])
    for stage in range(3):
        drawn.add(f"roi_heads.box_head.{stage}.fc1", FC, CHANNELS * 49)
        drawn.add(f"roi_heads.box_head.{stage}.fc2", FC, FC)
        predictor = f"roi_heads.box_predictor.{stage}"
        drawn.add(f"{predictor}.cls_score", 2, FC, by=3.0)
        drawn.tensors[f"{predictor}.cls_score.bias"][1] += 2.7
        drawn.add(f"{predictor}.bbox_pred.0", FC, FC)
        drawn.add(f"{predictor}.bbox_pred.2", 4, FC)
    _texts(drawn, "roi_heads.text_decoder.textual")
    return drawn.tensors


def _texts(drawn: Drawn, at: str) -> None:
    drawn.add(f"{at}.object_feature_projection.0", WIDTH, CHANNELS)
    drawn.norm(f"{at}.object_feature_projection.1", WIDTH)
    for name, count in (("words", bert.WORDS), ("positions", 1024)):
        drawn.one(f"{at}.embedding.{name}.weight", count, WIDTH, by=0.2)
    drawn.norm(f"{at}.embedding.layer_norm", WIDTH)
    for number in (0, 1):
        layer = f"{at}.transformer.encoder.layer.{number}"
        for name in ("query", "key", "value"):
            drawn.add(f"{layer}.attention.self.{name}", WIDTH, WIDTH, by=2.0)
        drawn.add(f"{layer}.attention.output.dense", WIDTH, WIDTH, by=2.0)
        drawn.add(f"{layer}.intermediate.dense", 2 * WIDTH, WIDTH)
        drawn.add(f"{layer}.output.dense", WIDTH, 2 * WIDTH)
        drawn.norm(f"{layer}.attention.output.LayerNorm", WIDTH)
        drawn.norm(f"{layer}.output.LayerNorm", WIDTH)
    drawn.tensors[f"{at}.output.weight"] = drawn.tensors[f"{at}.embedding.words.weight"]  # as trained
    drawn.one(f"{at}.output.bias", bert.WORDS, by=0.1)
    drawn.tensors[f"{at}.output.bias"][bert.END] += 3.0
