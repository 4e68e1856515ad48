"""BERT's layers behind Tag2Text and GRiT as functions of published weights, and the words that BERT reads and writes.

Source: BERT (Devlin et al., arXiv 1810.04805); layers that look at a picture have a second attention, as in BLIP (Li et
al., arXiv 2201.12086).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel import ConfigError

from .vit import Weights, _linear, _norm

EPS = 1e-12

PAD, UNKNOWN, START, END, MASK = 0, 100, 101, 102, 103
"""Places of [PAD], [UNK], [CLS], [SEP] and [MASK] in the vocabulary of bert-base-uncased."""

WORDS = 30522
"""Entries of that vocabulary."""


def embedded(tokens: Tensor, weights: Weights, at: str) -> Tensor:
    """Return the embeddings [B, T, D] of tokens [B, T]: of words and of places, normed."""
    x = F.embedding(tokens, weights[f"{at}.word_embeddings.weight"])
    x = x + weights[f"{at}.position_embeddings.weight"][: tokens.shape[1]]
    return _norm(x, weights, f"{at}.LayerNorm", EPS)


def layer(
    x: Tensor, weights: Weights, at: str, heads: int, *, own: bool = True, mask: Tensor | None = None,
    before: tuple[Tensor, Tensor] | None = None, seen: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return a layer of x, [B, T, D].

    Args:
        x: [B, T, D].
        weights: of the checkpoint.
        at: what the layer's names begin with.
        heads: of all its attentions.
        own: whether x looks at itself.
        mask: where x may look at what lies before and itself, bool, broadcast to [B, H, T, K]; None: everywhere.
        before: keys and values of what lies before x, [B, H, K - T, D / H]; None: nothing.
        seen: what x looks at besides, [B, S, D']; None: nothing.
    """
    if own:
        key, value = keys_values(x, weights, f"{at}.attention", heads)
        if before is not None:
            key, value = torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)
        x = _attended(x, key, value, weights, f"{at}.attention", mask)
    if seen is not None:
        x = _attended(x, *keys_values(seen, weights, f"{at}.crossattention", heads), weights, f"{at}.crossattention")
    wide = F.gelu(_linear(x, weights, f"{at}.intermediate.dense"))
    return _norm(x + _linear(wide, weights, f"{at}.output.dense"), weights, f"{at}.output.LayerNorm", EPS)


def keys_values(seen: Tensor, weights: Weights, at: str, heads: int) -> tuple[Tensor, Tensor]:
    """Return the keys and values [B, H, S, D / H] of what an attention looks at, [B, S, D']."""
    return _by_head(seen, weights, f"{at}.self.key", heads), _by_head(seen, weights, f"{at}.self.value", heads)


def _by_head(x: Tensor, weights: Weights, at: str, heads: int) -> Tensor:
    return _linear(x, weights, at).unflatten(2, (heads, -1)).transpose(1, 2)


def _attended(x: Tensor, key: Tensor, value: Tensor, weights: Weights, at: str, mask: Tensor | None = None) -> Tensor:
    query = _by_head(x, weights, f"{at}.self.query", key.shape[1])
    found = F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)
    return _norm(x + _linear(found, weights, f"{at}.output.dense"), weights, f"{at}.output.LayerNorm", EPS)


def read_words(path: Path) -> list[str]:
    """Return the vocabulary of bert-base-uncased, from its ``vocab.txt``.

    Raises:
        ConfigError: if the file can't be read, or is another vocabulary.
    """
    try:
        found = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read as BERT's vocabulary ({error}); download it again") from None
    expected = {PAD: "[PAD]", UNKNOWN: "[UNK]", START: "[CLS]", END: "[SEP]", MASK: "[MASK]"}
    if len(found) != WORDS or any(found[place] != word for place, word in expected.items()):
        raise ConfigError(
            f"{path} has {len(found)} words, not those of bert-base-uncased, which has {WORDS}; download it again"
        )
    return found


def tokenizer(words: list[str]) -> Any:
    """Return what cuts texts into BERT's words: small letters without accents, the longest known piece first."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    places = {word: place for place, word in enumerate(words)}
    made = Tokenizer(models.WordPiece(vocab=places, unk_token="[UNK]", max_input_chars_per_word=100))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made


def text(tokens: list[int], words: list[str]) -> str:
    """Return what tokens say: pieces joined to words, without blanks before signs, special tokens left out."""
    special = {PAD, UNKNOWN, START, END, MASK}
    said = [words[token] for token in tokens if token < len(words) and token not in special]
    found = " ".join(said).replace(" ##", "").strip()
    for sign in (".", "?", "!", ","):
        found = found.replace(f" {sign}", sign)
    found = found.replace(" ' ", "'")
    for short in ("n't", "'m", "'s", "'ve", "'re"):
        found = found.replace(f" {short}", short)
    return found
