"""Tag2Text: what a picture shows, first as tags, then as a caption that is guided by them.

Source: Tag2Text (Huang et al., arXiv 2303.05657), as vbench 0.1.5 asks it: Swin-B at 384 x 384 pixels, tags above 0.7,
captions of 10 to 30 tokens by 3 beams. Depth and width are those of the weights.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import bert
from .beams import search
from .vit import Weights, _blocks, _linear, _norm

SURE = 0.7
"""Probability above which a tag holds."""

DELETED = (127, 3351, 3265, 3338, 3355, 3359)
"""Tags that are never used."""

TAG_HEADS, HEADS = 4, 12
"""Heads of the tags' attention and of BERT's."""

BEGIN, ENCODE = bert.WORDS, bert.WORDS + 1
"""Tokens that begin captions and tags, behind BERT's vocabulary."""

PROMPT = "a picture of "
TAG_TOKENS, LEAST, MOST, BEAMS = 40, 10, 30, 3


def looked_at(count: int) -> list[int]:
    """Return which frame each caption is of, where a video's frames are given at once.

    The official code repeats what it saw of a frame for each beam, and the transformers that it pins repeats that
    again, so that the beams of a frame read the frame at a third of its place.
    """
    return [place // BEAMS for place in range(count)]


def features(pictures: Tensor, tower: Any) -> Tensor:
    """Return what `ported.swin` sees of pictures, normalized [B, 3, 384, 384]: [B, 1 + tokens, D], their mean first."""
    seen = tower(pictures).last_hidden_state
    return torch.cat([seen.mean(1, keepdim=True), seen], 1)


def captions(seen: Tensor, weights: Weights, words: list[str], tags: list[str]) -> list[str]:
    """Return a caption of each picture, of which `features` are seen, by BERT's vocabulary and the tags by class."""
    tokenizer = bert.tokenizer(words)
    return [
        _caption(one[None], names, weights, tokenizer, words)
        for one, names in zip(seen, _recognized(tag_logits(seen, weights), tags), strict=True)
    ]


def tag_logits(seen: Tensor, weights: Weights) -> Tensor:
    """Return the logits of tags, [B, classes], of what was seen [B, 1 + tokens, D]; each tag asks for itself."""
    x = weights["label_embed.weight"].expand(len(seen), -1, -1)
    for at in _blocks(weights, "vision_multi.encoder.layer"):
        x = bert.layer(x, weights, at, TAG_HEADS, own=False, seen=seen)
    return (weights["fc.W"] * x).sum(-1) + weights["fc.b"]


def _recognized(logits: Tensor, tags: list[str]) -> list[str]:
    """Return the tags that hold, as one text a picture."""
    likely = torch.sigmoid(logits) > SURE
    likely[:, list(DELETED)] = False
    return [" | ".join(tags[place] for place in one.nonzero()[:, 0].tolist()) for one in likely]


def _caption(seen: Tensor, names: str, weights: Weights, tokenizer: Any, words: list[str]) -> str:
    guide = encoded(tag_tokens(names, tokenizer).to(seen.device), seen, weights).expand(BEAMS, -1, -1)
    start = [BEGIN, *tokenizer.encode(PROMPT).ids]

    def step(tokens: Tensor) -> Tensor:
        return following(tokens.to(guide.device), guide, weights)

    found = search(step, start, beams=BEAMS, least=LEAST, most=MOST, end=bert.END)
    return bert.text(found, words)[len(PROMPT) :]


def tag_tokens(names: str, tokenizer: Any) -> Tensor:
    """Return the tokens of tags, [1, 40]: what encodes, the tags, an end, and what pads."""
    found = [ENCODE, *tokenizer.encode(names).ids[: TAG_TOKENS - 2], bert.END]
    return torch.tensor([found + [bert.PAD] * (TAG_TOKENS - len(found))])


def encoded(tokens: Tensor, seen: Tensor, weights: Weights) -> Tensor:
    """Return the encoded tags [B, 40, D] of tokens [B, 40], in the light of what was seen.

    What pads is looked at by no tag, yet it is encoded, and captions look at it, as in the official code.
    """
    x = bert.embedded(tokens, weights, "tag_encoder.embeddings")
    mask = (tokens != bert.PAD)[:, None, None]
    for at in _blocks(weights, "tag_encoder.encoder.layer"):
        x = bert.layer(x, weights, at, HEADS, mask=mask, seen=seen)
    return x


def following(tokens: Tensor, guide: Tensor, weights: Weights) -> Tensor:
    """Return the logits [B, words] of the token that follows tokens [B, T], guided by encoded tags [B, 40, D]."""
    x = bert.embedded(tokens, weights, "text_decoder.bert.embeddings")
    mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).tril()
    for at in _blocks(weights, "text_decoder.bert.encoder.layer"):
        x = bert.layer(x, weights, at, HEADS, mask=mask, seen=guide)
    at = "text_decoder.cls.predictions"
    x = F.gelu(_linear(x[:, -1], weights, f"{at}.transform.dense"))
    x = _norm(x, weights, f"{at}.transform.LayerNorm", bert.EPS)
    return F.linear(x, weights[f"{at}.decoder.weight"], weights[f"{at}.bias"])
