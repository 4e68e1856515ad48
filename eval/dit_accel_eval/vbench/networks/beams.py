"""Beam search as the transformers of 2023 does it: the likeliest sentences, by the mean log-probability of a token.

Source: what ``generate`` of transformers 4.33.2, which VBench pins, does with neither early stopping nor penalties.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

NEVER = -1e9
"""Score of all beams but the first before the first step, so that they don't all begin alike."""


@dataclass(slots=True)
class _Sentences:
    """Sentences that have ended, the best ``width`` of them: (mean log-probability, tokens)."""

    width: int
    kept: list[tuple[float, list[int]]] = field(default_factory=list)

    def add(self, score: float, tokens: list[int]) -> None:
        """Keep a sentence by its summed log-probability over its length, if it is good enough."""
        mean = score / len(tokens)
        if len(self.kept) < self.width:
            self.kept.append((mean, tokens))
        elif mean > self.worst()[0]:
            self.kept.remove(self.worst())
            self.kept.append((mean, tokens))

    def worst(self) -> tuple[float, list[int]]:
        """Return the least likely of the kept ones."""
        return min(self.kept, key=lambda one: one[0])

    def done(self, best: float, length: int) -> bool:
        """Whether no open beam can do better, judged by the best of them at this length."""
        return len(self.kept) == self.width and self.worst()[0] >= best / length


def search(
    step: Callable[[Tensor], Tensor], start: Sequence[int], *, beams: int, least: int, most: int, end: int
) -> list[int]:
    """Return the likeliest tokens that follow a start, with it, without the end.

    Args:
        step: tokens int64 [beams, T] -> logits [beams, words] of the next.
        start: of each sentence.
        beams: how many are followed at once.
        least: tokens with the start before which no sentence ends.
        most: tokens with the start and end of the longest.
        end: the token that ends a sentence.
    """
    tokens = torch.tensor([list(start)] * beams)
    scores = torch.full((beams,), NEVER)
    scores[0] = 0.0
    ended = _Sentences(beams)
    while tokens.shape[1] < most:
        likely = step(tokens).float().cpu().log_softmax(-1)
        if tokens.shape[1] < least:
            likely[:, end] = -torch.inf
        found, places = (likely + scores[:, None]).flatten().topk(2 * beams)
        rows, following = places // likely.shape[1], places % likely.shape[1]
        chosen = []
        for rank, (score, row, token) in enumerate(zip(found.tolist(), rows.tolist(), following.tolist(), strict=True)):
            if token != end:
                chosen.append((score, row, token))
            elif rank < beams:
                ended.add(score, tokens[row].tolist())
            if len(chosen) == beams:
                break
        scores = torch.tensor([score for score, _, _ in chosen])
        last = torch.tensor([[token] for _, _, token in chosen])
        tokens = torch.cat([tokens[[row for _, row, _ in chosen]], last], 1)
        if ended.done(float(found.max()), tokens.shape[1]):
            break
    else:
        for score, row in zip(scores.tolist(), tokens.tolist(), strict=True):
            ended.add(score, row)
    return max(ended.kept, key=lambda one: one[0])[1]
