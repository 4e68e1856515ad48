"""CLIP's words: a tokenizer from OpenAI's file of merges, and the tokens of a text as CLIP and ViCLIP clean it."""

import gzip
import html
from pathlib import Path
from typing import Any

from dit_accel import ConfigError

START, END = "<|startoftext|>", "<|endoftext|>"

MERGES = 49152 - 256 - 2
"""How many of the file's lines are merges, behind the first line."""

PIECES = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
"""What CLIP splits a text into before it merges."""


def tokenizer(path: Path) -> Any:
    """Return CLIP's tokenizer from the file of its merges, ``bpe_simple_vocab_16e6.txt.gz``.

    Raises:
        ConfigError: if the file can't be read.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : MERGES + 1]
        merges = [(first, second) for first, second in (line.split() for line in lines if line.strip())]
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(f"{path} can't be read as CLIP's merges ({error}); download it again") from None
    signs = _signs()
    known = [*signs, *(f"{sign}</w>" for sign in signs), *(first + second for first, second in merges), START, END]
    places = {word: place for place, word in enumerate(known)}
    made = Tokenizer(models.BPE(vocab=places, merges=merges, end_of_word_suffix="</w>", unk_token=END))
    made.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return made


def tokens(tokenizer: Any, text: str) -> list[int]:
    """Return a text's tokens, with those of its start and end."""
    import ftfy

    plain = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return [tokenizer.token_to_id(START), *tokenizer.encode(plain).ids, tokenizer.token_to_id(END)]


def _signs() -> list[str]:
    """Return the signs that stand for the bytes: those that print first, then the rest, shown by signs behind 255."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in prints]
    return [*map(chr, prints), *(chr(256 + number) for number in range(len(rest)))]
