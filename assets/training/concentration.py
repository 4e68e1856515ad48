"""Measures how concentrated a pipeline's self-attention is, from queries and keys as its processor sees them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import torch
from subjects import Subject
from torch import Tensor

TILE = 64


def tile_mass(query: Tensor, key: Tensor) -> Tensor:
    """Return the mean attention mass [query tiles, key tiles] of one head's q, k [S, D], in tiles of 64 tokens."""
    tokens = len(key)
    tiles = -(-tokens // TILE)
    logits = query.float() @ key.float().mT * query.shape[-1] ** -0.5
    shares = torch.nn.functional.pad(torch.softmax(logits, -1), (0, tiles * TILE - tokens))
    by_key = shares.view(len(query), tiles, TILE).sum(-1)
    return torch.stack([rows.mean(0) for rows in by_key.split(TILE)])


def heaviest(mass: Tensor, share: float) -> float:
    """Return which mass the heaviest `share` of the key tiles holds, mean over query tiles."""
    count = max(1, round(share * mass.shape[1]))
    return float(mass.topk(count, dim=1).values.sum(1).mean())


@contextmanager
def recorded(module: Any, record: Any) -> Iterator[None]:
    """Call `record(query, key)` ([B, S, H, D]) at every self-attention of a diffusers model's module while inside."""
    plain = module.dispatch_attention_fn

    def spy(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.shape[1] == key.shape[1]:
            record(query, key)
        return plain(query, key, value, *args, **kwargs)

    module.dispatch_attention_fn = spy
    try:
        yield
    finally:
        module.dispatch_attention_fn = plain


def heaviest_mass(
    subject: Subject, pipe: Any, *, share: float, guidance: float, steps: int = 4
) -> tuple[np.ndarray, int]:
    """Return the mass of the heaviest tiles, [steps, layers, heads], in the prompt's branch, and the token count."""
    size, frames = subject.crowded
    masses: list[list[list[float]]] = []
    tokens = 0

    def record(query: Tensor, key: Tensor) -> None:
        nonlocal tokens
        tokens = query.shape[1]
        if not branch:  # the prompt's branch runs first, the empty prompt's after it
            heads = range(query.shape[2])
            masses[-1].append([heaviest(tile_mass(query[0, :, head], key[0, :, head]), share) for head in heads])

    def count(*_: Any) -> None:
        nonlocal branch
        branch = not branch
        if not branch:
            masses.append([])

    branch = True
    hook = pipe.transformer.register_forward_pre_hook(count)
    try:
        with recorded(import_module(subject.dispatch), record):
            list(subject.generate(pipe, subject.scenes(1, size), frames, steps, guidance, output_type="latent"))
    finally:
        hook.remove()
    return np.asarray(masses), tokens
