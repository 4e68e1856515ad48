"""GRiT: where things are in a picture, what each is called, and a sentence about it.

Source: GRiT (Wu et al., arXiv 2212.00280), its base model for both tasks, as vbench 0.1.5 asks it: CenterNet's
proposals (Zhou et al., arXiv 2103.07461), three stages of boxes, things above 0.5, the likeliest word at each step.
Depth and width are those of the weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import bert, boxes
from .vit import Weights, _blocks, _linear, _norm

LIKELY, SURE = 0.0001, 0.5
"""Scores above which a place may be a thing's middle, and a box holds a thing."""

OF_LEVEL, OF_PICTURE = 1000, 256
"""Most proposals of a level, and of a picture."""

ALIKE, SAME = 0.9, 0.5
"""Overlaps above which two proposals, and two things, are one."""

STEPS = ((10.0, 5.0), (20.0, 10.0), (30.0, 15.0))
"""What each stage's moves and growths are divided by."""

STRIDES = (8, 16, 32, 64, 128)
"""Pixels between the places of each level of the pyramid."""

LEVELS = 3
"""Levels, the finest first, that are looked into."""

CELLS, SEEN = 7, 14
"""Cells of a box's side that stages and texts look at."""

GROUPS = 32
"""Groups of channels that CenterNet norms together."""

HEADS, MOST, MULTIPLE = 12, 40, 32
"""Heads of the texts' attention, tokens of the longest text, what a picture's sides are filled up to multiples of."""

EMBEDDING_EPS, PROJECTION_EPS, PYRAMID_EPS = 1e-8, 1e-5, 1e-5

NAME, SENTENCE = bert.START, bert.MASK + 1
"""Tokens that ask for a thing's name and for a sentence about it."""

NOT_AGAIN = -10000.0
"""Logit of the last token, which does not follow itself."""

TEXT = "roi_heads.text_decoder.textual"


@dataclass(frozen=True, slots=True, eq=False)
class Things:
    """What was found: boxes [N, 4] in pixels, the surest first, and what texts look at, [N, 196, D]."""

    boxes: Tensor
    features: Tensor


def things(picture: Tensor, weights: Weights, tower: Any) -> Things:
    """Return what is in a picture, normalized [3, height, width]; the tower is `ported.vitdet` of the weights."""
    height, width = picture.shape[1:]
    padded = F.pad(picture[None], (0, -width % MULTIPLE, 0, -height % MULTIPLE))
    levels = _pyramid(tower(padded).last_hidden_state, weights)
    found, scores = _proposals(levels, weights)
    found = _refined(levels[:LEVELS], found, scores, (height, width), weights)
    seen = boxes.looked_into(levels[:LEVELS], STRIDES[:LEVELS], found, SEEN).flatten(2).transpose(1, 2)
    whole = (found[:, 2:] > found[:, :2]).all(1)
    return Things(found[whole], seen[whole])


def _pyramid(x: Tensor, weights: Weights) -> list[Tensor]:
    """Return the features of a picture by level, each [1, D, Y, X], of what the tower saw at the second's places."""
    finer = F.conv_transpose2d(x, weights["backbone.fpn_stride_16_8.weight"], stride=2)
    levels = [
        _level(one, weights, f"backbone.fpn_stride{stride}")
        for one, stride in zip((finer, x, F.max_pool2d(x, 2)), STRIDES, strict=False)
    ]
    levels.append(_convolved(levels[-1], weights, "backbone.top_block.p6", stride=2))
    return [*levels, _convolved(F.relu(levels[-1]), weights, "backbone.top_block.p7", stride=2)]


def _level(x: Tensor, weights: Weights, at: str) -> Tensor:
    for number in (1, 2):
        x = _convolved(x, weights, f"{at}_conv{number}").permute(0, 2, 3, 1)
        x = _norm(x, weights, f"{at}_norm{number}", PYRAMID_EPS).permute(0, 3, 1, 2)
    return x


def _convolved(x: Tensor, weights: Weights, at: str, stride: int = 1) -> Tensor:
    """Return x [B, D, Y, X] convolved by a kernel of odd size, zeros around; with a bias where there is one."""
    kernel = weights[f"{at}.weight"]
    return F.conv2d(x, kernel, weights.get(f"{at}.bias"), stride, kernel.shape[-1] // 2)


def _proposals(levels: list[Tensor], weights: Weights) -> tuple[Tensor, Tensor]:
    """Return boxes [N, 4] that may hold things, and their scores [N], the best first."""
    found = [
        _of_level(level, weights, stride, number)
        for number, (level, stride) in enumerate(zip(levels, STRIDES, strict=True))
    ]
    places, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
    kept = boxes.best(places, scores, ALIKE)
    if len(kept) > OF_PICTURE:
        kept = kept[scores[kept] >= scores[kept[OF_PICTURE - 1]]]
    return places[kept], scores[kept]


def _of_level(level: Tensor, weights: Weights, stride: int, number: int) -> tuple[Tensor, Tensor]:
    """Return the boxes and scores around those places of a level that may be things' middles."""
    at = "proposal_generator.centernet_head"
    x, parts = level, _blocks(weights, f"{at}.bbox_tower")
    for conv, norm in zip(parts[::2], parts[1::2], strict=True):
        x = _convolved(x, weights, conv)
        x = F.relu(F.group_norm(x, GROUPS, weights[f"{norm}.weight"], weights[f"{norm}.bias"]))
    likely = _convolved(x, weights, f"{at}.agn_hm").sigmoid().flatten()
    reach = F.relu(_convolved(x, weights, f"{at}.bbox_pred") * weights[f"{at}.scales.{number}.scale"])
    reach = reach[0].flatten(1).T * stride
    chosen = (likely > LIKELY).nonzero()[:, 0]
    if len(chosen) > OF_LEVEL:
        chosen = chosen[likely[chosen].topk(OF_LEVEL).indices]
    width = level.shape[3]
    middle = torch.stack([chosen % width, chosen // width], 1) * stride + stride // 2
    low, high = middle - reach[chosen, :2], middle + reach[chosen, 2:]
    return torch.cat([low, torch.maximum(high, low + 0.01)], 1), likely[chosen].sqrt()


def _refined(levels: list[Tensor], found: Tensor, scores: Tensor, size: tuple[int, int], weights: Weights) -> Tensor:
    """Return the boxes [N, 4] that hold things, the surest first, of proposals that each stage moves."""
    sure = []
    for stage, (far, large) in enumerate(STEPS):
        found = found if stage == 0 else boxes.clipped(found, size)
        x = boxes.looked_into(levels, STRIDES[:LEVELS], found, CELLS).flatten(1)
        for layer in ("fc1", "fc2"):
            x = F.relu(_linear(x, weights, f"roi_heads.box_head.{stage}.{layer}"))
        at = f"roi_heads.box_predictor.{stage}"
        sure.append(_linear(x, weights, f"{at}.cls_score").softmax(1)[:, 0])
        by = _linear(F.relu(_linear(x, weights, f"{at}.bbox_pred.0")), weights, f"{at}.bbox_pred.2")
        found = boxes.moved(found, by / by.new_tensor([far, far, large, large]))
    scores = (torch.stack(sure).mean(0) * scores).sqrt()
    kept = found.isfinite().all(1) & (scores > SURE)
    found, scores = boxes.clipped(found[kept], size), scores[kept]
    return found[boxes.best(found, scores, SAME)[:OF_PICTURE]]


def texts(seen: Tensor, begin: int, weights: Weights) -> Tensor:
    """Return the tokens of texts about things, [N, T], without the one that begins, with those that end.

    Things are seen [N, 196, D]; a text begins with `NAME` or `SENTENCE`.
    """
    tokens = torch.full((len(seen), 1), begin, device=seen.device)
    if not len(seen):
        return tokens[:, 1:]
    held = _remembered(seen, weights)
    ended = torch.zeros(len(seen), dtype=torch.bool, device=seen.device)
    while tokens.shape[1] < MOST and not ended.all():
        likely = _following(tokens, held, weights)
        if tokens.shape[1] > 1:
            likely.scatter_(1, tokens[:, -1:], NOT_AGAIN)
        following = likely.argmax(1).masked_fill(ended, bert.END)
        ended = following == bert.END
        tokens = torch.cat([tokens, following[:, None]], 1)
    return tokens[:, 1:]


def _remembered(seen: Tensor, weights: Weights) -> list[tuple[Tensor, Tensor]]:
    """Return the keys and values of things at each layer, which no text changes."""
    x = _linear(seen, weights, f"{TEXT}.object_feature_projection.0")
    x = _norm(x, weights, f"{TEXT}.object_feature_projection.1", PROJECTION_EPS)
    found = []
    for at in _blocks(weights, f"{TEXT}.transformer.encoder.layer"):
        found.append(bert.keys_values(x, weights, f"{at}.attention", HEADS))
        x = bert.layer(x, weights, at, HEADS)
    return found


def _following(tokens: Tensor, held: list[tuple[Tensor, Tensor]], weights: Weights) -> Tensor:
    """Return the logits [N, words] of the token that follows tokens [N, T]."""
    count = tokens.shape[1]
    x = F.embedding(tokens, weights[f"{TEXT}.embedding.words.weight"])
    x = x + weights[f"{TEXT}.embedding.positions.weight"][:count]
    x = _norm(x, weights, f"{TEXT}.embedding.layer_norm", EMBEDDING_EPS)
    mask = torch.ones(count, held[0][0].shape[2] + count, dtype=torch.bool, device=tokens.device).tril(
        held[0][0].shape[2]
    )
    for at, before in zip(_blocks(weights, f"{TEXT}.transformer.encoder.layer"), held, strict=True):
        x = bert.layer(x, weights, at, HEADS, mask=mask, before=before)
    return _linear(x[:, -1], weights, f"{TEXT}.output")
